"""Effect labels from recordings: which tool changes what another one reads, and which answers vary by themselves.

Evidence is what one episode saw twice. A subject is the same call made again, or the same record (an object whose id the
call named) shown by two tools. Between two sights of a subject lies an interval: the successful calls from the first to the
second; a tool counts apart as near, where its call shares a value with the subject or has none, and as far. What a call
answers where nothing near precedes it is a first sight for other episodes too, unless episodes start in different states:
where more than APART of the answers differ after the same calls, episodes are not compared. Intervals alike in subject, near calls, far
tools and outcome count once.

For a reader R, an interval stays unchanged with probability (1 - leak_R) * prod (1 - q_W) over the near and far tools W in
it (noisy-or); q is fitted by EM. W changes what R reads where a likelihood-ratio test says that q_W > 0, the false-discovery
rate being controlled over all tests (Benjamini and Hochberg 1995). leak_R is how often R's answer differs between episodes that made
the same calls before: hidden state, chance or time, never a write. Where two tools always come together, neither is named.
A writer's new id that R is then asked about is evidence as well: R reads what W creates.

What was not seen is not claimed: "unknown" is an answer. "no" to `writes` says that nothing which was seen twice around
calls of this tool with a shared argument changed by it; a write that no recorded tool reads cannot be seen.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cacherl_jax.cache.key import canonical_arguments
from cacherl_jax.cache.store import Recording
from cacherl_jax.types import Effects, ToolSpec

LEVEL = 0.05  # false-discovery rate of relations
APART = 0.01
WEAKEST = 0.05  # q below which a relation is not reported: no model of the calls between is exact
ENOUGH = 20  # intervals without a change before a tool is said not to write; repeats before an answer is called constant
Pair = tuple[str, str]  # writer, reader
Tool = tuple[str, bool]  # a tool in an interval, and whether it is near to the subject
Test = tuple[str, str, bool]  # writer, reader, near
Counts = Counter[tuple[frozenset[Tool], bool]]  # (tools in the interval, changed) -> number of intervals


@dataclass(frozen=True)
class _Call:
    recording: Recording
    arguments: str

    @property
    def tool(self) -> str:
        return self.recording.tool

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
        result = self.recording.result
        yield ("call", self.tool, self.arguments), {"": f"{result.error or ''} {result.content}"}
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


# ---- evidence --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Evidence:
    """counts: intervals by reader. examples: of a changed interval, by candidate and reader. unchanged: number of unchanged
    intervals that hold a call of the tool with a shared argument. alike: (comparisons,
    differences) between episodes with one history, by tool. apart: an example of a difference there. created: new ids that
    a later call named, by (maker, user)."""

    counts: dict[str, Counts]
    examples: dict[Pair, tuple[_Call, _Call]]
    unchanged: Counter[str]
    alike: dict[str, tuple[int, int]]
    apart: dict[str, tuple[_Call, _Call]]
    created: dict[Pair, set[str]]


def _episodes(recordings: Iterable[Recording], specs: Mapping[str, ToolSpec]) -> list[list[_Call]]:
    episodes: dict[str, list[_Call]] = {}
    for r in recordings:
        episodes.setdefault(r.episode, []).append(_Call(r, canonical_arguments(r.arguments, specs.get(r.tool))))
    return list(episodes.values())


def _evidence(episodes: Sequence[Sequence[_Call]]) -> _Evidence:
    intervals = _Intervals(defaultdict(Counter), {}, Counter(), set())
    created: dict[Pair, set[str]] = defaultdict(set)
    same_history: dict[Any, list[_Call]] = defaultdict(list)
    # First sights that nothing near precedes, by the number of far calls that do.
    untouched: dict[tuple[str, ...], dict[int, list[_Call]]] = defaultdict(lambda: defaultdict(list))
    later: list[tuple[tuple[str, ...], Sequence[_Call], _Call]] = []
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
    apart: dict[str, tuple[_Call, _Call]] = {}
    for (tool, *_), group in same_history.items():
        results = Counter(c.recording.result for c in group)
        usual, times = results.most_common(1)[0]
        compared, differing = alike.get(tool, (0, 0))
        alike[tool] = (compared + len(group) - 1, differing + len(group) - times)
        if len(results) > 1 and tool not in apart:
            pair = [next(c for c in group if c.recording.result == r) for r in list(results)[:2]]
            apart[tool] = (pair[0], pair[1])
    compared, differing = (sum(column) for column in zip((0, 0), *alike.values(), strict=True))
    for subject, earlier, call in later if differing <= APART * compared else ():
        if by_number := untouched.get(subject):
            group = by_number[min(by_number)]
            usual, _ = Counter(c.recording.result for c in group).most_common(1)[0]
            first = next(c for c in group if c.recording.result == usual)
            intervals.add(subject, first, earlier, call, call.recording.result != usual)
    return _Evidence(intervals.counts, intervals.examples, intervals.unchanged, alike, apart, created)


@dataclass(frozen=True)
class _Intervals:
    counts: dict[str, Counts]
    examples: dict[Pair, tuple[_Call, _Call]]
    unchanged: Counter[str]
    seen: set[Any]

    def add(self, subject: tuple[str, ...], first: _Call, inside: Sequence[_Call], second: _Call, changed: bool) -> None:
        """Adds the interval between two sights of a subject to the evidence of the tools that showed it."""
        about = first.values | {subject[-1]}
        inside = [c for c in inside if not c.failed]
        near = [c.near(about) for c in inside]
        tools = frozenset((c.tool, n) for c, n in zip(inside, near, strict=True))
        mark = (subject, changed, tuple((c.tool, c.arguments) for c, n in zip(inside, near, strict=True) if n), tools)
        if mark in self.seen:
            return
        self.seen.add(mark)
        if not changed:
            named = set(_values(first.given))
            self.unchanged.update({c.tool for c in inside if not named.isdisjoint(_values(c.given)) or not c.given})
        for reader in {first.tool, second.tool}:
            self.counts[reader][tools, changed] += 1
            for tool, _ in tools if changed else ():
                if (tool, reader) not in self.examples or len(tools) == 1:
                    self.examples[tool, reader] = (first, second)


def _alike(before: Mapping[str, str], fields: Mapping[str, str]) -> bool:
    """Whether two objects show one record: they share most of their fields."""
    shared, both = before.keys() & fields.keys(), before.keys() | fields.keys()
    return len(shared) >= 3 and 2 * len(shared) >= len(both)


# ---- statistics ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _NoisyOr:
    """One reader's intervals. inside_IT: which tools an interval holds. changed_I, number_I: its outcome and how often."""

    tools: list[Tool]
    inside_IT: np.ndarray
    changed_I: np.ndarray
    number_I: np.ndarray
    leak: float

    @classmethod
    def of(cls, counts: Counts, leak: float) -> _NoisyOr:
        tools = sorted(set().union(*(inside for inside, _ in counts)))
        rows = sorted(counts, key=lambda row: (sorted(row[0]), row[1]))
        inside_IT = np.array([[t in inside for t in tools] for inside, _ in rows], np.float64).reshape(len(rows), len(tools))
        return cls(tools, inside_IT, np.array([c for _, c in rows]), np.array([counts[row] for row in rows], np.float64), leak)

    def fit(self, q_T: np.ndarray) -> tuple[np.ndarray, float]:
        """(q by tool, log likelihood), by EM from a start; a tool that starts at 0 stays there."""
        number_T = self.number_I @ self.inside_IT
        weight_IT = self.inside_IT * (self.number_I * self.changed_I)[:, None]
        for _ in range(300):
            new_T = np.minimum(q_T * ((1 / self._changes(q_T)) @ weight_IT) / number_T, 1 - 1e-6)
            step, q_T = np.abs(new_T - q_T).max(initial=0.0), new_T
            if step < 1e-5:
                break
        p_I = self._changes(q_T)
        return q_T, float(self.number_I @ np.log(np.where(self.changed_I, p_I, 1 - p_I)))

    def _changes(self, q_T: np.ndarray) -> np.ndarray:
        return 1 - (1 - self.leak) * np.exp(self.inside_IT @ np.log1p(-q_T))


