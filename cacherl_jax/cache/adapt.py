"""The adapted tier: a stored result served for other arguments, where the recordings show that it holds.

A rule says, for one tool and one set of one or two differing arguments, what becomes of the stored result:

same    the difference does not matter; the result is served as it is
echo    the result repeats the argument; the asked value takes the stored one's place
filter  the stored call left the argument open; of its list, the rows that hold the asked value in the field of that name

and of which kind the difference is: `change` (both calls give a value), `set` (only the asked one does), `unset` (only the
stored one does). A default counts as no value.

Answering. All stored calls from which a certified rule leads to the asked one answer; where they disagree, none does.
Nothing is adapted from errors and empty results unless the store's policy serves them, nor across different earlier writes.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cacherl_jax.cache.entries import Entry
from cacherl_jax.cache.results import as_text, is_negative, leaves, meaning, parsed
from cacherl_jax.types import Kind, ToolResult, ToolSpec

AGREEMENT = 0.75  # share of the sources that must say the same
MAX_SOURCES = 8  # stored calls asked for one answer

Arguments = Mapping[str, str]  # name -> value as text; absent names and defaults are left out
Change = tuple[str, str, str]  # argument, change | set | unset, same | echo | filter
Kinds = tuple[str, ...]  # of the differences, name by name
ACTIONS = ("filter", "echo", "same")  # in the order in which they are applied
POSSIBLE = {"change": ("same", "echo"), "set": ("same", "filter"), "unset": ("same",)}


@dataclass(frozen=True)
class Rule:
    """A certified rule with its votes on certifying dialogues. p: of the test against the required precision."""

    tool: str
    changes: tuple[Change, ...]
    right: int
    votes: int
    p: float

    def __str__(self) -> str:
        return ", ".join(f"{name} {kind}: {action}" for name, kind, action in self.changes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _, _ in self.changes)

    @property
    def kinds(self) -> Kinds:
        return tuple(kind for _, kind, _ in self.changes)

    @property
    def precision(self) -> float:
        """Expected under a uniform prior."""
        return (self.right + 1) / (self.votes + 2)

    def to_json(self) -> dict[str, Any]:
        return {
            "tool": self.tool,
            "changes": [list(c) for c in self.changes],
            "right": self.right,
            "votes": self.votes,
            "p": self.p,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Rule:
        changes = tuple((name, kind, action) for name, kind, action in row["changes"])
        return cls(row["tool"], changes, row["right"], row["votes"], row["p"])


@dataclass(frozen=True)
class Adapted:
    """An answer: the result, the stored entry it was made from, the rule, and how many stored results lead to
    it and to others."""

    result: ToolResult
    entry: Entry
    rule: Rule
    agreeing: int
    conflicting: int


@dataclass(frozen=True, eq=False)
class Source:
    """A stored result with its parsed parts. fields: texts by field name. order: a hash of the content, which decides what
    is asked first. rank: of the first dialogue that recorded it, in learning; entry: where there is one, in answering."""

    arguments: Arguments
    writes: str
    value: Any
    fields: Mapping[str, Sequence[str]]
    said: str
    error: str | None
    order: str
    rank: int = 0
    entry: Entry | None = None


class Adapter:
    """Answers from entries by certified rules. negatives: whether errors and empty results are adapted, too."""

    def __init__(
        self, rules: Iterable[Rule], entries: Iterable[Entry], specs: Mapping[str, ToolSpec], negatives: bool = False
    ) -> None:
        self._specs = specs
        self._rules: dict[str, list[Rule]] = defaultdict(list)
        for rule in sorted(rules, key=lambda r: (len(r.changes), -r.precision, r.changes)):
            self._rules[rule.tool].append(rule)
        sources: dict[str, list[Source]] = defaultdict(list)
        self._longest: dict[str, int] = defaultdict(int)
        for entry in entries:
            if entry.tool not in self._rules or entry.kind is Kind.SIMULATED:
                continue
            value = parsed(entry.result.content)
            self._longest[entry.tool] = max(self._longest[entry.tool], length(value))
            arguments = given_arguments(entry.arguments, specs.get(entry.tool))
            if arguments is not None and (negatives or not is_negative(entry.result)):
                said, fields, error = meaning(entry.result), texts_by_field(value), entry.result.error
                source = Source(arguments, entry.writes, value, fields, said, error, entry.hash, entry=entry)
                sources[entry.tool].append(source)
        self._groups: dict[tuple[str, tuple[str, ...]], dict[tuple, list[Source]]] = {}
        for tool, of_tool in sources.items():
            of_tool.sort(key=lambda s: s.order)
            for rule in self._rules[tool]:
                self._groups[tool, rule.names] = grouped(of_tool, rule.names)

    def rules(self, tool: str) -> Sequence[Rule]:
        return self._rules.get(tool, ())

    def answers(self, tool: str, arguments: str, writes: str) -> Iterator[Adapted]:
        """Where the rules lead to a call in its stored form, each entry and answer once."""
        rules = self.rules(tool)
        asked = given_arguments(arguments, self._specs.get(tool)) if rules else None
        if asked is None:
            return
        seen: set[tuple[str, str]] = set()  # several rules may lead from one entry to one answer
        for rule in rules:
            sources = self._groups.get((tool, rule.names), {}).get(rest(asked, writes, rule.names), ())
            for source in candidates(sources, asked, rule.names, [rule.kinds])[rule.kinds]:
                value = adapt(source, asked, rule.changes, self._longest[tool])
                if value is None or source.entry is None:
                    continue
                content = source.entry.result.content if value is source.value else as_content(value)
                result = ToolResult(content, source.entry.result.error)
                if (source.entry.hash, meaning(result)) not in seen:
                    seen.add((source.entry.hash, meaning(result)))
                    yield Adapted(result, source.entry, rule, 1, 0)

    def answer(self, tool: str, arguments: str, writes: str) -> Adapted | None:
        """The adapted answer to a call in its stored form; None to abstain."""
        said: Counter[str] = Counter()
        first: dict[str, Adapted] = {}
        for found in self.answers(tool, arguments, writes):
            what = meaning(found.result)
            said[what] += 1
            first.setdefault(what, found)
        what = agreed(said)
        return None if what is None else replace(first[what], agreeing=said[what], conflicting=said.total() - said[what])


def agreed(said: Counter[str]) -> str | None:
    """The answer of at least AGREEMENT of the sources; None where there is none."""
    if not said:
        return None
    (what, n), *_ = said.most_common(1)
    return what if n >= AGREEMENT * said.total() else None


def as_content(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def given_arguments(text: str, spec: ToolSpec | None) -> dict[str, str] | None:
    """The arguments that say something, as text: null and the schema's defaults are left out, quotes around a text are taken
    off. None for anything but an object."""
    value = parsed(text)
    if not isinstance(value, dict):
        return None
    properties = spec.parameters.get("properties", {}) if spec else {}
    return {k: _bare(v) for k, v in value.items() if v is not None and properties.get(k, {}).get("default") != v}


def _bare(value: Any) -> str:
    text = as_text(value)
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


# ---- what a rule does ------------------------------------------------------------------------------------------------


def adapt(source: Source, asked: Arguments, changes: Sequence[Change], longest: int) -> Any:
    """The source's value made to answer the asked call, or None where a change cannot be made without doubt.

    longest: of the tool's stored lists; a list of that length may have been cut and is not filtered.
    """
    value, fields = source.value, source.fields
    for name, _, action in sorted(changes, key=lambda change: ACTIONS.index(change[2])):
        before, after = source.arguments.get(name), asked.get(name)
        if action == "filter" and after is not None:
            value = _filtered(value, name, after, longest)
            fields = texts_by_field(value)
        elif action == "echo" and before is not None and after is not None:
            field = _echoing(fields, name, before, {v for other, v in source.arguments.items() if other != name})
            value = None if field is None else _replaced(value, field, before, after)
        elif action == "same" and after is not None and any(text != after for text in fields.get(name, ())):
            return None  # the result itself says that it is another call's
        if value is None:
            return None
    return value


def texts_by_field(value: Any) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for name, leaf in leaves(value):
        out.setdefault(name, []).append(as_text(leaf))
    return out


def _echoing(fields: Mapping[str, Sequence[str]], name: str, before: str, others: set[str]) -> str | None:
    """The field that repeats the argument: the one of its name, if it holds nothing else; or the only one with its value."""
    if name in fields:
        return name if all(text == before for text in fields[name]) else None
    holding = [field for field, texts in fields.items() if before in texts]
    return holding[0] if len(holding) == 1 and before not in others else None


def _replaced(value: Any, field: str, before: str, after: str, name: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _replaced(v, field, before, after, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_replaced(v, field, before, after, name) for v in value]
    if name != field or as_text(value) != before:
        return value
    return after if isinstance(value, str) else parsed(after)


def _filtered(value: Any, name: str, after: str, longest: int) -> Any:
    if isinstance(value, dict):  # {"results": [...]}: the one list of the object
        lists = [k for k, v in value.items() if isinstance(v, list)]
        inner = _filtered(value[lists[0]], name, after, longest) if len(lists) == 1 else None
        return None if inner is None else {**value, lists[0]: inner}
    if not isinstance(value, list) or len(value) >= longest or not all(isinstance(row, dict) and name in row for row in value):
        return None
    return [row for row in value if as_text(row[name]) == after] or None


def length(value: Any) -> int:
    if isinstance(value, dict):
        return max((len(v) for v in value.values() if isinstance(v, list)), default=0)
    return len(value) if isinstance(value, list) else 0


# ---- stored calls that differ in given arguments ---------------------------------------------------------------------


def rest(arguments: Arguments, writes: str, names: tuple[str, ...]) -> tuple:
    return (writes, *sorted((k, v) for k, v in arguments.items() if k not in names))


def grouped(sources: Iterable[Source], names: tuple[str, ...]) -> dict[tuple, list[Source]]:
    groups: dict[tuple, list[Source]] = defaultdict(list)
    for source in sources:
        groups[rest(source.arguments, source.writes, names)].append(source)
    return groups


def _kinds(stored: Arguments, asked: Arguments, names: tuple[str, ...]) -> Kinds | None:
    """The kind of each difference; None unless the calls differ in every name."""
    pairs = [(stored.get(name), asked.get(name)) for name in names]
    if any(a == b for a, b in pairs):
        return None
    return tuple("set" if a is None else "unset" if b is None else "change" for a, b in pairs)


def candidates(
    sources: Iterable[Source], asked: Arguments, names: tuple[str, ...], wanted: Iterable[Kinds]
) -> dict[Kinds, list[Source]]:
    """The first sources of each wanted kind of difference."""
    found: dict[Kinds, list[Source]] = {kinds: [] for kinds in wanted}
    left = len(found)
    for source in sources:
        kinds = _kinds(source.arguments, asked, names)
        if kinds is None or kinds not in found or len(found[kinds]) == MAX_SOURCES:
            continue
        found[kinds].append(source)
        left -= len(found[kinds]) == MAX_SOURCES
        if not left:
            break
    return found
