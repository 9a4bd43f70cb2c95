"""Losses against plain NumPy; what is masked has no influence at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacherl_jax.train.losses import grpo_loss, sft_loss, token_logprobs

B, T, D, V = 3, 11, 8, 23
RNG = np.random.default_rng(0)
HIDDEN_BTD = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
UNEMBED_VD = jnp.asarray(RNG.normal(size=(V, D)), jnp.float32)
TOKENS_BT = jnp.asarray(RNG.integers(0, V, (B, T)), jnp.int32)
MASK_BT = jnp.asarray(RNG.random((B, T)) < 0.5, jnp.float32)


@pytest.mark.parametrize("chunk", [7, 30, 1000])
def test_token_logprobs_equal_full_softmax_in_any_chunk(chunk):
    logits_BTV = np.einsum("BTD,VD->BTV", HIDDEN_BTD, UNEMBED_VD).astype(np.float64)
    all_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    logprobs_BT, entropy_BT = token_logprobs(HIDDEN_BTD, UNEMBED_VD, TOKENS_BT, chunk=chunk)
    for b in range(B):
        for t in range(1, T):
            assert logprobs_BT[b, t] == pytest.approx(all_BTV[b, t - 1, TOKENS_BT[b, t]], abs=1e-5)
            assert entropy_BT[b, t] == pytest.approx(-(np.exp(all_BTV[b, t - 1]) * all_BTV[b, t - 1]).sum(), abs=1e-4)
    assert not logprobs_BT[:, 0].any() and not entropy_BT[:, 0].any()

    def loss(hidden_BTD, chunk):
        return token_logprobs(hidden_BTD, UNEMBED_VD, TOKENS_BT, chunk=chunk)[0].sum()

    np.testing.assert_allclose(jax.grad(loss)(HIDDEN_BTD, chunk), jax.grad(loss)(HIDDEN_BTD, 1000), atol=1e-5)


def arrays():
    logprobs, old, ref = (-RNG.random((B, T)) * 2 for _ in range(3))
    return [jnp.asarray(x, jnp.float32) for x in (logprobs, old, ref)], jnp.asarray(RNG.normal(size=B), jnp.float32)


def test_grpo_loss_equals_numpy_term_by_term():
    (logprobs_BT, old_BT, ref_BT), advantages_B = arrays()
    loss, metrics = grpo_loss(logprobs_BT, old_BT, ref_BT, MASK_BT, advantages_B, clip_low=0.1, clip_high=0.3, kl_coef=0.7)
    policy, kl, clipped, n = 0.0, 0.0, 0, 0
    for b in range(B):
        for t in range(1, T):
            if MASK_BT[b, t]:
                ratio = float(np.exp(logprobs_BT[b, t] - old_BT[b, t]))
                inside = min(max(ratio, 0.9), 1.3)
                policy -= min(ratio * float(advantages_B[b]), inside * float(advantages_B[b]))
                gap = float(ref_BT[b, t] - logprobs_BT[b, t])
                kl += np.exp(gap) - gap - 1
                clipped += ratio != inside
                n += 1
    assert metrics["policy_loss"] == pytest.approx(policy / n, rel=1e-5)
    assert metrics["kl"] == pytest.approx(kl / n, rel=1e-5)
    assert metrics["clipped"] == pytest.approx(clipped / n)
    assert loss == pytest.approx(policy / n + 0.7 * kl / n, rel=1e-5)


@pytest.mark.parametrize("poison", [0.0, -1e30, np.nan, np.inf])
def test_masked_tokens_have_exactly_zero_gradient(poison):
    (logprobs_BT, old_BT, ref_BT), advantages_B = arrays()
    injected_BT = (MASK_BT == 0).at[:, 0].set(True)
    spoiled_BT = jnp.where(injected_BT, poison, logprobs_BT)

    def grpo(x_BT):
        return grpo_loss(x_BT, old_BT, ref_BT, MASK_BT, advantages_B, clip_low=0.2, clip_high=0.2, kl_coef=0.1)[0]

    for loss in (grpo, lambda x_BT: sft_loss(x_BT, MASK_BT)[0]):
        gradient_BT = jax.grad(loss)(spoiled_BT)
        assert not gradient_BT[injected_BT].any() and np.isfinite(gradient_BT).all()
        assert gradient_BT[~injected_BT].any() and loss(spoiled_BT) == loss(logprobs_BT)


def test_equal_rewards_leave_only_the_kl():
    (logprobs_BT, old_BT, ref_BT), _ = arrays()
    zero_B = jnp.zeros(B)

    def loss(x_BT, kl_coef):
        return grpo_loss(x_BT, old_BT, ref_BT, MASK_BT, zero_B, clip_low=0.2, clip_high=0.2, kl_coef=kl_coef)[0]

    assert loss(logprobs_BT, 0.0) == 0 and not jax.grad(loss)(logprobs_BT, 0.0).any()
    assert jax.grad(loss)(logprobs_BT, 1.0).any()
