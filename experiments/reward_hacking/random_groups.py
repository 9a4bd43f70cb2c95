"""Advantages by tier where quality does not depend on the tier: 10,000 random groups, each way of counting tiers."""

from __future__ import annotations

from typing import Any

import numpy as np

from cacherl_jax.reward.tier import BLIND, PAPER_WEIGHTS
from cacherl_jax.train import advantages
from cacherl_jax.types import Tier

TIERS = (Tier.EXACT, Tier.FUZZY, Tier.BEST_EFFORT, Tier.MISS)
FIDELITY = (1.0, 0.3, 0.1, 0.0)
WEIGHTS = {
    "paper": tuple(PAPER_WEIGHTS[tier] for tier in TIERS),
    "none": (BLIND,) * len(TIERS),
    "calibrated": FIDELITY,
}


def mean_advantages(groups: int, size: int = 8) -> dict[str, dict[str, dict[str, float]]]:
    """{way: {tier: {"mean", "error"}}}: the mean over groups of the mean advantage of a tier, and its standard error.

    Process rewards lie above answers, as after SFT, and vary little. The groups of all ways are the same.
    """
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, list[float]]] = {way: {tier.value: [] for tier in TIERS} for way in WEIGHTS}
    for _ in range(groups):
        tiers_G = rng.integers(0, len(TIERS), size)
        answer_G, process_G = rng.choice([0.0, 0.5, 1.0], size, p=[0.3, 0.2, 0.5]), rng.uniform(0.8, 1.0, size)
        for way, weights in WEIGHTS.items():
            advantage_G = _advantage(way, answer_G, process_G, np.array(weights)[tiers_G])
            for i, tier in enumerate(TIERS):
                if (tiers_G == i).any():
                    found[way][tier.value].append(float(advantage_G[tiers_G == i].mean()))
    return {way: {tier: _summary(values) for tier, values in by_tier.items()} for way, by_tier in found.items()}


def _advantage(way: str, answer_G: np.ndarray, process_G: np.ndarray, weight_G: np.ndarray) -> np.ndarray:
    if way == "calibrated":
        return advantages.calibrated(answer_G, process_G, weight_G, process_weight=0.5)
    return advantages.scalar(weight_G * answer_G + (1.0 - weight_G) * process_G, divide_by_std=True)


def _summary(values: list[float]) -> dict[str, Any]:
    return {"mean": float(np.mean(values)), "error": float(np.std(values, ddof=1) / np.sqrt(len(values)))}
