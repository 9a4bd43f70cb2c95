"""Whether an episode truly succeeded, and how well each part of a reward tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cacherl_jax.cache.key import canonical_call
from cacherl_jax.reward.answer import answered, contains
from cacherl_jax.trajectory import Trajectory
from cacherl_jax.types import Task, ToolSpec


def succeeded(task: Task, trajectory: Trajectory, specs: Mapping[str, ToolSpec]) -> bool:
    """Whether the calls are an accepted reference's, all, in order and no others, and the answer holds every fact.

    References and facts are the task's own, in the embedded world those of the live tools: what the cache served does not
    enter. Where a corpus has no facts, any answer does.
    """
    made = [canonical_call(call, specs.get(call.name)) for call in trajectory.calls_made]
    accepted = ([canonical_call(call, specs.get(call.name)) for call in reference] for reference in task.references)
    return answered(trajectory) and made in accepted and all(contains(trajectory.answer, fact) for fact in task.facts)


def correlation(values_N: np.ndarray, success_N: np.ndarray) -> dict[str, Any]:
    """{"r": Pearson's correlation with success (point-biserial, success being 0 or 1), "n": N}; r is None where either does
    not vary, since nothing can be said then."""
    values_N, success_N = np.asarray(values_N, np.float64), np.asarray(success_N, np.float64)
    if len(values_N) < 2 or np.ptp(values_N) < 1e-12 or np.ptp(success_N) == 0:
        return {"r": None, "n": len(values_N)}
    return {"r": float(np.corrcoef(values_N, success_N)[0, 1]), "n": len(values_N)}
