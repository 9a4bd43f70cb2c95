"""Advantages of one group of rollouts of one task. Plain NumPy: a group has a few dozen numbers."""

from __future__ import annotations

from typing import Literal

import numpy as np

STD_FLOOR = 1e-4  # added to the group's standard deviation in the paper's form


def advantages(
    kind: Literal["paper", "calibrated"],
    answer_G: np.ndarray,
    process_G: np.ndarray,
    weight_G: np.ndarray,
    *,
    process_weight: float,
) -> np.ndarray:
    """A_G by the named rule. For "paper", weight_G is the answer's weight a; `process_weight` is used by "calibrated"."""
    if kind == "paper":
        return paper(answer_G, process_G, weight_G)
    return calibrated(answer_G, process_G, weight_G, process_weight=process_weight)


def paper(answer_G: np.ndarray, process_G: np.ndarray, weight_G: np.ndarray) -> np.ndarray:
    """GRPO on the paper's reward: R = a R_answer + (1 - a) R_process, centred and divided by the group's deviation.

    Pays a rollout for missing the cache when process rewards exceed answer rewards (paper.md, flaw 1).
    """
    reward_G = weight_G * answer_G + (1.0 - weight_G) * process_G
    centred_G = _centred(reward_G)
    return centred_G / (reward_G.std() + STD_FLOOR)


def calibrated(answer_G: np.ndarray, process_G: np.ndarray, weight_G: np.ndarray, *, process_weight: float) -> np.ndarray:
    """A_i = w_i (R_a,i - sum_j w_j R_a,j / sum_j w_j) + c (R_p,i - mean_j R_p,j); the first term is 0 when all w are 0.

    Both terms sum to zero over the group. No division by a standard deviation. Source: paper.md, "Calibrated".
    """
    total = weight_G.sum()
    if total == 0:
        answer_term_G = np.zeros_like(answer_G)
    elif np.all(answer_G == answer_G[0]):
        answer_term_G = np.zeros_like(answer_G)  # exactly, whatever rounding does to the weighted mean
    else:
        answer_term_G = weight_G * (answer_G - (weight_G * answer_G).sum() / total)
    return answer_term_G + process_weight * _centred(process_G)


def _centred(reward_G: np.ndarray) -> np.ndarray:
    """Minus the mean; exactly zero where all are equal."""
    return np.zeros_like(reward_G) if np.all(reward_G == reward_G[0]) else reward_G - reward_G.mean()
