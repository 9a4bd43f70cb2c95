"""Attention over keys and values with fewer heads than queries (GQA), softmax in float32."""

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
