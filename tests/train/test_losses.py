"""Losses against plain NumPy; what is masked has no influence at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacherl_jax.train.agreement import gaps
from cacherl_jax.train.losses import grpo_loss, sft_loss, token_logprobs

B, T, D, V = 3, 11, 8, 23
RNG = np.random.default_rng(0)
HIDDEN_BTD = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
UNEMBED_VD = jnp.asarray(RNG.normal(size=(V, D)), jnp.float32)
TOKENS_BT = jnp.asarray(RNG.integers(0, V, (B, T)), jnp.int32)
MASK_BT = jnp.asarray(RNG.random((B, T)) < 0.5, jnp.float32).at[:, 0].set(0.0)


@pytest.mark.parametrize("chunk", [7, 30, 1000])
def test_token_logprobs_equal_full_softmax_in_any_chunk(chunk):
    logits_BTV = np.einsum("BTD,VD->BTV", HIDDEN_BTD, UNEMBED_VD).astype(np.float64)
    all_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    logprobs_BT, entropy_BT = token_logprobs(HIDDEN_BTD, UNEMBED_VD, TOKENS_BT, chunk=chunk, entropy=True)
    for b in range(B):
        for t in range(1, T):
            assert logprobs_BT[b, t] == pytest.approx(all_BTV[b, t - 1, TOKENS_BT[b, t]], abs=1e-5)
            assert entropy_BT[b, t] == pytest.approx(-(np.exp(all_BTV[b, t - 1]) * all_BTV[b, t - 1]).sum(), abs=1e-4)
    assert not logprobs_BT[:, 0].any() and not entropy_BT[:, 0].any()

    def ours(hidden_BTD, unembed_VD):
        return token_logprobs(hidden_BTD, unembed_VD, TOKENS_BT, chunk=chunk)[0].sum()

    def full(hidden_BTD, unembed_VD):
        all_BTV = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", hidden_BTD, unembed_VD)[:, :-1])
        return jnp.take_along_axis(all_BTV, TOKENS_BT[:, 1:, None], axis=-1).sum()

    expected = jax.grad(full, argnums=(0, 1))(HIDDEN_BTD, UNEMBED_VD)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jax.grad(ours, argnums=(0, 1))(HIDDEN_BTD, UNEMBED_VD), expected
    )


def arrays():
    """(logprobs, behavior, ref, old) and advantages_BT, each [B, T]."""
    logprobs, behavior, ref, old = (jnp.asarray(-RNG.random((B, T)) * 2, jnp.float32) for _ in range(4))
    return (logprobs, behavior, ref, old), jnp.asarray(RNG.normal(size=(B, T)), jnp.float32)


LOSS = {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.1, "importance_cap": 2.0}


@pytest.mark.parametrize("first_update", [True, False])
def test_grpo_loss_equals_numpy_term_by_term(first_update):
    (logprobs_BT, behavior_BT, ref_BT, old_BT), advantages_BT = arrays()
    loss, metrics = grpo_loss(
        logprobs_BT, behavior_BT, ref_BT, MASK_BT, advantages_BT, None if first_update else old_BT,
        clip_low=0.1, clip_high=0.3, kl_coef=0.7, importance_cap=1.2,
    )  # fmt: skip
    old_BT = logprobs_BT if first_update else old_BT
    policy, kl, clipped, weights, truncated, n = 0.0, 0.0, 0, 0.0, 0, 0
    for b in range(B):
        for t in range(1, T):
            if MASK_BT[b, t]:
                ratio = float(np.exp(logprobs_BT[b, t] - old_BT[b, t]))
                inside = min(max(ratio, 0.9), 1.3)
                importance = float(np.exp(old_BT[b, t] - behavior_BT[b, t]))
                weight = min(importance, 1.2)
                policy -= weight * min(ratio * float(advantages_BT[b, t]), inside * float(advantages_BT[b, t]))
                weights += weight
                truncated += importance > 1.2
                gap = float(ref_BT[b, t] - logprobs_BT[b, t])
                kl += np.exp(gap) - gap - 1
                clipped += ratio != inside
                n += 1
    assert metrics["policy_loss"] == pytest.approx(policy / n, rel=1e-5)
    assert metrics["kl"] == pytest.approx(kl / n, rel=1e-5)
    assert metrics["clipped"] == pytest.approx(clipped / n) and (clipped == 0) == first_update
    assert metrics["importance"] == pytest.approx(weights / n, rel=1e-5)
    assert metrics["truncated"] == pytest.approx(truncated / n) and 0 < truncated < n
    assert loss == pytest.approx(policy / n + 0.7 * kl / n, rel=1e-5)


@pytest.mark.parametrize("poison", [0.0, -1e30, np.nan, np.inf])
def test_masked_tokens_have_exactly_zero_gradient(poison):
    (logprobs_BT, behavior_BT, ref_BT, old_BT), advantages_BT = arrays()
    injected_BT = MASK_BT == 0
    spoiled_BT = jnp.where(injected_BT, poison, logprobs_BT)

    others = [jnp.where(injected_BT, poison, x_BT) for x_BT in (behavior_BT, ref_BT, old_BT)]

    def first(x_BT):
        return grpo_loss(x_BT, *others[:2], MASK_BT, advantages_BT, **LOSS)[0]

    def later(x_BT):
        return grpo_loss(x_BT, *others[:2], MASK_BT, advantages_BT, others[2], **LOSS)[0]

    for loss in (first, later, lambda x_BT: sft_loss(x_BT, MASK_BT)[0]):
        gradient_BT = jax.grad(loss)(spoiled_BT)
        assert not gradient_BT[injected_BT].any() and np.isfinite(gradient_BT).all()
        assert gradient_BT[~injected_BT].any() and loss(spoiled_BT) == loss(logprobs_BT)


def test_equal_rewards_leave_only_the_kl():
    (logprobs_BT, behavior_BT, ref_BT, old_BT), _ = arrays()
    zero_BT = jnp.zeros((B, T))

    def loss(x_BT, kl_coef):
        return grpo_loss(x_BT, behavior_BT, ref_BT, MASK_BT, zero_BT, old_BT, **LOSS | {"kl_coef": kl_coef})[0]

    assert loss(logprobs_BT, 0.0) == 0 and not jax.grad(loss)(logprobs_BT, 0.0).any()
    assert jax.grad(loss)(logprobs_BT, 1.0).any()


def test_where_sampler_and_trainer_agree_the_weight_is_exactly_one():
    """The policy's gradient is then that of GRPO without weights: -A/n at each token, before any update."""
    (logprobs_BT, _, ref_BT, _), advantages_BT = arrays()
    options = LOSS | {"kl_coef": 0.0}
    loss, gradient_BT = jax.value_and_grad(lambda x: grpo_loss(x, logprobs_BT, ref_BT, MASK_BT, advantages_BT, **options)[0])(
        logprobs_BT
    )
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
            options = LOSS | {"kl_coef": 0.0, "importance_cap": cap}
            return grpo_loss(row_BT, drawn_BT, row_BT, jnp.float32([[0, 1]]), jnp.full((1, 2), advantages_V[token]), **options)[0]

        return mu_V @ jax.vmap(jax.grad(loss), in_axes=(None, 0))(pi_logits_V, tokens_V)

    pi_V = np.asarray(jax.nn.softmax(pi_logits_V), np.float64)
    true_V = -pi_V * (np.asarray(advantages_V) - pi_V @ np.asarray(advantages_V))  # of -sum pi A, by hand
    np.testing.assert_allclose(expected_gradient(mu_logits_V, 1e9), true_V, atol=1e-6)
    unweighted = np.abs(expected_gradient(pi_logits_V, 1e9) - true_V).max()
    assert unweighted > 0.05
    assert np.abs(expected_gradient(mu_logits_V, 2.0) - true_V).max() < 0.5 * unweighted


