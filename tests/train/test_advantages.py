"""Advantages against their formulas, one episode after the other, in every combination of options."""

import itertools

import numpy as np
import pytest

from cacherl_jax.config import GrpoConfig
from cacherl_jax.train.advantages import advantages, scale


def reference(grpo, tier, answer, process, weight, shaping):
    def others(i):
        return [j for j in range(len(answer)) if j != i or grpo.baseline == "mean"]

    def deviation(values):
        return np.std(values) + 1e-4 if grpo.divide_by_std else 1.0

    found = []
    for i in range(len(answer)):
        if tier != "calibrated":
            rewards = [a * w + p * (1 - w) + s for a, p, w, s in zip(answer, process, weight, shaping, strict=True)]
            found.append((rewards[i] - np.mean([rewards[j] for j in others(i)])) / deviation(rewards))
            continue
        total = sum(weight[j] for j in others(i))
        mean = sum(weight[j] * answer[j] for j in others(i)) / total if total else answer[i]
        spread = 1.0
        if grpo.divide_by_std:
            middle = np.average(answer, weights=weight)
            spread = np.sqrt(np.average((np.array(answer) - middle) ** 2, weights=weight)) + 1e-4
        term = weight[i] * (answer[i] - mean) / spread
        term += grpo.process_weight * (process[i] - np.mean([process[j] for j in others(i)])) / deviation(process)
        found.append(term + shaping[i] - np.mean([shaping[j] for j in others(i)]))
    return found


@pytest.mark.parametrize("tier", ["none", "paper", "calibrated"])
def test_every_combination_equals_its_formula_and_differs_from_the_others(tier):
    rng = np.random.default_rng(3)
    answer, process, shaping = rng.random(6), rng.random(6), np.array([0, 0, -0.5, 0, 0, -0.2])
    seen = []
    for baseline, divide, weight in itertools.product(
        ("mean", "leave_one_out"), (False, True), (np.array([0.6, 0.3, 0.1, 0, 1, 0.6]), np.array([0, 0, 0.5, 0, 0, 0]))
    ):
        grpo = GrpoConfig(baseline=baseline, divide_by_std=divide, process_weight=0.4)
        found = advantages(grpo, tier, answer, process, weight, shaping)
        np.testing.assert_allclose(found, reference(grpo, tier, answer, process, weight, shaping), atol=1e-12)
        assert all(np.abs(found - other).max() > 1e-3 for other in seen)
        seen.append(found)
        if tier != "calibrated" or baseline == "mean":
            assert abs(found.sum()) < 1e-12
        for equal in (np.full(6, 0.1), np.full(6, 0.9)):  # whose mean, plain or weighted, rounds to another number
            assert not advantages(grpo, tier, equal, equal, weight if tier == "calibrated" else equal).any()
            assert advantages(grpo, tier, equal, equal, equal, shaping).any()
    small = np.array([0, 1, 1e-16, 2e-16, 0, 0])  # products of fidelities, lost in a sum with 1
    grpo = GrpoConfig(baseline="leave_one_out")
    found = advantages(grpo, tier, answer, process, small, shaping)
    np.testing.assert_allclose(found, reference(grpo, tier, answer, process, small, shaping), atol=1e-12)


def test_the_size_of_advantages_says_what_the_kl_coefficient_means():
    assert scale(np.array([0.3, -0.3, 0.3]), 0.15) == pytest.approx({"advantage_rms": 0.3, "kl_per_advantage": 0.5})
    assert scale(np.zeros(2), 0.15) == scale(np.zeros(0), 0.15) == {"advantage_rms": 0.0, "kl_per_advantage": 0.0}
