"""GRPO's loss against NumPy written from the formulas, option by option, and in every layout of its episodes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacherl_jax.config import Config, GrpoConfig, RolloutConfig
from cacherl_jax.data.packing import packed
from cacherl_jax.data.pipeline import Row, bucketed, collate
from cacherl_jax.train import step as steps
from cacherl_jax.train.aggregation import AGGREGATIONS
from cacherl_jax.train.losses import predicted
from cacherl_jax.train.policy_loss import grpo_loss

RNG = np.random.default_rng(0)
# ---- every option against NumPy --------------------------------------------------------------------------------------

LENGTHS = (5, 12, 9, 20, 3, 7)
STARTS = np.cumsum((0, *LENGTHS))
TABLE_N = -2 * RNG.random(STARTS[-1])  # the "policy": tokens are numbered, and this is the logprob of each
SPANS = list(itertools.pairwise(STARTS))
ROWS = [
    Row(
        tokens_T=np.arange(a, b, dtype=np.int32),
        mask_T=RNG.random(b - a) < 0.7,  # a first token among them, which nothing predicts
        advantage=float(RNG.normal()),
        behavior_logprobs_T=TABLE_N[a:b] + 0.3 * RNG.normal(size=b - a),
        ref_logprobs_T=TABLE_N[a:b] + 0.3 * RNG.normal(size=b - a),
        old_logprobs_T=TABLE_N[a:b] + 0.3 * RNG.normal(size=b - a),
    )
    for a, b in SPANS
]
BASE = GrpoConfig(prompts=2, group=3, clip_low=0.1, clip_high=0.2, kl_coef=0.7, importance_cap=1.2)
OPTIONS = {
    "as configured": {},
    "clip_low": {"clip_low": 0.3},
    "clip_high": {"clip_high": 0.4},
    "ratio": {"ratio": "sequence"},
    "kl_coef": {"kl_coef": 0.1},
    "k1": {"kl": "k1_in_reward"},
    "k2": {"kl": "k2"},
    "sequence_mean": {"aggregation": "sequence_mean"},
    "token_budget": {"aggregation": "token_budget"},
    "importance of sequences": {"importance": "sequence"},
    "no importance": {"importance": "none"},
    "importance_cap": {"importance_cap": 1.05},
    "beyond_cap": {"beyond_cap": "mask"},
    "GSPO": {"ratio": "sequence", "aggregation": "sequence_mean", "importance": "sequence", "beyond_cap": "mask"},
}
BUDGET = 40  # tokens that an episode may sample


def reference(table_N, grpo):
    """{"loss", and the metrics}, in float64, one token after the other."""
    tokens = [(i, t) for i, row in enumerate(ROWS) for t in range(1, len(row.mask_T)) if row.mask_T[t]]
    counts = [sum(i == j for j, _ in tokens) for i in range(len(ROWS))]
    sums = dict.fromkeys(("policy_loss", "kl", "clipped", "importance", "truncated"), 0.0)
    total = 0.0
    for i, t in tokens:
        row, new_T = ROWS[i], table_N[SPANS[i][0] : SPANS[i][1]]
        own = [s for j, s in tokens if j == i] if grpo.ratio == "sequence" else [t]
        ratio = np.exp(np.mean([new_T[s] - row.old_logprobs_T[s] for s in own]))
        drawn = {"token": [t], "sequence": [s for j, s in tokens if j == i], "none": []}[grpo.importance]
        importance = np.exp(sum(row.old_logprobs_T[s] - row.behavior_logprobs_T[s] for s in drawn))
        above, below = importance > grpo.importance_cap, importance < 1 / grpo.importance_cap
        if grpo.beyond_cap == "mask":
            weight, truncated = (0.0 if above or below else importance), above or below
        else:
            weight, truncated = (min(importance, grpo.importance_cap) if drawn else 1.0), above and bool(drawn)
        gap = row.ref_logprobs_T[t] - new_T[t]
        kl = {"k1_in_reward": -gap, "k2": gap**2 / 2, "k3": np.exp(gap) - gap - 1}[grpo.kl]
        advantage = row.advantage
        if grpo.kl == "k1_in_reward":
            advantage -= grpo.kl_coef * (row.old_logprobs_T[t] - row.ref_logprobs_T[t])
        inside = min(max(ratio, 1 - grpo.clip_low), 1 + grpo.clip_high)
        u = {"sequence_mean": 1 / counts[i]}.get(grpo.aggregation, 1.0)
        total += u
        values = (-weight * min(ratio * advantage, inside * advantage), kl, ratio != inside, weight, truncated)
        sums = {name: sums[name] + u * value for name, value in zip(sums, values, strict=True)}
    kl_term = 0.0 if grpo.kl == "k1_in_reward" else grpo.kl_coef * sums["kl"]
    over = grpo.prompts * grpo.group * BUDGET if grpo.aggregation == "token_budget" else total
    return {name: value / total for name, value in sums.items()} | {"loss": (sums["policy_loss"] + kl_term) / over}


def accumulated(batches, grpo, divisor):
    """Gradients by the table and metrics, as a step accumulates them over batches."""

    def gradients_of(table_N, _, batch, share):
        mask_BT = predicted(batch.loss_mask_BT, batch.segment_ids_BT)

        def loss(table_N):
            given = batch.behavior_logprobs_BT, batch.ref_logprobs_BT, mask_BT, batch.advantages_BT, batch.segment_ids_BT
            value, metrics = grpo_loss(table_N[batch.tokens_BT], *given, batch.old_logprobs_BT, grpo=grpo)
            return value, metrics | {"loss": value}

        gradient_N, metrics = jax.grad(loss, has_aux=True)(table_N)
        return *jax.tree.map(lambda x: share * x, (gradient_N, metrics)), table_N[batch.tokens_BT]

    on_device = [jax.tree.map(jnp.asarray, batch) for batch, _ in batches]
    return steps.accumulate(gradients_of, jnp.asarray(TABLE_N, jnp.float32), None, on_device, divisor)[:2]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_equals_numpy_whole_split_and_packed(options):
    grpo = dataclasses.replace(BASE, **options)
    config = Config(grpo=grpo, rollout=RolloutConfig(max_sampled_tokens=BUDGET))
    rows, divisor = AGGREGATIONS[grpo.aggregation](ROWS, config)
    expected = reference(TABLE_N, grpo)
    assert not options or expected["loss"] != pytest.approx(reference(TABLE_N, BASE)["loss"], rel=1e-3)
    eps, eye = 1e-6, np.eye(len(TABLE_N))
    sides = [[reference(TABLE_N + sign * eps * e, grpo)["loss"] for e in eye] for sign in (1, -1)]
    gradient_N = (np.array(sides[0]) - np.array(sides[1])) / (2 * eps)
    layouts = ([(collate(rows, 20, 6), [])], bucketed(rows, (8, 20), 20, 1), packed(rows, 24, 24, 1))
    assert len(layouts[1]) > 3 and len(layouts[2]) > 1
    for batches in layouts:
        found_N, metrics = accumulated(batches, grpo, divisor)
        assert {k: float(v) for k, v in metrics.items()} == pytest.approx(expected, rel=1e-4, abs=1e-6)
        np.testing.assert_allclose(found_N, gradient_N, atol=1e-5)
        outside = [
            a + t for (a, _), row in zip(SPANS, ROWS, strict=True) for t in range(len(row.mask_T)) if not t or not row.mask_T[t]
        ]
        assert not np.asarray(found_N)[outside].any()


# ---- what holds whatever the numbers ---------------------------------------------------------------------------------

B, T = 3, 11
MASK_BT = jnp.asarray(RNG.random((B, T)) < 0.5, jnp.float32).at[:, 0].set(0.0)
ONE_BT = jnp.ones((B, T), jnp.int32)  # a segment a row
LOSS = GrpoConfig(kl_coef=0.1)
SEQUENCES = dataclasses.replace(LOSS, ratio="sequence", importance="sequence", kl="k1_in_reward")


def arrays():
    """(logprobs, behavior, ref, old) and advantages_BT, each [B, T]."""
    logprobs, behavior, ref, old = (jnp.asarray(-RNG.random((B, T)) * 2, jnp.float32) for _ in range(4))
    return (logprobs, behavior, ref, old), jnp.asarray(RNG.normal(size=(B, T)), jnp.float32)


def loss_of(*args, **options):
    *given, grpo = args
    return grpo_loss(
        *given[:5], ONE_BT[: len(given[0]), : given[0].shape[1]], *given[5:], grpo=dataclasses.replace(grpo, **options)
    )


@pytest.mark.parametrize("grpo", [LOSS, SEQUENCES], ids=["tokens", "sequences"])
@pytest.mark.parametrize("poison", [0.0, -1e30, np.nan, np.inf])
def test_masked_tokens_have_exactly_zero_gradient(poison, grpo):
    (logprobs_BT, behavior_BT, ref_BT, old_BT), advantages_BT = arrays()
    injected_BT = MASK_BT == 0
    spoiled_BT = jnp.where(injected_BT, poison, logprobs_BT)

    others = [jnp.where(injected_BT, poison, x_BT) for x_BT in (behavior_BT, ref_BT, old_BT)]

    def first(x_BT):
        return loss_of(x_BT, *others[:2], MASK_BT, advantages_BT, grpo)[0]

    def later(x_BT):
        return loss_of(x_BT, *others[:2], MASK_BT, advantages_BT, others[2], grpo)[0]

    for loss in (first, later):
        gradient_BT = jax.grad(loss)(spoiled_BT)
        assert not gradient_BT[injected_BT].any() and np.isfinite(gradient_BT).all()
        assert gradient_BT[~injected_BT].any() and loss(spoiled_BT) == loss(logprobs_BT)


def test_equal_rewards_leave_only_the_kl():
    (logprobs_BT, behavior_BT, ref_BT, old_BT), _ = arrays()
    zero_BT = jnp.zeros((B, T))

    def loss(x_BT, kl_coef):
        return loss_of(x_BT, behavior_BT, ref_BT, MASK_BT, zero_BT, old_BT, LOSS, kl_coef=kl_coef)[0]

    assert loss(logprobs_BT, 0.0) == 0 and not jax.grad(loss)(logprobs_BT, 0.0).any()
    assert jax.grad(loss)(logprobs_BT, 1.0).any()


def test_where_sampler_and_trainer_agree_the_weight_is_exactly_one():
    """The policy's gradient is then that of GRPO without weights: -A/n at each token, before any update."""
    (logprobs_BT, _, ref_BT, _), advantages_BT = arrays()

    def of(x_BT):
        return loss_of(x_BT, logprobs_BT, ref_BT, MASK_BT, advantages_BT, LOSS, kl_coef=0.0)[0]

    loss, gradient_BT = jax.value_and_grad(of)(logprobs_BT)
    expected_BT = -np.asarray(MASK_BT) * np.asarray(advantages_BT) / np.asarray(MASK_BT).sum()
    np.testing.assert_allclose(gradient_BT, expected_BT, rtol=1e-6)
    assert loss == pytest.approx(expected_BT.sum(), rel=1e-5)


