"""How far an answer can be trusted: the probability that it equals the tool's true result.

A logistic model of what is known when an answer is served: its tier, its similarity, how many recordings say the same and
how many say otherwise, whether the call writes, and the tool. Effects of a tool within a tier are shrunk towards the tier's
by a normal prior whose variance is estimated together with them (empirical Bayes by Laplace's approximation: the variance
is the mean of squared effects plus their posterior variances). Fitted on answers to calls of held-out dialogues.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cacherl_jax.config import CacheConfig
from cacherl_jax.types import Kind, Tier

FITTED = (Tier.EXACT, Tier.ADAPTED, Tier.FUZZY, Tier.BEST_EFFORT)
MIN_ANSWERS = 20  # of a tier, below which the table stands in for it
FEATURES = 7
MAIN_VARIANCE = 4.0  # of the prior of effects that are no tool's: weak, it keeps a tier without failures finite
ROUNDS = 8
LIMIT = 1e-3  # no answer of a fitted tier is certain


@dataclass(frozen=True)
class Evidence:
    """What is known of an answer. score: similarity in [0, 1]. agreeing, conflicting: recordings (of the adapted tier,
    stored calls) that say the same and otherwise. rule: expected precision of the rule used, else 0."""

    tool: str
    tier: Tier
    score: float
    agreeing: int
    conflicting: int
    writes: bool
    rule: float = 0.0


@dataclass(frozen=True)
class Judged:
    """An answer to a held-out call, and whether it was right."""

    evidence: Evidence
    right: bool
    episode: str


@dataclass(frozen=True)
class Fidelity:
    """A fitted model. weights: by tier, one a feature. tools: by tier, the tools' effects. variances: of these, by tier."""

    weights: Mapping[str, Sequence[float]]
    tools: Mapping[str, Mapping[str, float]]
    variances: Mapping[str, float]

    def probability(self, evidence: Evidence) -> float | None:
        """In (0, 1); None for a tier on which nothing was fitted."""
        weights = self.weights.get(evidence.tier.value)
        if weights is None:
            return None
        logit = float(np.dot(weights, features(evidence))) + self.tools[evidence.tier.value].get(evidence.tool, 0.0)
        return min(1.0 - LIMIT, max(LIMIT, 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, logit))))))

    def to_json(self) -> dict[str, Any]:
        return {
            "weights": {tier: list(w) for tier, w in self.weights.items()},
            "tools": {tier: dict(effects) for tier, effects in self.tools.items()},
            "variances": dict(self.variances),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fidelity:
        return cls(data["weights"], data["tools"], data["variances"])


def table(config: CacheConfig, tier: Tier) -> float:
    """The configuration's value of a tier."""
    return {
        Tier.EXACT: config.fidelity_exact,
        Tier.ADAPTED: config.fidelity_adapted,
        Tier.FUZZY: config.fidelity_fuzzy,
        Tier.BEST_EFFORT: config.fidelity_best_effort,
        Tier.MISS: config.fidelity_miss,
    }.get(tier, 1.0)


def estimate(fitted: Fidelity | None, config: CacheConfig, evidence: Evidence, kind: Kind) -> float:
    """The fidelity of an answer: fitted where possible, else the table's. A simulated result is no recorded truth and gets
    at most what the best effort gets."""
    if kind is Kind.SIMULATED:
        return min(table(config, evidence.tier), config.fidelity_best_effort)
    probability = fitted.probability(evidence) if fitted is not None and config.fidelity == "fitted" else None
    return table(config, evidence.tier) if probability is None else probability


def features(evidence: Evidence) -> np.ndarray:
    """[FEATURES], all of order one."""
    agreement = math.log((evidence.agreeing + 0.5) / (evidence.conflicting + 0.5))
    rule = min(0.999, max(0.001, evidence.rule)) if evidence.rule else 0.5
    return np.array(
        [
            1.0,
            evidence.score,
            evidence.score**4,  # the nearest calls count apart
            agreement,
            math.log1p(evidence.conflicting),
            float(evidence.writes),
            math.log(rule / (1.0 - rule)) / 2.0,
        ]
    )


def fit(judged: Sequence[Judged]) -> Fidelity:
    """Fits each tier by itself; a tier with fewer than MIN_ANSWERS answers is left out."""
    weights, tools, variances = {}, {}, {}
    for tier in FITTED:
        rows = [j for j in judged if j.evidence.tier is tier]
        if len(rows) >= MIN_ANSWERS:
            weights[tier.value], tools[tier.value], variances[tier.value] = _fit_tier(rows)
    return Fidelity(weights, tools, variances)


def _fit_tier(rows: Sequence[Judged]) -> tuple[list[float], dict[str, float], float]:
    # Sorted, so that sums do not depend on the order of the recordings; rounded, so that the last bits of another machine
    # do not change what a snapshot is called.
    rows = sorted(rows, key=lambda j: (j.evidence.tool, j.episode, repr(j.evidence), j.right))
    names = sorted({j.evidence.tool for j in rows})
    column = {name: FEATURES + i for i, name in enumerate(names)}
    x_NP = np.zeros((len(rows), FEATURES + len(names)))
    for i, row in enumerate(rows):
        x_NP[i, :FEATURES] = features(row.evidence)
        x_NP[i, column[row.evidence.tool]] = 1.0
    y_N = np.array([j.right for j in rows], np.float64)
    beta_P = np.zeros(x_NP.shape[1])
    variance = 1.0
    for _ in range(ROUNDS):
        precision_P = np.full(len(beta_P), 1.0 / variance)
        precision_P[:FEATURES] = 1.0 / MAIN_VARIANCE
        beta_P, covariance_PP = _newton(x_NP, y_N, precision_P, beta_P)
        effects, spread = beta_P[FEATURES:], np.diag(covariance_PP)[FEATURES:]
        variance = min(25.0, max(0.01, float(np.mean(effects**2 + spread))))
    effects = {name: round(float(beta_P[column[name]]), 4) for name in names}
    return [round(float(b), 4) for b in beta_P[:FEATURES]], effects, round(variance, 4)


def _newton(x_NP: np.ndarray, y_N: np.ndarray, precision_P: np.ndarray, beta_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mode of a logistic model with a normal prior, and the inverse Hessian there. Steps are halved until they help."""

    def loss(beta: np.ndarray) -> float:
        z_N = x_NP @ beta
        return float(np.sum(np.logaddexp(0.0, z_N) - y_N * z_N) + 0.5 * np.sum(precision_P * beta**2))

    for _ in range(30):
        p_N = 1.0 / (1.0 + np.exp(-np.clip(x_NP @ beta_P, -30, 30)))
        gradient_P = x_NP.T @ (p_N - y_N) + precision_P * beta_P
        hessian_PP = x_NP.T @ (x_NP * (p_N * (1 - p_N))[:, None]) + np.diag(precision_P)
        step_P = np.linalg.solve(hessian_PP, gradient_P)
        before, size = loss(beta_P), 1.0
        while size > 1e-4 and loss(beta_P - size * step_P) > before:
            size /= 2
        beta_P = beta_P - size * step_P
        if np.max(np.abs(step_P)) < 1e-5:
            break
    return beta_P, np.linalg.inv(hessian_PP)


# ---- how good the estimates are --------------------------------------------------------------------------------------


def brier(predicted: Sequence[float] | np.ndarray, right: Sequence[bool] | np.ndarray) -> float:
    """Mean squared error of probabilities."""
    return float(np.mean((np.asarray(predicted, np.float64) - np.asarray(right, np.float64)) ** 2))


def bins(
    predicted: Sequence[float] | np.ndarray, right: Sequence[bool] | np.ndarray, count: int = 10
) -> list[tuple[float, float, int]]:
    """(mean predicted, share right, size) of `count` bins of equal mass, from the least to the most trusted."""
    order = np.argsort(np.asarray(predicted, np.float64), kind="stable")
    parts = [part for part in np.array_split(order, count) if len(part)]
    p, y = np.asarray(predicted, np.float64), np.asarray(right, np.float64)
    return [(float(p[part].mean()), float(y[part].mean()), len(part)) for part in parts]


def slope(binned: Sequence[tuple[float, float, int]]) -> float | None:
    """Least-squares slope of the share right on the mean predicted, weighted by size; 1 for a calibrated estimate. None
    where all predictions are equal."""
    x, y, n = (np.array(column, np.float64) for column in zip(*binned, strict=True))
    x_mean, y_mean = np.average(x, weights=n), np.average(y, weights=n)
    spread = float(np.sum(n * (x - x_mean) ** 2))
    return float(np.sum(n * (x - x_mean) * (y - y_mean)) / spread) if spread > 0 else None
