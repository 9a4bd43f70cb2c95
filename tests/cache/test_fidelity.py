"""Fidelity: fitted probabilities against known ones, what stands in for them, and how a store learns them from itself."""

import json
import math
import random

import numpy as np
import pytest

from cacherl_jax.cache import fidelity, fit
from cacherl_jax.cache.entries import Recording
from cacherl_jax.cache.fidelity import Evidence, Fidelity, Judged
from cacherl_jax.cache.key import call_key
from cacherl_jax.cache.lookup import CachedTools
from cacherl_jax.cache.store import MemoryStore
from cacherl_jax.config import CacheConfig
from cacherl_jax.types import Kind, Tier, ToolCall, ToolResult

CONFIG = CacheConfig()


def known(tool, tier, score):
    """The probabilities of the synthetic answers: by tool, and growing with the similarity."""
    logit = -3 + 0.4 * tool + (2.5 if tier is Tier.EXACT else 4 * score - 3)
    return 1 / (1 + math.exp(-logit))


def answers(n, seed):
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        tool = min(rng.randrange(12), rng.randrange(12))
        tier = rng.choice((Tier.EXACT, Tier.FUZZY))
        score = 1.0 if tier is Tier.EXACT else rng.uniform(0.5, 1)
        p = known(tool, tier, score)
        rows.append((Judged(Evidence(f"tool {tool}", tier, score, 1, 0, False), rng.random() < p, f"d{i // 3}"), p))
    return rows


def test_estimates_are_calibrated_and_better_than_one_number_a_tier():
    fitted = fidelity.fit([j for j, _ in answers(4000, 0)])
    fresh = answers(6000, 1)
    predicted = [fitted.probability(j.evidence) for j, _ in fresh]
    right = [j.right for j, _ in fresh]
    assert np.mean([abs(a - p) for a, (_, p) in zip(predicted, fresh, strict=True)]) < 0.03
    assert abs(fidelity.slope(fidelity.bins(predicted, right)) - 1) < 0.08
    share = {t: np.mean([j.right for j, _ in fresh if j.evidence.tier is t]) for t in (Tier.EXACT, Tier.FUZZY)}
    assert fidelity.brier(predicted, right) < fidelity.brier([share[j.evidence.tier] for j, _ in fresh], right) - 0.02


def test_a_tool_seen_twice_is_near_its_tier_and_one_seen_often_is_not():
    often = [Judged(Evidence("often", Tier.EXACT, 1.0, 1, 0, False), False, f"o{i}") for i in range(300)]
    tools = [Judged(Evidence(f"t{i % 20}", Tier.EXACT, 1.0, 1, 0, False), i % 9 > 0, f"t{i}") for i in range(600)]
    rare = [Judged(Evidence("rare", Tier.EXACT, 1.0, 1, 0, False), False, f"r{i}") for i in range(2)]
    fitted = fidelity.fit(often + tools + rare)

    def of(tool):
        return fitted.probability(Evidence(tool, Tier.EXACT, 1.0, 1, 0, False))

    assert of("often") < 0.02 < 0.15 < of("rare") < of("t1") and of("t1") > 0.8
    assert of("rare") < of("never seen") < of("t1")


def test_the_fit_is_the_mode_of_its_posterior():
    """Against a plain Python loss: no small step in any direction makes it smaller."""
    rng = random.Random(0)
    x = [[1.0, rng.random(), float(i % 3 == 0), float(i % 3 == 1), float(i % 3 == 2)] for i in range(60)]
    y = [float(rng.random() < 0.3 + 0.4 * row[1]) for row in x]
    precision = [0.25, 0.25, 2.0, 2.0, 2.0]
    beta, covariance = fidelity._newton(np.array(x), np.array(y), np.array(precision), np.zeros(5))

    def loss(b):
        z = [sum(i * j for i, j in zip(row, b, strict=True)) for row in x]
        data = sum(math.log(1 + math.exp(s)) - t * s for s, t in zip(z, y, strict=True))
        return data + sum(p * v * v for p, v in zip(precision, b, strict=True)) / 2

    best = loss(beta)
    for k in range(5):
        for step in (-1e-3, 1e-3):
            assert loss([v + step * (i == k) for i, v in enumerate(beta)]) > best
    assert np.all(np.linalg.eigvalsh(covariance) > 0)


def test_order_and_json_change_nothing():
    rows = [j for j, _ in answers(800, 2)]
    fitted = fidelity.fit(rows)
    assert fidelity.fit(random.Random(0).sample(rows, len(rows))) == fitted
    assert Fidelity.from_json(json.loads(json.dumps(fitted.to_json()))) == fitted


