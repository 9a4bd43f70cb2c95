"""How well an episode called its tools, graded, so that a group of imperfect rollouts still has an order.

Against the reference, in the spirit of ToolRL (arXiv 2504.13958): names, parameter names and values are scored apart. Calls
are aligned in order with each accepted reference; the best one counts. Without a reference: how many calls could be made at
all, and the paper's own process reward, which asks for no more than that and the form of the episode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cacherl_jax.cache.key import canonical_call
from cacherl_jax.tools.registry import check_call
from cacherl_jax.trajectory import Trajectory
from cacherl_jax.types import Task, ToolCall, ToolSpec


@dataclass(frozen=True)
class ProcessReward:
    """Parts in [0, 1], and their total.

    `milestones`: share of reference calls matched exactly, in order; `names`, `parameters`, `values`: mean match of aligned
    calls over the reference; `economy`: the square of reference calls over calls made, at most 1: a needless call must cost
    more than stopping early saves. total = (0.2 names + 0.1 parameters + 0.3 values + 0.4 milestones) * economy; 1 only for
    an exact match. Where no call is needed: 1 without any call, else 0.
    """

    names: float
    parameters: float
    values: float
    milestones: float
    economy: float
    total: float


WEIGHTS = {"names": 0.2, "parameters": 0.1, "values": 0.3, "milestones": 0.4}


def process_reward(task: Task, trajectory: Trajectory, specs: Mapping[str, ToolSpec]) -> ProcessReward:
    """The reward of an episode's calls, failed and malformed ones included."""
    scored = (match_calls(reference, trajectory.calls, specs, trajectory.refused) for reference in task.references)
    return max(scored, key=lambda r: r.total)


def match_calls(
    reference: Sequence[ToolCall], calls: Sequence[ToolCall], specs: Mapping[str, ToolSpec], refused: Sequence[bool]
) -> ProcessReward:
    """Scores `calls` against one reference sequence. Those that were `refused` can match in part, never exactly."""
    if not reference:
        value = float(not calls)
        return ProcessReward(value, value, value, value, value, value)
    # Best alignment in order, as in a longest common subsequence, each pair worth its weighted match.
    nothing: tuple[float, tuple[float, ...]] = (0.0, (0.0,) * len(WEIGHTS))
    rows = [[nothing] * (len(calls) + 1) for _ in range(len(reference) + 1)]
    for i, wanted in enumerate(reference):
        for j, made in enumerate(calls):
            parts = _match(wanted, made, specs, refused[j])
            worth = sum(w * p for w, p in zip(WEIGHTS.values(), parts, strict=True))
            before, sums = rows[i][j]
            paired = (before + worth, tuple(a + b for a, b in zip(sums, parts, strict=True)))
            rows[i + 1][j + 1] = max(paired, rows[i][j + 1], rows[i + 1][j])
    total, sums = rows[-1][-1]
    n = len(reference)
    names, parameters, values, milestones = (s / n for s in sums)
    economy = min(1.0, n / max(1, len(calls))) ** 2
    return ProcessReward(names, parameters, values, milestones, economy, total / n * economy)


def _match(wanted: ToolCall, made: ToolCall, specs: Mapping[str, ToolSpec], refused: bool) -> tuple[float, float, float, float]:
    """(names, parameters, values, exact) of one pair; nothing counts where the tool differs."""
    if wanted.name != made.name:
        return 0.0, 0.0, 0.0, 0.0
    spec = specs.get(wanted.name)
    if not refused and canonical_call(wanted, spec) == canonical_call(made, spec):
        return 1.0, 1.0, 1.0, 1.0
    try:
        ours, theirs = made.parsed(), wanted.parsed()
    except (ValueError, RecursionError):
        return 1.0, 0.0, 0.0, 0.0
    both, either = ours.keys() & theirs.keys(), ours.keys() | theirs.keys()
    if not either:
        return 1.0, 1.0, 1.0, 0.0
    equal = sum(ours[k] == theirs[k] for k in both)
    return 1.0, len(both) / len(either), equal / len(either), 0.0


@dataclass(frozen=True)
class Validity:
    """Shares of an episode's calls, in [0, 1], each 1 where no call was made. `names`: of a tool that the task offers;
    `arguments`: that also satisfy its schema. A malformed call is neither."""

    names: float
    arguments: float


def validity(task: Task, trajectory: Trajectory, specs: Mapping[str, ToolSpec]) -> Validity:
    """Of all calls that the policy wrote, those that could be made."""
    calls, offered = trajectory.calls, _offered(task, specs)
    if not calls:
        return Validity(1.0, 1.0)
    names = sum(call.name in offered for call in calls)
    arguments = sum(check_call(offered, call) is None for call in calls)
    return Validity(names / len(calls), arguments / len(calls))


def paper_process_reward(task: Task, trajectory: Trajectory, specs: Mapping[str, ToolSpec]) -> float:
    """The paper's process reward, in [0, 1]: 0.40 valid tool names, 0.25 a non-empty answer, 0.15 thinking blocks, 0.10 tool
    diversity, 0.10 schema-valid arguments (paper.md, section 3).

    It leaves open what each part means. Here: thinking blocks are the share of turns whose block the policy closed itself;
    diversity is different valid tools over calls. An episode without a call has the three parts of calls only where the task
    needs none, or saying nothing would earn what calling well does. No part looks at what was asked for: any valid call of
    any tool is as good as the right one.
    """
    calls, offered, valid = trajectory.calls, _offered(task, specs), validity(task, trajectory, specs)
    if calls:
        of_calls = 0.4 * valid.names + 0.1 * len({c.name for c in calls} & offered.keys()) / len(calls) + 0.1 * valid.arguments
    else:
        of_calls = 0.6 * any(not reference for reference in task.references)
    unfinished = sum(o.result.error == "unfinished_thinking" and not o.call.name for o in trajectory.observations)
    thinking = 1.0 - unfinished / max(1, trajectory.turns)
    return of_calls + 0.25 * bool(trajectory.answer.strip()) + 0.15 * thinking


def _offered(task: Task, specs: Mapping[str, ToolSpec]) -> dict[str, ToolSpec]:
    return {name: specs[name] for name in task.tools if name in specs}
