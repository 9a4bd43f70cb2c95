"""The one fixed, tier-blind metric: are an episode's calls the reference's calls? With what explains it beside it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cacherl_jax.cache.key import canonical_call
from cacherl_jax.evaluate.intervals import Interval, bootstrap_mean, wilson
from cacherl_jax.reward.answer import answer_reward
from cacherl_jax.trajectory import Trajectory
from cacherl_jax.types import Task, ToolCall, ToolSpec


def process_accuracy(task: Task, calls: Sequence[ToolCall], specs: Mapping[str, ToolSpec]) -> int:
    """1 if the calls (names and canonical arguments, failed ones included) equal an accepted reference, else 0."""
    made = _canonical(calls, specs)
    return int(any(made == _canonical(reference, specs) for reference in task.references))


def milestone_share(task: Task, calls: Sequence[ToolCall], specs: Mapping[str, ToolSpec]) -> float:
    """ACEBench's process score: milestones found in order, over their number; best of the accepted references.

    Its scan does not rewind: the search for a milestone starts after the last one found, and one that is not found
    uses up all remaining calls, so that it loses all later ones too. Without milestones: 1 for no call, else 0.
    """
    return max(_milestones(_canonical(reference, specs), _canonical(calls, specs)) for reference in task.references)


def _milestones(wanted: list[str], made: list[str]) -> float:
    if not wanted:
        return float(not made)
    position = found = 0
    for milestone in wanted:
        while position < len(made):
            position += 1
            if made[position - 1] == milestone:
                found += 1
                break
    return found / len(wanted)


def _canonical(calls: Sequence[ToolCall], specs: Mapping[str, ToolSpec]) -> list[str]:
    return [canonical_call(call, specs.get(call.name)) for call in calls]


@dataclass(frozen=True)
class Evaluation:
    """Process accuracy, milestone share and answer accuracy with intervals; the first by family and by worst tier."""

    process: Interval
    milestones: Interval
    answer: Interval
    calls_per_task: float
    families: Mapping[str, Interval]
    worst_tiers: Mapping[str, Interval]
    stops: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        def group(intervals: Mapping[str, Interval]) -> dict[str, Any]:
            return {k: {"accuracy": i.mean, "low": i.low, "high": i.high, "n": i.n} for k, i in intervals.items()}

        return {
            "process": self.process.to_json(),
            "milestones": self.milestones.to_json(),
            "answer": self.answer.to_json(),
            "calls_per_task": self.calls_per_task,
            "families": group(self.families),
            "worst_tiers": group(self.worst_tiers),
            "stops": dict(self.stops),
        }


def evaluate(tasks: Sequence[Task], trajectories: Sequence[Trajectory], specs: Mapping[str, ToolSpec]) -> Evaluation:
    """Scores one trajectory a task, in the same order. Raises ValueError where they do not belong together."""
    correct, by_family, by_tier, stops = [], defaultdict(list), defaultdict(list), defaultdict(int)
    for task, trajectory in zip(tasks, trajectories, strict=True):
        if task.id != trajectory.task_id:
            raise ValueError(f"trajectory of task {trajectory.task_id!r} stands where {task.id!r} is expected")
        value = process_accuracy(task, trajectory.calls_made, specs)
        worst = trajectory.worst_tier
        correct.append(value)
        by_family[task.family].append(value)
        by_tier[worst.value if worst else "none"].append(value)
        stops[trajectory.stop.value] += 1
    pairs = list(zip(tasks, trajectories, strict=True))
    return Evaluation(
        process=wilson(sum(correct), len(correct)),
        milestones=bootstrap_mean([milestone_share(task, t.calls_made, specs) for task, t in pairs]),
        answer=bootstrap_mean([answer_reward(task, t) for task, t in pairs]),
        calls_per_task=sum(len(t.calls) for t in trajectories) / max(1, len(trajectories)),
        families={k: wilson(sum(v), len(v)) for k, v in sorted(by_family.items())},
        worst_tiers={k: wilson(sum(v), len(v)) for k, v in sorted(by_tier.items())},
        stops=dict(sorted(stops.items())),
    )