def _tests(counts: Counts, leak: float) -> dict[Tool, tuple[float, float]]:
    """(q, p value of q = 0) of every tool that a changed interval holds."""
    model = _NoisyOr.of(counts, leak)
    if not model.changed_I.any():
        return {}
    q_T, likelihood = model.fit(np.full(len(model.tools), 0.5))
    out = {}
    for t in np.flatnonzero(model.changed_I @ model.inside_IT):
        ratio = 0.0
        if q_T[t] > 0.01:
            start_T = q_T * 0.98 + 0.01
            start_T[t] = 0.0
            ratio = max(2 * (likelihood - model.fit(start_T)[1]), 0.0)
        out[model.tools[t]] = (float(q_T[t]), 0.5 * math.erfc(math.sqrt(ratio / 2)))
    return out


def _discoveries(p_values: Mapping[Test, float], level: float) -> set[Test]:
    """Benjamini and Hochberg's step-up procedure."""
    ranked = sorted(p_values, key=lambda pair: (p_values[pair], pair))
    last = max((k for k, pair in enumerate(ranked, 1) if p_values[pair] <= level * k / len(ranked)), default=0)
    return set(ranked[:last])


# ---- the report ------------------------------------------------------------------------------------------------------


def infer(recordings: Iterable[Recording], specs: Mapping[str, ToolSpec], level: float = LEVEL) -> dict[str, Any]:
    """What recordings say about effects, ready for JSON.

    recordings: of whole episodes, in order (`Store.recordings()`, or `lookup.recordings` of transcripts). specs: their
    effects are compared with what is seen, never used as evidence.
    tools: by name: writes yes, no or unknown; varies constant, hidden_state, stochastic, time_dependent,
    hidden_state_or_stochastic or unknown; effects, the label that says so (None where too little is known).
    relations: (writer, reader) found, with counts, p value and an example. contradictions: of the given labels.
    """
    episodes = _episodes(recordings, specs)
    evidence = _evidence(episodes)
    calls = Counter(c.tool for episode in episodes for c in episode)
    varies = {tool: _varies(tool, evidence, episodes) for tool in sorted(calls)}
    compared, differing = (sum(column) for column in zip((0, 0), *evidence.alike.values(), strict=True))
    pooled = (differing + 1) / (compared + 2)
    found: dict[Test, dict[str, Any]] = {}
    p_values: dict[Test, float] = {}
    for reader, counts in evidence.counts.items():
        n, d = evidence.alike.get(reader, (0, 0))
        leak = max((d + pooled) / (n + 1), 1e-4)
        for (writer, near), (q, p) in _tests(counts, leak).items():
            about = [(changed, n) for (inside, changed), n in counts.items() if (writer, near) in inside]
            number, changes = sum(n for _, n in about), sum(n for changed, n in about if changed)
            p_values[writer, reader, near] = p
            found[writer, reader, near] = {"intervals": number, "changed": changes, "effect": round(q, 3), "p": p}
    significant = {test for test in _discoveries(p_values, level) if found[test]["effect"] >= WEAKEST}
    writers = {writer for writer, _, _ in significant}
    relations = {
        (w, r): found[w, r, near] | {"seen": "change", "example": [c.example() for c in evidence.examples[w, r]]}
        for w, r, near in sorted(significant)  # of both, the near one is kept
    }
    for pair, ids in evidence.created.items():
        if pair[0] in writers and len(ids) >= 2:
            relations.setdefault(pair, {"ids": len(ids), "seen": "creation", "example": sorted(ids)[:2]})
    tools = {}
    for tool in sorted(calls):
        unchanged = evidence.unchanged[tool]
        writes = "yes" if tool in writers else "no" if unchanged >= ENOUGH else "unknown"
        tools[tool] = {"calls": calls[tool], "writes": writes, "unchanged_around": unchanged} | varies[tool]
    labels = _labels(tools, set(relations))
    for tool in tools:
        tools[tool]["effects"] = labels[tool]
    return {
        "episodes": len(episodes),
        "calls": sum(calls.values()),
        "tools": tools,
        "relations": [{"writer": w, "reader": r} | relations[w, r] for w, r in sorted(relations)],
        "contradictions": _contradictions(tools, relations, specs, evidence),
    }


