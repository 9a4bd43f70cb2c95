"""What a cache can answer, before any accelerator time is spent: the references of tasks played through it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cacherl_jax.types import TIER_ORDER, Observation, Task, Tier, ToolCall, ToolFailure, ToolProvider

# Tiers whose answers an episode can be finished with.
FAITHFUL = (Tier.LIVE, Tier.EXACT, Tier.ADAPTED)


@dataclass(frozen=True)
class Coverage:
    """Reference calls by tier: in all, by tool, by depth (1 is an episode's first call). fidelity: mean over the calls.
    unfinishable: tasks of which no accepted reference is answered exactly or adapted throughout."""

    tiers: dict[str, int]
    by_tool: dict[str, dict[str, int]]
    by_depth: dict[int, dict[str, int]]
    fidelity: float
    tasks: int
    unfinishable: tuple[str, ...]

    @property
    def calls(self) -> int:
        return sum(self.tiers.values())

    @property
    def exact(self) -> float:
        return _exact(self.tiers)

    def to_json(self) -> dict[str, Any]:
        return {
            "calls": self.calls,
            "exact": self.exact,
            "fidelity": self.fidelity,
            "tiers": self.tiers,
            "exact_by_tool": {k: _exact(v) for k, v in self.by_tool.items()},
            "exact_by_depth": {str(k): _exact(v) for k, v in self.by_depth.items()},
            "tasks": self.tasks,
            "unfinishable_tasks": len(self.unfinishable),
        }


def _exact(tiers: Mapping[str, int]) -> float:
    return tiers.get(Tier.EXACT.value, 0) / max(1, sum(tiers.values()))


def coverage(tasks: Sequence[Task], provider: ToolProvider) -> Coverage:
    """Plays every accepted reference of every task through sessions of `provider`; the first reference is counted."""
    by_tool: defaultdict[str, Counter[str]] = defaultdict(Counter)
    by_depth: defaultdict[int, Counter[str]] = defaultdict(Counter)
    fidelity = 0.0
    unfinishable = []
    for task in tasks:
        finished = []
        for i, reference in enumerate(task.references):
            served = _play(task, provider, reference)
            finished.append(all(o.tier in FAITHFUL for o in served))
            for depth, observation in enumerate(served if i == 0 else (), 1):
                by_tool[observation.call.name][observation.tier.value] += 1
                by_depth[depth][observation.tier.value] += 1
                fidelity += observation.fidelity
        if not any(finished):
            unfinishable.append(task.id)
    tiers = sum(by_depth.values(), Counter[str]())
    return Coverage(
        tiers=_in_order(tiers),
        by_tool={k: _in_order(v) for k, v in sorted(by_tool.items())},
        by_depth={k: _in_order(v) for k, v in sorted(by_depth.items())},
        fidelity=fidelity / max(1, sum(tiers.values())),
        tasks=len(tasks),
        unfinishable=tuple(unfinishable),
    )


def _play(task: Task, provider: ToolProvider, reference: Sequence[ToolCall]) -> list[Observation]:
    """Every call of a reference answered, also those after one at which an episode would end."""
    session, served = provider.start(task, 0), []
    for index, call in enumerate(reference):
        try:
            served.append(session.execute(call, index))
        except ToolFailure as failure:
            served.append(failure.observation)
    return served


def _in_order(counts: Mapping[str, int]) -> dict[str, int]:
    return {t.value: counts[t.value] for t in TIER_ORDER if counts.get(t.value)}
