"""How far the trainer's logprobs of sampled tokens are from the sampler's: both by the same weights, in different programs.

A gap makes training off-policy without a word. It comes from other shapes and orders of sums, from lower precision, or from
a defect (a cache read at a wrong position, a token lost); where in the sequence it is tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

FIRST_RANGE = 64  # positions below it are one range; each range after that ends at twice the position


def gaps(sampler: Sequence[np.ndarray], trainer: Sequence[np.ndarray], sampled: Sequence[np.ndarray]) -> dict[str, Any]:
    """|trainer - sampler| in nats over the sampled tokens of a batch of rollouts; the three hold one [T] array a rollout.

    "mean" and "max" over all; "by_position" the same by ranges of the token's position in its trajectory, named by first
    and last position ("0-63", "64-127", "128-255", ...), those without a token left out. Without any token both are 0.
    """
    gap_N = np.concatenate([np.abs(t - s)[m] for s, t, m in zip(sampler, trainer, sampled, strict=True)] or [np.zeros(0)])
    position_N = np.concatenate([np.flatnonzero(m) for m in sampled] or [np.zeros(0, int)])
    by_position, start, stop = {}, 0, FIRST_RANGE
    while len(position_N) and start <= position_N.max():
        inside_N = (start <= position_N) & (position_N < stop)
        if inside_N.any():
            by_position[f"{start}-{stop - 1}"] = _mean_and_max(gap_N[inside_N])
        start, stop = stop, 2 * stop
    return _mean_and_max(gap_N) | {"by_position": by_position}


def _mean_and_max(gap_N: np.ndarray) -> dict[str, float]:
    return {"mean": float(gap_N.mean()), "max": float(gap_N.max())} if len(gap_N) else {"mean": 0.0, "max": 0.0}
