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


BLOCK = 256  # cache slots read at a time


def attend_cache(
    q_BTNH: jax.Array,
    k_LCKSH: jax.Array,
    v_LCKSH: jax.Array,
    layer: jax.Array,
    positions_BT: jax.Array,
    rows_B: jax.Array | None = None,
) -> jax.Array:
    """As `attend`, over one layer of a KV cache: query t reads slots 0 .. positions_bt of its row; returns o_BTNH.

    rows_B names the cache row (of C) of each b; by default they are the cache's rows in order.
    Reads the cache by blocks up to the furthest position, with a running maximum and sum (online softmax, Milakov and
    Gimelshein, arXiv 1805.02867): work and memory follow the tokens held, not the cache's size. A block beyond a row's own
    positions multiplies what it has by exactly 1 and adds exactly 0, so that a row's bits do not depend on longer ones.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_LCKSH.shape[2:4]
    width = min(BLOCK, S)
    q_BKXH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    positions_B1X1 = jnp.tile(positions_BT[:, None], (1, N // K, 1)).reshape(B, 1, -1, 1)

    def block(x_LCKSH: jax.Array, start: jax.Array) -> jax.Array:
        x_1CKWH = jax.lax.dynamic_slice(x_LCKSH, (layer, 0, 0, start, 0), (1, *x_LCKSH.shape[1:3], width, H))
        return x_1CKWH[0] if rows_B is None else x_1CKWH[0][rows_B]

    def read(i: jax.Array, carry: tuple) -> tuple:
        max_BKX1, sum_BKX1, o_BKXH = carry
        start = jnp.minimum(i * width, S - width)  # the last block may overlap the one before
        slots_111W = start + jnp.arange(width, dtype=jnp.int32).reshape(1, 1, 1, -1)
        scores_BKXW = jnp.einsum("BKXH,BKWH->BKXW", q_BKXH, block(k_LCKSH, start), preferred_element_type=jnp.float32) * H**-0.5
        mask_B1XW = (slots_111W <= positions_B1X1) & (slots_111W >= i * width)
        scores_BKXW = jnp.where(mask_B1XW, scores_BKXW, MASKED)
        new_BKX1 = jnp.maximum(max_BKX1, scores_BKXW.max(axis=-1, keepdims=True))
        weights_BKXW, kept_BKX1 = jnp.exp(scores_BKXW - new_BKX1), jnp.exp(max_BKX1 - new_BKX1)
        part_BKXH = jnp.einsum(
            "BKXW,BKWH->BKXH", weights_BKXW.astype(v_LCKSH.dtype), block(v_LCKSH, start), preferred_element_type=jnp.float32
        )
        return new_BKX1, sum_BKX1 * kept_BKX1 + weights_BKXW.sum(axis=-1, keepdims=True), o_BKXH * kept_BKX1 + part_BKXH

    X = T * (N // K)
    start = jnp.full((B, K, X, 1), MASKED), jnp.zeros((B, K, X, 1)), jnp.zeros((B, K, X, H))
    blocks = jnp.minimum(positions_BT.max(), S - 1) // width + 1
    _, sum_BKX1, o_BKXH = jax.lax.fori_loop(0, blocks, read, start)
    o_BKGTH = (o_BKXH / sum_BKX1).astype(q_BTNH.dtype).reshape(B, K, N // K, T, H)
    return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