def test_a_planted_disagreement_is_seen_where_it_is_and_its_weight_stops_at_the_cap():
    lengths, start = (300, 150, 90), 130
    trainer = [-RNG.random(n).astype(np.float32) for n in lengths]
    sampled = [RNG.random(n) < 0.5 for n in lengths]
    signs = np.float32([1.5, -1.5, 1.5])
    shifted = [x + np.where(np.arange(len(x)) >= start, sign, 0) for x, sign in zip(trainer, signs, strict=True)]
    shifted[0][sampled[0].argmin()] = -50.0  # an injected token has no logprob: no gap, whatever stands there
    clean, seen = gaps(trainer, trainer, sampled), gaps(shifted, trainer, sampled)
    assert clean["mean"] == clean["max"] == 0 and list(clean["by_position"]) == ["0-63", "64-127", "128-255", "256-511"]
    late = sum(int(m[start:].sum()) for m in sampled)
    assert seen["max"] == pytest.approx(1.5) and seen["mean"] == pytest.approx(1.5 * late / sum(m.sum() for m in sampled))
    by_position = {name: values["max"] for name, values in seen["by_position"].items()}
    assert by_position == pytest.approx({"0-63": 0, "64-127": 0, "128-255": 1.5, "256-511": 1.5}, abs=1e-6)
    assert seen["by_position"]["256-511"]["mean"] == pytest.approx(1.5)
    assert gaps([], [], []) == {"mean": 0.0, "max": 0.0, "by_position": {}}

    (logprobs_BT, _, ref_BT, _), advantages_BT = arrays()
    _, metrics = grpo_loss(logprobs_BT, logprobs_BT - 1.5, ref_BT, MASK_BT, advantages_BT, **LOSS)
    assert metrics["importance"] == pytest.approx(2.0) and metrics["truncated"] == 1.0  # exp(1.5) is 4.5
    _, metrics = grpo_loss(logprobs_BT, logprobs_BT + 1.5, ref_BT, MASK_BT, advantages_BT, **LOSS)
    assert metrics["importance"] == pytest.approx(np.exp(-1.5), rel=1e-5) and metrics["truncated"] == 0.0