def _varies(tool: str, evidence: _Evidence, episodes: Sequence[Sequence[_Call]]) -> dict[str, Any]:
    """How a tool's answers differ between episodes with one history, and whether they differ within an episode too."""
    compared, differing = evidence.alike.get(tool, (0, 0))
    own = evidence.counts.get(tool, Counter())
    by_outcome = Counter(changed for (inside, changed), n in own.items() for _ in range(n) if {t for t, _ in inside} <= {tool})
    stable, unstable = by_outcome[False], by_outcome[True]
    if differing < 2:
        kind = "constant" if differing == 0 and compared >= ENOUGH else "unknown"
    elif (p := _follows_time(tool, episodes)) is not None and p < 0.01:
        kind = "time_dependent"
    elif stable + unstable < 5:
        kind = "hidden_state_or_stochastic"
    else:
        kind = "hidden_state" if unstable / (stable + unstable) < 0.5 * differing / compared else "stochastic"
    return {"varies": kind, "compared": compared, "differing": differing}


def _follows_time(tool: str, episodes: Sequence[Sequence[_Call]]) -> float | None:
    """p value of "results keep longer than chance would have it", over the calls of a tool ordered by their time; None
    where times are unknown. Normal approximation of the number of neighbours that are equal (runs)."""
    groups: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for episode in episodes:
        for call in episode:
            if call.tool == tool:
                if call.recording.recorded_at is None:
                    return None
                groups[call.arguments].append((call.recording.recorded_at, call.recording.result.content))
    equal = expected = variance = 0.0
    for group in groups.values():
        n, results = len(group), [content for _, content in sorted(group)]
        p = sum(k * (k - 1) for k in Counter(results).values()) / (n * (n - 1)) if n > 1 else 1.0
        equal += sum(a == b for a, b in zip(results, results[1:], strict=False))
        expected += (n - 1) * p
        variance += (n - 1) * p * (1 - p)
    return 0.5 * math.erfc((equal - expected) / math.sqrt(2 * variance)) if variance else 1.0


