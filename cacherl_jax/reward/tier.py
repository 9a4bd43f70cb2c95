"""How far an episode's answer can be credited, given how faithfully its calls were answered."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

from cacherl_jax.trajectory import Trajectory
from cacherl_jax.types import Tier

# The paper's weights by the worst tier of a rollout (paper.md, section 3). It names three tiers; a miss is answered worse
# than best effort, an adapted answer no better than fuzzy, and live or no calls are as good as exact.
PAPER_WEIGHTS: dict[Tier | None, float] = {
    None: 0.6,
    Tier.LIVE: 0.6,
    Tier.LOOP: 0.6,
    Tier.EXACT: 0.6,
    Tier.ADAPTED: 0.3,
    Tier.FUZZY: 0.3,
    Tier.BEST_EFFORT: 0.1,
    Tier.MISS: 0.1,
}
BLIND = PAPER_WEIGHTS[Tier.EXACT]  # of every answer, where tiers are not looked at


def blind_weight(trajectory: Trajectory) -> float:
    """The same for every episode: the paper's reward without its tiers."""
    return BLIND


def paper_weight(trajectory: Trajectory) -> float:
    """The answer's weight a in the paper's reward a R_answer + (1 - a) R_process."""
    return PAPER_WEIGHTS[trajectory.worst_tier]


def episode_weight(trajectory: Trajectory) -> float:
    """The product of the fidelities of the episode's observations, in [0, 1]; 1 without a call (paper.md, "Calibrated")."""
    return math.prod(o.fidelity for o in trajectory.observations)


# By `reward.tier`. The first two are shares a of a mixture, the last multiplies the answer's part of the advantage.
WEIGHTS: Mapping[Literal["none", "paper", "calibrated"], Callable[[Trajectory], float]] = {
    "none": blind_weight,
    "paper": paper_weight,
    "calibrated": episode_weight,
}
