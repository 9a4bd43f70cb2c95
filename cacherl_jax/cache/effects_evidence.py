"""What episodes saw twice: the evidence from which effects are inferred.

A subject is the same call made again, or the same record (an object whose id the call named) shown by two tools. Between two
sights of a subject lies an interval: the successful calls from the first to the second; a tool counts apart as near, where
its call shares a value with the subject or has none, and as far. What a call answers where nothing near precedes it is a
first sight for other episodes too, unless episodes start in different states: where more than APART of the answers differ
after the same calls, episodes are not compared. Intervals alike in subject, answers, near calls and far tools count once.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cacherl_jax.cache.key import canonical_arguments
from cacherl_jax.cache.results import meaning
from cacherl_jax.cache.store import Recording
from cacherl_jax.types import ToolSpec

APART = 0.01
Pair = tuple[str, str]  # writer, reader
Tool = tuple[str, bool]  # a tool in an interval, and whether it is near to the subject
Counts = Counter[tuple[frozenset[Tool], bool]]  # (tools in the interval, changed) -> number of intervals


@dataclass(frozen=True)
class Call:
    recording: Recording
    arguments: str

    @property
    def tool(self) -> str:
        return self.recording.tool

    @cached_property
    def answer(self) -> str:
        """One text for all results that say the same."""
        return meaning(self.recording.result)

    @property
    def failed(self) -> bool:
        return self.recording.result.error is not None

    @cached_property
    def given(self) -> dict[str, Any]:
        return _object(self.arguments)

    @cached_property
    def shown(self) -> dict[str, Any]:
        return {} if self.failed else _object(self.recording.result.content)

    @cached_property
    def values(self) -> frozenset[str]:
        """What the call and its result name."""
        return frozenset(_values(self.given)) | frozenset(_ids(self.recording.result.content))

    def near(self, about: Set[str]) -> bool:
        """Whether a successful call may concern what `about` names."""
        return not self.failed and (not self.values or not self.values.isdisjoint(about))

    def subjects(self) -> Iterator[tuple[tuple[str, ...], dict[str, str]]]:
        """(subject, what is shown of it by field)."""
        yield ("call", self.tool, self.arguments), {"": self.answer}
        for name, value in self.given.items():
            if _is_id(name) and isinstance(value, str | int) and self.shown.get(name) == value:
                yield ("record", name, str(value)), {k: json.dumps(v, sort_keys=True) for k, v in self.shown.items()}

    def example(self) -> dict[str, str]:
        r = self.recording
        return {"episode": r.episode, "call": f"{r.tool} {self.arguments}"[:300], "result": r.result.content[:300]}


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_id(name: str) -> bool:
    return re.search(r"(^|_|[a-z](?=I))(id|Id|ID|number|code|key)$", name) is not None


def _values(value: Any) -> Iterator[str]:
    """Texts and numbers of at least three characters; shorter ones are shared by accident."""
    if isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _values(child)
    elif not isinstance(value, bool) and value is not None and len(str(value)) >= 3:
        yield str(value)


def _ids(content: str) -> set[str]:
    """Quoted words of a result that hold a digit or a capital after the first letter; no dates or times."""
    words = re.findall(r'"([\w#@.+-]{3,40})"', content)
    return {w for w in words if re.search(r"\d|.[A-Z]", w) and not re.fullmatch(r"\d{1,4}[-.]\d{2}.*", w)}


@dataclass(frozen=True)
class Evidence:
    """counts: intervals by reader. examples: of a changed interval, by candidate and reader. unchanged: number of unchanged
    intervals that hold a call of the tool with a shared argument. alike: (comparisons,
    differences) between episodes with one history, by tool. apart: an example of a difference there. created: new ids that
    a later call named, by (maker, user). shown: tools by the kind of record that they showed more than once."""

    counts: dict[str, Counts]
    examples: dict[Pair, tuple[Call, Call]]
    unchanged: Counter[str]
    alike: dict[str, tuple[int, int]]
    apart: dict[str, tuple[Call, Call]]
    created: dict[Pair, set[str]]
    shown: dict[str, set[str]]


def episodes_of(recordings: Iterable[Recording], specs: Mapping[str, ToolSpec]) -> list[list[Call]]:
    episodes: dict[str, list[Call]] = {}
    for r in recordings:
        episodes.setdefault(r.episode, []).append(Call(r, canonical_arguments(r.arguments, specs.get(r.tool))))
    return list(episodes.values())


def evidence_of(episodes: Sequence[Sequence[Call]]) -> Evidence:
    intervals = _Intervals(defaultdict(Counter), {}, Counter(), set())
    created: dict[Pair, set[str]] = defaultdict(set)
    shown: Counter[tuple[str, str]] = Counter()
    same_history: dict[Any, list[Call]] = defaultdict(list)
    # First sights that nothing near precedes, by the number of far calls that do.
    untouched: dict[tuple[str, ...], dict[int, list[Call]]] = defaultdict(lambda: defaultdict(list))
    later: list[tuple[tuple[str, ...], Sequence[Call], Call]] = []
    for calls in episodes:
        last: dict[tuple[str, ...], tuple[int, dict[str, str]]] = {}
        named: set[str] = set()
        makers: dict[str, str] = {}
        history: tuple[Any, ...] | int = ()
        for j, call in enumerate(calls):
            same_history[call.tool, call.arguments, history].append(call)
            history = hash((history, call.tool, call.arguments))
            given = set(_values(call.given))
            if not call.failed:
                for name, value in call.given.items():
                    if _is_id(name) and (maker := makers.get(str(value))):
                        created[maker, call.tool].add(str(value))
                new = {str(v) for name, v in call.shown.items() if _is_id(name)} - named - given
                makers |= dict.fromkeys(new, call.tool)
            named |= call.values
            for subject, fields in call.subjects():
                shown.update([(record_kind(subject[1]), call.tool)] if subject[0] == "record" and len(fields) >= 3 else [])
                if subject in last:
                    i, before = last[subject]
                    first, between = calls[i], calls[i + 1 : j]
                    if subject[0] == "call":
                        intervals.add(subject, first, [first, *between], call, before != fields)
                    elif (first.tool, first.arguments) != (call.tool, call.arguments) and _alike(before, fields):
                        changed = any(before[name] != fields[name] for name in before.keys() & fields.keys())
                        intervals.add(subject, first, [*between, call], call, changed)
                elif subject[0] == "call":
                    if not any(c.near(given) for c in calls[:j]):
                        untouched[subject][sum(not c.failed for c in calls[:j])].append(call)
                    if j:
                        later.append((subject, calls[:j], call))
                last[subject] = (j, fields)
    alike: dict[str, tuple[int, int]] = {}
    apart: dict[str, tuple[Call, Call]] = {}
    for (tool, *_), group in same_history.items():
        results = Counter(c.answer for c in group)
        usual, times = results.most_common(1)[0]
        compared, differing = alike.get(tool, (0, 0))
        alike[tool] = (compared + len(group) - 1, differing + len(group) - times)
        if len(results) > 1 and tool not in apart:
            pair = [next(c for c in group if c.answer == answer) for answer in list(results)[:2]]
            apart[tool] = (pair[0], pair[1])
    compared, differing = (sum(column) for column in zip((0, 0), *alike.values(), strict=True))
    for subject, earlier, call in later if differing <= APART * compared else ():
        if by_number := untouched.get(subject):
            group = by_number[min(by_number)]
            usual, _ = Counter(c.answer for c in group).most_common(1)[0]
            first = next(c for c in group if c.answer == usual)
            intervals.add(subject, first, earlier, call, call.answer != usual)
    kinds: dict[str, set[str]] = defaultdict(set)
    for (kind, tool), times in shown.items():
        if times > 1:
            kinds[kind].add(tool)
    return Evidence(intervals.counts, intervals.examples, intervals.unchanged, alike, apart, created, kinds)


@dataclass(frozen=True)
class _Intervals:
    counts: dict[str, Counts]
    examples: dict[Pair, tuple[Call, Call]]
    unchanged: Counter[str]
    seen: set[Any]

    def add(self, subject: tuple[str, ...], first: Call, inside: Sequence[Call], second: Call, changed: bool) -> None:
        """Adds the interval between two sights of a subject to the evidence of the tools that showed it."""
        about = first.values | {subject[-1]}
        inside = [c for c in inside if not c.failed]
        near = [c.near(about) for c in inside]
        tools = frozenset((c.tool, n) for c, n in zip(inside, near, strict=True))
        between = tuple((c.tool, c.arguments) for c, n in zip(inside, near, strict=True) if n)
        mark = (subject, first.answer, second.answer, between, tools)
        if mark in self.seen:
            return
        self.seen.add(mark)
        if not changed:
            named = set(_values(first.given))
            self.unchanged.update({c.tool for c in inside if not named.isdisjoint(_values(c.given)) or not c.given})
        readers = {first.tool, second.tool} | ({record_kind(subject[1])} if subject[0] == "record" else set())
        for reader in readers:
            self.counts[reader][tools, changed] += 1
            for tool, _ in tools if changed else ():
                if (tool, reader) not in self.examples or len(tools) == 1:
                    self.examples[tool, reader] = (first, second)


def record_kind(name: str) -> str:
    """The reader that stands for all tools which show records with an id of this name."""
    return f"record {name}"


def _alike(before: Mapping[str, str], fields: Mapping[str, str]) -> bool:
    """Whether two objects show one record: they share most of their fields."""
    shared, both = before.keys() & fields.keys(), before.keys() | fields.keys()
    return len(shared) >= 3 and 2 * len(shared) >= len(both)
