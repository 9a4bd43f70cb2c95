"""Losses against plain NumPy; what is masked has no influence at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacherl_jax.train.agreement import gaps
from cacherl_jax.train.losses import sft_loss, token_logprobs

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


def test_sft_loss_is_the_mean_over_the_mask_and_what_is_masked_has_no_influence():
    logprobs_BT = -jnp.asarray(RNG.random((B, T)), jnp.float32)
    for poison in (0.0, -1e30, np.nan):
        spoiled_BT = jnp.where(MASK_BT > 0, logprobs_BT, poison)
        loss, gradient_BT = jax.value_and_grad(lambda x: sft_loss(x, MASK_BT)[0])(spoiled_BT)
        assert loss == pytest.approx(-np.asarray(logprobs_BT)[np.asarray(MASK_BT) > 0].mean(), rel=1e-6)
        np.testing.assert_allclose(gradient_BT, -MASK_BT / MASK_BT.sum(), rtol=1e-6)
        assert not gradient_BT[MASK_BT == 0].any()


def test_a_planted_disagreement_is_seen_where_it_is():
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
