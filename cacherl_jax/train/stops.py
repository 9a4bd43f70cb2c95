"""What becomes of episodes that ended otherwise than by an answer: as any other, without a loss, or at a lower reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from cacherl_jax.config import StopRules
from cacherl_jax.trajectory import StopReason, Trajectory


def rule(stop: StopReason, rules: StopRules) -> str:
    """keep, mask or penalty; an answer is kept."""
    return "keep" if stop is StopReason.ANSWER else getattr(rules, stop.value)


def carries_loss(trajectories: Sequence[Trajectory], rules: StopRules) -> np.ndarray:
    """Bool [N]: False where the rule is mask. Overlong filtering of DAPO, arXiv 2503.14476, section 3.4."""
    return np.array([rule(t.stop, rules) != "mask" for t in trajectories], bool)


def shaping(trajectories: Sequence[Trajectory], rules: StopRules, max_sampled_tokens: int) -> np.ndarray:
    """What is added to each episode's reward, [N], in [-penalty, 0].

    -penalty where the rule is penalty. With `soft_tokens` s an episode of n sampled tokens, however it ended, has at least
    -penalty * min(1, (n - (max_sampled_tokens - s)) / s) once n exceeds max_sampled_tokens - s: the soft overlong punishment
    of DAPO, arXiv 2503.14476, equation 13, times `penalty`.
    """
    hard_N = np.array([rule(t.stop, rules) == "penalty" for t in trajectories], float)
    if not rules.soft_tokens:
        return -rules.penalty * hard_N
    over_N = np.array([int(t.sampled_T.sum()) - (max_sampled_tokens - rules.soft_tokens) for t in trajectories], float)
    return -rules.penalty * np.maximum(hard_N, np.clip(over_N / rules.soft_tokens, 0.0, 1.0))


def counts(trajectories: Sequence[Trajectory], rules: StopRules) -> dict[str, Any]:
    """{"masked": how many by how they ended, "penalised": the same}, both empty where no rule applies."""
    found: dict[str, Counter[str]] = {"mask": Counter(), "penalty": Counter(), "keep": Counter()}
    for t in trajectories:
        found[rule(t.stop, rules)][t.stop.value] += 1
    return {"masked": dict(sorted(found["mask"].items())), "penalised": dict(sorted(found["penalty"].items()))}