def _labels(tools: Mapping[str, Mapping[str, Any]], relations: set[Pair]) -> dict[str, dict[str, Any] | None]:
    """Labels that say exactly the relations: one resource for all writers that change the same readers, named by them."""
    readers: dict[str, frozenset[str]] = {w: frozenset(r for x, r in relations if x == w) for w, _ in relations}
    resources: dict[frozenset[str], str] = {}
    for writer in sorted(readers):
        resources.setdefault(readers[writer], f"state of {writer}")
    out: dict[str, dict[str, Any] | None] = {}
    for tool, about in tools.items():
        reads = sorted(name for group, name in resources.items() if tool in group)
        writes = [resources[readers[tool]]] if tool in readers else []
        known = reads or writes or (about["writes"] == "no" and about["varies"] != "unknown")
        label = {"reads": reads, "writes": writes, "stochastic": about["varies"] == "stochastic"}
        out[tool] = label | {"time_dependent": about["varies"] == "time_dependent"} if known else None
    return out


def changes(effects: Mapping[str, Effects]) -> set[Pair]:
    """The pairs (writer, reader) that labels claim."""
    return {(w, r) for w, a in effects.items() for r, b in effects.items() if set(a.writes) & set(b.reads)}


def _contradictions(tools, relations, specs, evidence) -> list[dict[str, Any]]:
    given = {name: specs[name].effects for name in tools if name in specs}
    claimed, out = changes(given), []
    for (w, r), about in sorted(relations.items()):
        if w in given and r in given and (w, r) not in claimed:
            said = f"{w} writes {list(given[w].writes)}, {r} reads {list(given[r].reads)}"
            out.append({"tool": w, "given": said, "seen": f"{w} changes what {r} answers", "example": about["example"]})
    for name, effects in given.items():
        about = tools[name]
        pair = [c.example() for c in evidence.apart.get(name, ())]
        if about["varies"] in ("hidden_state", "stochastic", "time_dependent", "hidden_state_or_stochastic") and not (
            effects.stochastic or effects.time_dependent
        ):
            seen = f"{about['differing']} of {about['compared']} answers differ after the same calls: {about['varies']}"
            out.append({"tool": name, "given": "neither stochastic nor time-dependent", "seen": seen, "example": pair})
        elif about["varies"] == "constant" and (effects.stochastic or effects.time_dependent):
            seen = f"{about['compared']} answers after the same calls are equal"
            out.append({"tool": name, "given": "stochastic or time-dependent", "seen": seen, "example": []})
        if about["writes"] == "no" and effects.writes:
            seen = f"nothing changed in {about['unchanged_around']} intervals around it"
            out.append({"tool": name, "given": f"writes {list(effects.writes)}", "seen": seen, "example": []})
    return out


def score(report: Mapping[str, Any], truth: Mapping[str, ToolSpec]) -> dict[str, Any]:
    """A report against true labels: precision and recall of relations, and of writers and non-writers among the tools seen.
    Readers are scored as the second member of a relation; a share of nothing is None."""
    tools = report["tools"]
    right = {p for p in changes({n: truth[n].effects for n in tools}) if set(p) <= set(tools)}
    said = {(r["writer"], r["reader"]) for r in report["relations"]}
    writers = {n for n in tools if truth[n].effects.writes}
    yes, no = ({n for n in tools if tools[n]["writes"] == answer} for answer in ("yes", "no"))

    def share(part: set, whole: set) -> dict[str, Any]:
        return {"of": len(whole), "share": len(part) / len(whole) if whole else None}

    return {
        "relations": {"precision": share(said & right, said), "recall": share(said & right, right)},
        "writers": {"precision": share(yes & writers, yes), "recall": share(yes & writers, writers)},
        "non_writers": {"precision": share(no - writers, no), "recall": share(no - writers, set(tools) - writers)},
        "unknown": sorted(n for n in tools if tools[n]["writes"] == "unknown"),
        "wrong": sorted(said - right),
        "missed": sorted(right - said),
    }