def test_the_table_stands_in_and_simulated_results_are_no_truth():
    few = fidelity.fit([j for j, _ in answers(30, 0)][: fidelity.MIN_ANSWERS - 1])
    exact = Evidence("t", Tier.EXACT, 1.0, 3, 0, False)
    assert few.weights == {}
    for fitted in (None, few):
        assert fidelity.estimate(fitted, CONFIG, exact, Kind.RECORDED) == CONFIG.fidelity_exact
    fitted = fidelity.fit([j for j, _ in answers(800, 0)])
    assert 0 < fidelity.estimate(fitted, CONFIG, exact, Kind.RECORDED) < 1
    assert fidelity.estimate(fitted, CONFIG, exact, Kind.SIMULATED) == CONFIG.fidelity_best_effort
    assert fidelity.estimate(fitted, CacheConfig(fidelity="table"), exact, Kind.RECORDED) == CONFIG.fidelity_exact


def test_bins_and_slope_by_hand():
    predicted, right = [0.1, 0.9, 0.2, 0.8], [False, True, False, False]
    assert fidelity.bins(predicted, right, 2) == [(pytest.approx(0.15), 0.0, 2), (pytest.approx(0.85), 0.5, 2)]
    assert fidelity.slope(fidelity.bins(predicted, right, 2)) == pytest.approx(0.5 / 0.7)
    assert fidelity.slope(fidelity.bins([0.5, 0.5], [True, False], 2)) is None
    assert fidelity.brier(predicted, right) == pytest.approx((0.01 + 0.01 + 0.04 + 0.64) / 4)


# ---- a store learns about itself -------------------------------------------------------------------------------------


def recording(tool, n, result, episode, kind=Kind.RECORDED):
    call = ToolCall.of(tool, n=n)
    return Recording(call_key(call, None, "state"), tool, f'{{"n":{n}}}', "", ToolResult(result), episode, kind)


@pytest.fixture(scope="module")
def recorded():
    rng = random.Random(0)
    rows = []
    for i in range(300):
        n = rng.randrange(8)
        rows += [recording("steady", n, f"r{n}", f"d{i}"), recording("coin", n, rng.choice(("heads", "tails")), f"d{i}")]
    return rows


def filled(rows):
    store = MemoryStore()
    for r in rows:
        store.add(r)
    return store


def test_answers_carry_what_other_dialogues_say_of_their_tool(recorded):
    store = filled(recorded)
    fitted = fit.fit(store, {}, CONFIG)
    assert store.metadata() == {}  # nothing is written by fitting
    assert fitted.answers == 600
    fit.write(store, fitted)
    cache = CachedTools(store, {}, CONFIG, seed=0)
    steady = cache.answer(ToolCall.of("steady", n=3), [], "x")
    coin = cache.answer(ToolCall.of("coin", n=3), [], "x")
    near = cache.answer(ToolCall.of("coin", n=99), [], "x")
    assert (steady.tier, coin.tier, near.tier) == (Tier.EXACT, Tier.EXACT, Tier.BEST_EFFORT)
    assert steady.fidelity > 0.95 and 0.4 < coin.fidelity < 0.6
    assert near.fidelity == CONFIG.fidelity_best_effort  # no held-out call was answered so


def test_simulated_recordings_teach_nothing(recorded):
    made_up = [recording("steady", r.arguments, "made up", f"s{i}", Kind.SIMULATED) for i, r in enumerate(recorded)]
    assert fit.fit(filled(recorded + made_up), {}, CONFIG) == fit.fit(filled(recorded), {}, CONFIG)


def test_no_dialogue_is_judged_by_itself():
    """Every dialogue asks twice what no other asks, and gets one answer: nothing is known of other dialogues' calls."""
    rows = [recording("own", i, f"r{i}", f"d{i}") for i in range(100) for _ in range(2)]
    judged = list(fit.crossfit(rows, {}, CONFIG))
    assert len(judged) == 200 and not any(j.right for j in judged)
    assert {j.evidence.tier for j in judged} == {Tier.BEST_EFFORT}


def test_a_rule_that_folds_are_too_small_for_does_not_flatter_a_lower_tier():
    """34 dialogues certify that the number does not matter, 27 cannot: held-out calls would count for the nearest call."""
    rows = [recording("same", i, "r", f"d{i}") for i in range(34)]
    fitted = fit.fit(filled(rows), {}, CONFIG)
    assert len(fitted.rules) == 1 and fitted.answers == 0
    assert {(j.evidence.tier, j.right) for j in fit.crossfit(rows, {}, CONFIG)} == {(Tier.BEST_EFFORT, True)}
