"""The model against itself: cached, packed, causal, and every field of its configuration read. test_parity.py has transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacherl_jax.config import ModelConfig, YarnConfig
from cacherl_jax.model import hf, qwen3

# Every field off its default, so that one which is never read shows.
ODD = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=3,
    head_dim=20,
    intermediate_size=56,
    rope_theta=5_003.0,
    yarn=YarnConfig(
        factor=3.5,
        original_max_position_embeddings=64,
        beta_fast=6.0,
        beta_slow=0.5,
        mscale=1.3,
        mscale_all_dim=0.7,
        truncate=False,
    ),
    rms_norm_eps=3e-3,
    tie_word_embeddings=False,
    initializer_range=0.15,
    embedding_range=0.7,
)


def tokens_of(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, ODD.vocab_size, shape), jnp.int32)


@pytest.fixture(scope="module")
def model():
    return qwen3.init(ODD, jax.random.key(1))


def test_hf_names_and_layouts_round_trip(model):
    tree = qwen3.to_dict(model)
    jax.tree.map(np.testing.assert_array_equal, hf.from_hf(ODD, hf.to_hf(ODD, tree)), tree)


FIELDS = [f.name for f in dataclasses.fields(ModelConfig) if f.name != "yarn"]


@pytest.mark.parametrize("field", [*FIELDS, *(f"yarn.{f.name}" for f in dataclasses.fields(YarnConfig))])
def test_every_config_field_changes_the_model(field):
    changed = {
        "num_heads": 3, "num_kv_heads": 2, "head_dim": 24, "tie_word_embeddings": True, "dtype": "bfloat16", "vocab_size": 98,
        "yarn.attention_factor": 1.3, "yarn.truncate": True,
    }  # fmt: skip
    *nested, name = field.split(".")
    value = getattr(ODD.yarn if nested else ODD, name)
    change = {name: changed[field] if field in changed else value * 2}
    change = {"yarn": dataclasses.replace(ODD.yarn, **change)} if nested else change
    tokens_BT = tokens_of((1, 9))

    def outputs(config):
        made = qwen3.init(config, jax.random.key(1))
        return qwen3.logits(made, qwen3.forward(made, tokens_BT, jnp.ones_like(tokens_BT)))

    a, b = outputs(ODD), outputs(dataclasses.replace(ODD, **change))
    assert a.shape != b.shape or float(jnp.abs(a - b).max()) > 1e-4


def test_cached_extension_equals_forward_token_by_token_and_in_chunks(model):
    tokens_BT = tokens_of((3, 12))
    expected_BTD = qwen3.forward(model, tokens_BT, jnp.ones_like(tokens_BT))
    extend = jax.jit(qwen3.extend)
    for chunk in (1, 5):  # 5 does not divide 12: the last chunk is ragged
        cache, seen = qwen3.init_cache(ODD, 3, 16), 0
        while seen < 12:
            count = min(chunk, 12 - seen)
            part_BT = jnp.zeros((3, chunk), jnp.int32).at[:, :count].set(tokens_BT[:, seen : seen + count])
            starts_B, counts_B = jnp.full((3,), seen), jnp.full((3,), count)
            hidden_BTD, cache = extend(model, cache, part_BT, starts_B, counts_B)
            np.testing.assert_allclose(hidden_BTD[:, :count], expected_BTD[:, seen : seen + count], atol=2e-5)
            seen += count


def test_rows_that_wait_keep_their_cache(model):
    cache = qwen3.init_cache(ODD, 2, 8)
    _, cache = qwen3.extend(model, cache, tokens_of((2, 4)), jnp.array([0, 0]), jnp.array([4, 4]))
    _, after = qwen3.extend(model, cache, tokens_of((2, 2), 1), jnp.array([4, 4]), jnp.array([0, 2]))
    np.testing.assert_array_equal(after.k_LBKSH[:, 0], cache.k_LBKSH[:, 0])
    assert np.abs(after.k_LBKSH[:, 1, :, 4:6]).min() > 0 and not np.any(after.k_LBKSH[:, 1, :, 6:])


def test_an_idle_row_makes_no_other_read_as_far_as_it(model):
    """What lies beyond the tokens of a row is not even read where the rows that hold more stand still."""
    cache = qwen3.init_cache(ODD, 2, 600)
    _, cache = qwen3.extend(model, cache, tokens_of((2, 4)), jnp.array([0, 0]), jnp.array([4, 4]))
    k_LBKSH, v_LBKSH = (x.at[:, :, :, 300:].set(jnp.nan) for x in cache)
    next_B1, starts_B, counts_B = tokens_of((2, 1), 1), jnp.array([500, 4]), jnp.array([0, 1])
    expected_BTD, _ = qwen3.extend(model, cache, next_B1, starts_B, counts_B)
    hidden_BTD, _ = qwen3.extend(model, qwen3.KVCache(k_LBKSH, v_LBKSH), next_B1, starts_B, counts_B)
    np.testing.assert_array_equal(hidden_BTD[1], expected_BTD[1])


def test_packed_segments_equal_separate_rows(model):
    a_1T, b_1T = tokens_of((1, 7), 2), tokens_of((1, 5), 3)
    packed_BT = jnp.concatenate([a_1T, b_1T, jnp.zeros((1, 4), jnp.int32)], axis=1)
    segments_BT = jnp.array([[1] * 7 + [2] * 5 + [0] * 4])
    hidden_BTD = qwen3.forward(model, packed_BT, segments_BT)
    np.testing.assert_allclose(hidden_BTD[:, :7], qwen3.forward(model, a_1T, jnp.ones_like(a_1T)), atol=1e-5)
    np.testing.assert_allclose(hidden_BTD[:, 7:12], qwen3.forward(model, b_1T, jnp.ones_like(b_1T)), atol=1e-5)
    assert np.isfinite(hidden_BTD).all()


def test_wide_reads_near_the_end_of_the_cache_write_their_own_slots_only(model):
    """Reads padded beyond the end of the cache, or wider than all of it, leave what exact ones leave; surplus ones nothing."""
    S, starts_R, counts_R, rows_R = 12, jnp.array([9, 2, 5]), jnp.array([3, 9, 0]), jnp.array([2, 0, 3])
    filled = qwen3.KVCache(*(x + 7.0 for x in qwen3.init_cache(ODD, 3, S)))
    for width in (10, 16):
        tokens_RT = tokens_of((3, width), seed=2)
        _, found = qwen3.extend(model, filled, tokens_RT, starts_R, counts_R, rows_R)
        expected = filled
        for r in range(2):
            exact = tokens_RT[r : r + 1, : int(counts_R[r])], starts_R[r : r + 1], counts_R[r : r + 1], rows_R[r : r + 1]
            _, expected = qwen3.extend(model, expected, *exact)
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)
            np.testing.assert_array_equal(x == 7.0, y == 7.0)


def test_no_position_sees_a_later_token(model):
    """Causality by gradients: hidden t does not move with any embedding after t."""
    tokens_BT = jnp.arange(10, dtype=jnp.int32)[None]  # distinct tokens: embedding row = position

    def hidden_at(embed_VD, t):
        tree = qwen3.to_dict(model) | {"embed_VD": embed_VD}
        return qwen3.forward(qwen3.from_dict(ODD, tree), tokens_BT, jnp.ones_like(tokens_BT))[0, t].sum()

    for t in (0, 4, 9):
        moved_V = np.abs(jax.grad(hidden_at)(model.embed_VD[...], t)).sum(axis=1)[:10]
        assert (moved_V[: t + 1] > 0).all() and not moved_V[t + 1 :].any()
