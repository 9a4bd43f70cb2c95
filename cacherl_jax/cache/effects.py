"""Effect labels from recordings: which tool changes what another one reads, and which answers vary by themselves.

Evidence is what episodes saw twice, with the calls between (intervals.py). For a reader R, an interval stays unchanged with
probability (1 - leak_R) * prod (1 - q_W) over the near and far tools W in it (noisy-or); q is fitted by EM. W changes what R
reads where a likelihood-ratio test says that q_W > 0, the false-discovery rate being controlled over all tests (Benjamini
and Hochberg 1995). leak_R is how often R's answer differs between episodes that made the same calls before: hidden state,
chance or time, never a write. Where two tools always come together, neither is named. A writer's new id that R is then asked
about is evidence as well: R reads what W creates. And where W changes records of a kind (with an id of one name), it changes
what every tool answers that shows such records.

What was not seen is not claimed: "unknown" is an answer. "no" to `writes` says that nothing which was seen twice around
calls of this tool with a shared argument changed by it; a write that no recorded tool reads cannot be seen.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cacherl_jax.cache.effects_evidence import Call, Counts, Evidence, Pair, Tool, episodes_of, evidence_of
from cacherl_jax.cache.store import Recording
from cacherl_jax.types import Effects, ToolSpec

LEVEL = 0.05  # false-discovery rate of relations
WEAKEST = 0.05  # q below which a relation is not reported: no model of the calls between is exact
ENOUGH = 20  # intervals without a change before a tool is said not to write; repeats before an answer is called constant
VARYING = ("hidden_state", "stochastic", "time_dependent", "hidden_state_or_stochastic")
Test = tuple[str, str, bool]  # writer, reader, near


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
    tools: by name: writes yes, no or unknown; varies constant, unknown or one of VARYING; effects, the label that says so
    (None where too little is known). relations: (writer, reader) found, with counts, p value and an example.
    contradictions: of the given labels; kind: changes (a relation that they deny), one of VARYING, constant, no_change (of a
    labelled writer).
    """
    episodes = episodes_of(recordings, specs)
    evidence = evidence_of(episodes)
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
    relations: dict[Pair, dict[str, Any]] = {
        (w, r): found[w, r, near] | {"seen": "change", "example": [c.example() for c in evidence.examples[w, r]]}
        for w, r, near in sorted(significant)  # of both, the near one is kept
    }
    for kind, showing in evidence.shown.items():
        for w in [w for w, r in relations if r == kind]:
            about = relations.pop((w, kind)) | {"seen": kind}
            for reader in sorted(showing):
                relations.setdefault((w, reader), about)
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


def _varies(tool: str, evidence: Evidence, episodes: Sequence[Sequence[Call]]) -> dict[str, Any]:
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


def _follows_time(tool: str, episodes: Sequence[Sequence[Call]]) -> float | None:
    """p value of "results keep longer than chance would have it", over the calls of a tool ordered by their time; None
    where times are unknown. Normal approximation of the number of neighbours that are equal (runs)."""
    groups: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for episode in episodes:
        for call in episode:
            if call.tool == tool:
                if call.recording.recorded_at is None:
                    return None
                groups[call.arguments].append((call.recording.recorded_at, call.answer))
    equal = expected = variance = 0.0
    for group in groups.values():
        n, results = len(group), [content for _, content in sorted(group)]
        p = sum(k * (k - 1) for k in Counter(results).values()) / (n * (n - 1)) if n > 1 else 1.0
        equal += sum(a == b for a, b in itertools.pairwise(results))
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


def _contradictions(
    tools: Mapping[str, Mapping[str, Any]],
    relations: Mapping[Pair, Mapping[str, Any]],
    specs: Mapping[str, ToolSpec],
    evidence: Evidence,
) -> list[dict[str, Any]]:
    given = {name: specs[name].effects for name in tools if name in specs}
    claimed, out = changes(given), []

    def differ(tool: str, kind: str, label: str, seen: str, example: Sequence[Any] = ()) -> None:
        out.append({"tool": tool, "kind": kind, "given": label, "seen": seen, "example": list(example)})

    for (w, r), about in sorted(relations.items()):
        if w in given and r in given and (w, r) not in claimed:
            label = f"{w} writes {list(given[w].writes)}, {r} reads {list(given[r].reads)}"
            differ(w, "changes", label, f"{w} changes what {r} answers", about["example"])
    for name, effects in given.items():
        about = tools[name]
        free = effects.stochastic or effects.time_dependent
        if about["varies"] in VARYING and not free:
            seen = f"{about['differing']} of {about['compared']} answers differ after the same calls"
            label = "neither stochastic nor time-dependent"
            differ(name, about["varies"], label, seen, [c.example() for c in evidence.apart[name]])
        elif about["varies"] == "constant" and free:
            differ(name, "constant", "stochastic or time-dependent", f"{about['compared']} answers after the same calls are equal")
        if about["writes"] == "no" and effects.writes:
            seen = f"nothing changed in {about['unchanged_around']} intervals around it"
            differ(name, "no_change", f"writes {list(effects.writes)}", seen)
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