def test_weights_remove_the_bias_of_drawing_from_another_distribution():
    """Tokens drawn from mu, the policy pi is to be improved: the expected gradient, all tokens of a small vocabulary taken
    with their probability under mu, is that of pi's mean advantage. Without weights it is not; a cap keeps a bounded part."""
    rng = np.random.default_rng(2)  # how much of the bias a cap leaves depends on the draw: here the median, a quarter
    pi_logits_V, mu_logits_V, advantages_V = (jnp.asarray(rng.normal(size=5), jnp.float32) for _ in range(3))
    mu_V, tokens_V = jax.nn.softmax(mu_logits_V), jnp.arange(5)

    def expected_gradient(behavior_logits_V, cap):
        behavior_V = jax.nn.log_softmax(behavior_logits_V)

        def loss(logits_V, token):  # of one row whose second token was sampled
            row_BT = jnp.stack([jnp.zeros(()), jax.nn.log_softmax(logits_V)[token]])[None]
            drawn_BT = jnp.stack([jnp.zeros(()), behavior_V[token]])[None]
            mask_BT, advantages_BT = jnp.float32([[0, 1]]), jnp.full((1, 2), advantages_V[token])
            return loss_of(row_BT, drawn_BT, row_BT, mask_BT, advantages_BT, LOSS, kl_coef=0.0, importance_cap=cap)[0]

        return mu_V @ jax.vmap(jax.grad(loss), in_axes=(None, 0))(pi_logits_V, tokens_V)

    pi_V = np.asarray(jax.nn.softmax(pi_logits_V), np.float64)
    true_V = -pi_V * (np.asarray(advantages_V) - pi_V @ np.asarray(advantages_V))  # of -sum pi A, by hand
    np.testing.assert_allclose(expected_gradient(mu_logits_V, 1e9), true_V, atol=1e-6)
    unweighted = np.abs(expected_gradient(pi_logits_V, 1e9) - true_V).max()
    assert unweighted > 0.05
    assert np.abs(expected_gradient(mu_logits_V, 2.0) - true_V).max() < 0.5 * unweighted


def test_a_planted_disagreement_stops_at_the_cap_or_is_dropped():
    (logprobs_BT, _, ref_BT, _), advantages_BT = arrays()
    _, metrics = loss_of(logprobs_BT, logprobs_BT - 1.5, ref_BT, MASK_BT, advantages_BT, LOSS)
    assert metrics["importance"] == pytest.approx(2.0) and metrics["truncated"] == 1.0  # exp(1.5) is 4.5
    _, metrics = loss_of(logprobs_BT, logprobs_BT + 1.5, ref_BT, MASK_BT, advantages_BT, LOSS)
    assert metrics["importance"] == pytest.approx(np.exp(-1.5), rel=1e-5) and metrics["truncated"] == 0.0
    for shift in (1.5, -1.5):
        loss, metrics = loss_of(
            logprobs_BT, logprobs_BT - shift, ref_BT, MASK_BT, advantages_BT, LOSS, kl_coef=0.0, beyond_cap="mask"
        )
        assert loss == metrics["importance"] == 0 and metrics["truncated"] == 1.0
