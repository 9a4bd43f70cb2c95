"""What a cache can answer, before any accelerator time is spent: the references of tasks played through it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cacherl_jax.types import Task, Tier, ToolProvider


@dataclass(frozen=True)
class Coverage:
    """Reference calls by tier, the exact share by tool and by depth (1 is an episode's first call), and the tasks of which
    no accepted reference is answered exactly throughout."""

    calls: int
    tiers: dict[str, int]
    exact_by_tool: dict[str, float]
    exact_by_depth: dict[int, float]
    unfinishable: tuple[str, ...]

    @property
    def exact(self) -> float:
        return self.tiers.get(Tier.EXACT.value, 0) / max(1, self.calls)

    def to_json(self) -> dict[str, Any]:
        return {
            "calls": self.calls,
            "exact": self.exact,
            "tiers": self.tiers,
            "exact_by_tool": self.exact_by_tool,
            "exact_by_depth": {str(k): v for k, v in self.exact_by_depth.items()},
            "unfinishable_tasks": len(self.unfinishable),
        }


def coverage(tasks: Sequence[Task], provider: ToolProvider) -> Coverage:
    """Plays every accepted reference of every task through sessions of `provider`; the first reference is counted."""
    tiers: Counter[str] = Counter()
    by_tool: defaultdict[str, list[bool]] = defaultdict(list)
    by_depth: defaultdict[int, list[bool]] = defaultdict(list)
    unfinishable = []
    for task in tasks:
        finished = []
        for i, reference in enumerate(task.references):
            session = provider.start(task, 0)
            served = [session.execute(call) for call in reference]
            finished.append(all(o.tier is Tier.EXACT for o in served))
            if i:
                continue
            for depth, observation in enumerate(served, 1):
                exact = observation.tier is Tier.EXACT
                tiers[observation.tier.value] += 1
                by_tool[observation.call.name].append(exact)
                by_depth[depth].append(exact)
        if not any(finished):
            unfinishable.append(task.id)
    return Coverage(
        calls=sum(tiers.values()),
        tiers=dict(sorted(tiers.items())),
        exact_by_tool={k: sum(v) / len(v) for k, v in sorted(by_tool.items())},
        exact_by_depth={k: sum(v) / len(v) for k, v in sorted(by_depth.items())},
        unfinishable=tuple(unfinishable),
    )
