"""Advantages by tier where quality does not depend on the tier: 10,000 random groups, each way of counting tiers."""

from __future__ import annotations

import numpy as np

from cacherl_jax.reward.tier import BLIND, PAPER_WEIGHTS
from cacherl_jax.train import advantages
from cacherl_jax.types import Tier

TIERS = (Tier.EXACT, Tier.FUZZY, Tier.BEST_EFFORT, Tier.MISS)
FIDELITY = (1.0, 0.3, 0.1, 0.0)
WEIGHTS = {
    "paper": tuple(PAPER_WEIGHTS[tier] for tier in TIERS),
    "none_divided": (BLIND,) * len(TIERS),
    "none": (BLIND,) * len(TIERS),
    "calibrated": FIDELITY,
}
DIVIDED = ("paper", "none_divided")  # by the group's standard deviation, as the paper's advantages are


def mean_advantages(groups: int, size: int = 8) -> dict[str, dict[str, dict[str, float]]]:
    """{way: {tier: {"mean", "error"}}}: the mean over groups of the mean advantage of a tier, and its standard error.

    Process rewards lie above answers, as after SFT, and vary little. The groups of all ways are the same.
    """
    rng = np.random.default_rng(0)
    tiers_PG = rng.integers(0, len(TIERS), (groups, size))
    answer_PG = rng.choice([0.0, 0.5, 1.0], (groups, size), p=[0.3, 0.2, 0.5])
    process_PG = rng.uniform(0.8, 1.0, (groups, size))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for way, weights in WEIGHTS.items():
        rows = zip(answer_PG, process_PG, np.array(weights)[tiers_PG], strict=True)
        advantage_PG = np.stack([_advantage(way, *row) for row in rows])
        found[way] = {tier.value: _summary(advantage_PG, tiers_PG == i) for i, tier in enumerate(TIERS)}
    return found


def _advantage(way: str, answer_G: np.ndarray, process_G: np.ndarray, weight_G: np.ndarray) -> np.ndarray:
    if way == "calibrated":
        return advantages.calibrated(answer_G, process_G, weight_G, process_weight=0.5)
    return advantages.scalar(weight_G * answer_G + (1.0 - weight_G) * process_G, divide_by_std=way in DIVIDED)


def _summary(advantage_PG: np.ndarray, is_PG: np.ndarray) -> dict[str, float]:
    """Over the groups that have any such rollout."""
    count_P = is_PG.sum(axis=1)
    mean_P = (advantage_PG * is_PG).sum(axis=1)[count_P > 0] / count_P[count_P > 0]
    return {"mean": float(np.mean(mean_P)), "error": float(np.std(mean_P, ddof=1) / np.sqrt(len(mean_P)))}
