"""Advantages of one group of rollouts of one task. Plain NumPy: a group has a few dozen numbers.

How large they are decides what `grpo.kl_coef` means. Divided by a standard deviation they are of size 1; undivided, of the
size of the rewards' spread in a group, about 0.3 for rewards in [0, 1], and the same coefficient holds the policy about
three times as firmly. A step's metrics name the size and the coefficient per unit of it (`scale`).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from cacherl_jax.config import GrpoConfig

STD_FLOOR = 1e-4  # added to a standard deviation that is divided by

Baseline = Literal["mean", "leave_one_out"]


def advantages(
    grpo: GrpoConfig,
    tier: Literal["none", "paper", "calibrated"],
    answer_G: np.ndarray,
    process_G: np.ndarray,
    weight_G: np.ndarray,
    shaping_G: np.ndarray | None = None,
) -> np.ndarray:
    """A_G by the rule for the cache's tiers. weight_G: the answer's weight a, for "calibrated" the episode's fidelity w.

    shaping_G is what a rule on ends of episodes adds to each reward (`stops.shaping`); None: nothing.
    """
    shaping_G = np.zeros_like(answer_G) if shaping_G is None else shaping_G
    how = {"baseline": grpo.baseline, "divide_by_std": grpo.divide_by_std}
    if tier == "calibrated":
        centred_G = calibrated(answer_G, process_G, weight_G, process_weight=grpo.process_weight, **how)
        return centred_G + centred(shaping_G, grpo.baseline)
    return scalar(weight_G * answer_G + (1.0 - weight_G) * process_G + shaping_G, **how)


def scalar(reward_G: np.ndarray, *, baseline: Baseline = "mean", divide_by_std: bool = False) -> np.ndarray:
    """R_i - b_i, divided by the group's standard deviation if asked: GRPO, arXiv 2402.03300, with the mean as baseline, and
    Dr. GRPO, arXiv 2503.20783, undivided; RLOO, arXiv 2402.14740, leaves the episode itself out of the mean.

    On the paper's reward it pays a rollout for missing the cache when process rewards exceed answer rewards (paper.md,
    flaw 1).
    """
    centred_G = centred(reward_G, baseline)
    return centred_G / (reward_G.std() + STD_FLOOR) if divide_by_std else centred_G


def calibrated(
    answer_G: np.ndarray,
    process_G: np.ndarray,
    weight_G: np.ndarray,
    *,
    process_weight: float,
    baseline: Baseline = "mean",
    divide_by_std: bool = False,
) -> np.ndarray:
    """A_i = w_i (R_a,i - sum_j w_j R_a,j / sum_j w_j) + c (R_p,i - mean_j R_p,j); the first term is 0 when all w are 0.

    Source: paper.md, "Calibrated". Both terms sum to zero over the group. Leaving one out, j runs over the other episodes,
    the first term is 0 where they all have w = 0, and with unequal w it does not sum to zero. Divided, the first term is by
    the deviation of R_a under the weights w, the second by that of R_p.
    """
    term_G = weight_G * weighted_centred(answer_G, weight_G, baseline)
    process_term_G = centred(process_G, baseline)
    if divide_by_std:
        around_G = weighted_centred(answer_G, weight_G, "mean")
        variance = (weight_G * around_G**2).sum() / (weight_G.sum() or 1.0)
        term_G, process_term_G = term_G / (np.sqrt(variance) + STD_FLOOR), process_term_G / (process_G.std() + STD_FLOOR)
    return term_G + process_weight * process_term_G


def centred(reward_G: np.ndarray, baseline: Baseline) -> np.ndarray:
    """Minus the mean of the group, or of its other episodes; exactly zero where all are equal."""
    if np.all(reward_G == reward_G[0]):
        return np.zeros_like(reward_G)
    if baseline == "mean":
        return reward_G - reward_G.mean()
    return reward_G - (reward_G.sum() - reward_G) / (len(reward_G) - 1)


def weighted_centred(reward_G: np.ndarray, weight_G: np.ndarray, baseline: Baseline) -> np.ndarray:
    """Minus the mean under the weights, of the group or of its other episodes; zero where those weigh nothing, and exactly
    zero where all rewards are equal, whatever rounding does to the mean."""
    if np.all(reward_G == reward_G[0]) or not weight_G.any():
        return np.zeros_like(reward_G)
    if baseline == "mean":
        return reward_G - (weight_G * reward_G).sum() / weight_G.sum()
    # Summed, not subtracted from the whole: beside a weight of 1 the others may be products of many small fidelities.
    others_GG = 1.0 - np.eye(len(weight_G))
    summed_G, total_G = others_GG @ (weight_G * reward_G), others_GG @ weight_G
    return reward_G - np.divide(summed_G, total_G, out=reward_G.astype(float), where=total_G > 0)


def scale(advantage_N: np.ndarray, kl_coef: float) -> dict[str, float]:
    """{"advantage_rms": root mean square over a step's episodes, "kl_per_advantage": kl_coef in units of it; 0 where it is 0}"""
    rms = float(np.sqrt(np.mean(np.square(advantage_N)))) if len(advantage_N) else 0.0
    return {"advantage_rms": rms, "kl_per_advantage": kl_coef / rms if rms else 0.0}
