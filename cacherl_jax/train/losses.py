"""Losses over token logprobs, and the logprobs themselves without ever holding logits of a whole batch.

Only tokens that the policy sampled carry loss; everything here takes that mask. No model is imported: hidden states and
the unembedding matrix come as arrays.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cacherl_jax import mesh as meshes

Metrics = dict[str, jax.Array]


def token_logprobs(
    hidden_BTD: jax.Array,
    unembed_VD: jax.Array,
    tokens_BT: jax.Array,
    *,
    chunk: int,
    mesh: Mesh | None = None,
    entropy: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Logprob in nats of each token given those before it and, if asked, the entropy of that prediction; [B, T] float32.

    Entry t belongs to token t and is computed from hidden state t-1; entry 0 of each row is 0, and that of a later segment's
    first token means nothing (`predicted`). Logits exist for about `chunk` positions of a device at a time; those of several
    chunks are computed again in the backward pass, so that [B, T, V] is never built. On a mesh each device takes its own
    positions, against the vocabulary of its tp group.
    """
    next_BT = jnp.roll(tokens_BT, -1, axis=1)  # the last entry of a row is dropped below
    of_chunks = partial(_next_logprobs, chunk=chunk, entropy=entropy, summed=unembed_VD.dtype)
    if mesh is None:
        logprobs_BT, entropy_BT = of_chunks(hidden_BTD, unembed_VD, next_BT, axes="VD", tp=1)
    else:

        def local(hidden_BTD: jax.Array, slice_VD: jax.Array, next_BT: jax.Array) -> tuple[jax.Array, jax.Array | None]:
            tp = mesh.shape["tp"]
            if all(mesh.shape[axis] == 1 for axis in meshes.SHARDED):
                return of_chunks(hidden_BTD, slice_VD, next_BT, axes="VD", tp=tp)
            # Slices come one behind the other in memory: in the other order XLA makes a second copy.
            gathered_DV = jax.lax.all_gather(slice_VD.T.astype(hidden_BTD.dtype), meshes.SHARDED, axis=0, tiled=True)
            return of_chunks(hidden_BTD, gathered_DV, next_BT, axes="DV", tp=tp)

        tokens = meshes.TOKENS_BT
        logprobs_BT, entropy_BT = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(meshes.HIDDEN_BTD, P("tp", meshes.SHARDED), tokens),
            out_specs=(tokens, tokens if entropy else None),
            check_vma=False,
        )(hidden_BTD, unembed_VD, next_BT)

    def aligned(x_BT: jax.Array) -> jax.Array:
        return jnp.pad(x_BT[:, :-1], ((0, 0), (1, 0)))

    return aligned(logprobs_BT), None if entropy_BT is None else aligned(entropy_BT)


def _next_logprobs(
    hidden_BTD: jax.Array,
    unembed: jax.Array,
    next_BT: jax.Array,
    *,
    axes: str,
    tp: int,
    chunk: int,
    entropy: bool,
    summed: Any,
) -> tuple[jax.Array, jax.Array | None]:
    """Of the token that follows each position; unembed, "VD" or "DV", holds this device's part of the vocabulary, of `tp`.
    Gradients of its chunks are summed in the dtype `summed`, that of the weights: train weights in float32."""
    (B, T, D), V = hidden_BTD.shape, unembed.shape[axes.index("V")]
    chunks = -(-B * T // chunk)
    size = -(-B * T // chunks)
    pad = chunks * size - B * T
    hidden_MCD = jnp.pad(hidden_BTD.reshape(-1, D), ((0, pad), (0, 0))).reshape(chunks, size, D)
    next_MC = jnp.pad(next_BT.reshape(-1), (0, pad)).reshape(chunks, size)
    first = jax.lax.axis_index("tp") * V if tp > 1 else 0
    unembed = unembed.astype(summed)

    def over_tp(reduce: Any, x: jax.Array) -> jax.Array:
        return reduce(x, "tp") if tp > 1 else x

    def of_chunk(hidden_CD: jax.Array, next_C: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        weights = unembed.astype(hidden_CD.dtype)
        logits_CV = jnp.einsum(f"CD,{axes}->CV", hidden_CD, weights, preferred_element_type=jnp.float32)
        largest_C1 = over_tp(jax.lax.pmax, jax.lax.stop_gradient(logits_CV.max(axis=-1, keepdims=True)))
        exps_CV = jnp.exp(logits_CV - largest_C1)
        sum_C = over_tp(jax.lax.psum, exps_CV.sum(axis=-1))
        normalizer_C = jnp.log(sum_C) + largest_C1[:, 0]
        is_next_CV = jnp.arange(V, dtype=jnp.int32)[None] == (next_C - first)[:, None]
        chosen_C = over_tp(jax.lax.psum, jnp.where(is_next_CV, logits_CV, 0.0).sum(axis=-1))
        if not entropy:
            return chosen_C - normalizer_C, None
        mean_C = over_tp(jax.lax.psum, (exps_CV * logits_CV).sum(axis=-1)) / sum_C
        return chosen_C - normalizer_C, jax.lax.stop_gradient(normalizer_C - mean_C)

    if chunks == 1:
        found = of_chunk(hidden_MCD[0], next_MC[0])
    else:
        found = jax.lax.map(lambda x: jax.checkpoint(of_chunk)(*x), (hidden_MCD, next_MC))
    return jax.tree.map(lambda x: x.reshape(-1)[: B * T].reshape(B, T), found)


def masked_mean(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean over tokens where the mask is above 0, each weighted by it; 0 where there is none. Masked-out values reach neither
    value nor gradient. The weights of a batch sum to at least 1."""
    kept_BT = jnp.where(mask_BT > 0, x_BT, 0.0)
    return (kept_BT * mask_BT).sum() / jnp.maximum(mask_BT.sum(), 1.0)


def predicted(x_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """A mask, logprobs or entropies, with 0 at the first token of each segment: the token before it is another's, and
    nothing predicts it."""
    follows_BT = jnp.pad(segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(follows_BT, x_BT, 0.0)


def sft_loss(logprobs_BT: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, Metrics]:
    """Mean negative logprob over the tokens of a mask that is `predicted`, nats per token."""
    return -masked_mean(logprobs_BT, mask_BT), {}
