"""Attention over keys and values with fewer heads than queries (GQA), softmax in float32: of whole sequences, and over a
cache by blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Large and finite: a fully masked row (padding) gives a uniform softmax, not NaN.
MASKED = -1e30


def attend(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Softmax(q k / sqrt(H)) v, each group of N/K query heads sharing one of K key-value heads; returns o_BTNH.

    mask_BTS is True where query t may read key s. Keys and values come heads-major, as the KV cache holds them.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    scores_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32) * H**-0.5
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, MASKED)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype)
    o_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weights_BKGTS, v_BKSH)
    return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


BLOCK = 256  # keys read at a time


def attend_cache(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    k_LCKSH: jax.Array,
    v_LCKSH: jax.Array,
    layer: jax.Array,
    starts_B: jax.Array,
    rows_B: jax.Array | None = None,
) -> jax.Array:
    """As `attend`, for T new tokens after those of one layer of a KV cache; returns o_BTNH.

    Query t reads slots 0 .. starts_b - 1 of its row, then the new keys and values 0 .. t, which are not in the cache yet.
    rows_B names the cache row (of C) of each b; by default they are the cache's rows in order.
    Reads by blocks, with a running maximum and sum (online softmax, Milakov and Gimelshein, arXiv 1805.02867): the new
    ones first, then the cache's up to the furthest start, so that work and memory follow the tokens held, not the cache's
    size. A block beyond a row's own start multiplies what it has by exactly 1 and adds exactly 0, so that a row's bits do
    not depend on longer ones.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_LCKSH.shape[2:4]
    X, width = T * (N // K), min(BLOCK, S)
    q_BKXH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, X, H)
    starts_B111 = starts_B.reshape(-1, 1, 1, 1)
    steps_11X1 = jnp.tile(jnp.arange(T, dtype=jnp.int32), N // K).reshape(1, 1, X, 1)

    def add(carry: tuple, k_BKWH: jax.Array, v_BKWH: jax.Array, mask: jax.Array) -> tuple:
        max_BKX1, sum_BKX1, o_BKXH = carry
        scores_BKXW = jnp.einsum("BKXH,BKWH->BKXW", q_BKXH, k_BKWH, preferred_element_type=jnp.float32) * H**-0.5
        scores_BKXW = jnp.where(mask, scores_BKXW, MASKED)
        new_BKX1 = jnp.maximum(max_BKX1, scores_BKXW.max(axis=-1, keepdims=True))
        weights_BKXW, kept_BKX1 = jnp.exp(scores_BKXW - new_BKX1), jnp.exp(max_BKX1 - new_BKX1)
        part_BKXH = jnp.einsum("BKXW,BKWH->BKXH", weights_BKXW.astype(v_BKWH.dtype), v_BKWH, preferred_element_type=jnp.float32)
        return new_BKX1, sum_BKX1 * kept_BKX1 + weights_BKXW.sum(axis=-1, keepdims=True), o_BKXH * kept_BKX1 + part_BKXH

    def block(x_LCKSH: jax.Array, start: jax.Array) -> jax.Array:
        x_1CKWH = jax.lax.dynamic_slice(x_LCKSH, (layer, 0, 0, start, 0), (1, *x_LCKSH.shape[1:3], width, H))
        return x_1CKWH[0] if rows_B is None else x_1CKWH[0][rows_B]

    def read(i: jax.Array, carry: tuple) -> tuple:
        start = jnp.minimum(i * width, S - width)  # the last block may overlap the one before
        slots_111W = start + jnp.arange(width, dtype=jnp.int32).reshape(1, 1, 1, -1)
        mask_B11W = (slots_111W < starts_B111) & (slots_111W >= i * width)
        return add(carry, block(k_LCKSH, start), block(v_LCKSH, start), mask_B11W)

    carry = jnp.full((B, K, X, 1), MASKED), jnp.zeros((B, K, X, 1)), jnp.zeros((B, K, X, H))
    k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    for at in range(0, T, BLOCK):
        new_111W = jnp.arange(at, min(at + BLOCK, T), dtype=jnp.int32).reshape(1, 1, 1, -1)
        carry = add(carry, k_BKTH[:, :, at : at + BLOCK], v_BKTH[:, :, at : at + BLOCK], new_111W <= steps_11X1)
    blocks = (jnp.minimum(starts_B.max(), S) + width - 1) // width
    _, sum_BKX1, o_BKXH = jax.lax.fori_loop(0, blocks, read, carry)
    o_BKGTH = (o_BKXH / sum_BKX1).astype(q_BTNH.dtype).reshape(B, K, N // K, T, H)
    return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
