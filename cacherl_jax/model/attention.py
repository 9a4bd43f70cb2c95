"""Attention over keys and values with fewer heads than queries (GQA), softmax in float32: of whole sequences, and over a
cache by blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cacherl_jax import mesh as meshes
from cacherl_jax.config import ConfigError

# Large and finite: a fully masked row (padding) gives a uniform softmax, not NaN.
MASKED = -1e30
SAVED = "attention"  # the name by which remat policies keep an output and what its backward pass reads

Implementation = Literal["reference", "splash", "splash_interpreted", "cudnn"]


# ---- whole sequences -------------------------------------------------------------------------------------------------


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    mesh: Mesh | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Softmax(q k / sqrt(H)) v, each group of N/K query heads sharing one of K key-value heads; returns o_BTNH.

    A token reads those of its own segment up to itself. On a mesh each device computes its rows, heads and queries; keys
    and values are gathered along the row. By default the implementation is that of the platform (`platform_default`); all
    mean the same: splash attention (jax.experimental.pallas) holds nothing of T x T, cuDNN the mask alone, which its interface
    wants, the reference the scores of all heads.
    """
    implementation = implementation or platform_default(mesh, q_BTNH.shape[1], q_BTNH.dtype)
    seq, tp = (1, 1) if mesh is None else (mesh.shape["seq"], mesh.shape["tp"])
    T, N = q_BTNH.shape[1:3]
    kernel = _splash_kernel(T, N, seq, tp, implementation == "splash_interpreted") if "splash" in implementation else None

    def local(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments_BT: jax.Array, kernel: Any) -> jax.Array:
        segments_BS, first = segments_BT, 0
        if seq > 1:
            k_BSKH, v_BSKH, segments_BS = (jax.lax.all_gather(x, "seq", axis=1, tiled=True) for x in (k_BSKH, v_BSKH, segments_BS))
            first = jax.lax.axis_index("seq") * (T // seq)
        if kernel is not None:
            return _splash(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, kernel)
        mask_BTS = _mask(segments_BT, segments_BS, first)
        if implementation == "cudnn":
            return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], implementation="cudnn")
        return _reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS)

    if mesh is None:
        o_BTNH = local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, kernel)
    else:
        of_kernel = None if kernel is None else kernel.manual_sharding_spec(jax.NamedSharding(mesh, P("tp", "seq")))
        heads = meshes.HEADS_BTNH
        o_BTNH = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(heads, heads, heads, meshes.TOKENS_BT, of_kernel),
            out_specs=heads,
            check_vma=False,
        )(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, kernel)
    return checkpoint_name(o_BTNH, SAVED)


def platform_default(mesh: Mesh | None, tokens: int, dtype: Any) -> Implementation:
    """Splash on TPUs, cuDNN for 16-bit heads on GPUs, else the reference; also for rows too short for splash's blocks.

    Raises ConfigError for rows that do not divide over the devices of a row, and for long ones that splash cannot split.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    seq = 1 if mesh is None else mesh.shape["seq"]
    if tokens % seq:
        raise ConfigError(f"rows of {tokens} tokens do not divide over seq = {seq} devices; see packed_length and mesh.seq")
    if platform == "tpu":
        own = tokens // seq
        if own % LANES == 0:
            return "splash"
        if tokens > SHORT:
            raise ConfigError(
                f"rows of {tokens} tokens, {own} a device: on TPUs it must be a multiple of {LANES}; see packed_length and mesh.seq"
            )
    elif platform == "gpu" and jnp.dtype(dtype).itemsize == 2:
        return "cudnn"
    return "reference"


def refuse_lengths(lengths: Iterable[int], mesh: Mesh, dtype: Any) -> None:
    """Raises ConfigError for a length of rows that cannot be split: before a run comes to them."""
    for tokens in lengths:
        platform_default(mesh, tokens, dtype)


def _mask(segments_BT: jax.Array, segments_BS: jax.Array, first: jax.Array | int) -> jax.Array:
    """True where query t, at position first + t of its row, may read key s."""
    queries_T1 = first + jnp.arange(segments_BT.shape[1], dtype=jnp.int32)[:, None]
    causal_TS = queries_T1 >= jnp.arange(segments_BS.shape[1], dtype=jnp.int32)[None]
    return causal_TS[None] & (segments_BT[:, :, None] == segments_BS[:, None])


def _reference(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    scores_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32) * H**-0.5
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, MASKED)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype)
    o_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weights_BKGTS, v_BKSH)
    return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


LANES = 128  # splash's blocks are multiples of it
SHORT = 1024  # rows of up to so many tokens may be no multiple of LANES; T x T scores of them are small
SPLASH_BLOCK = 512


def _splash_kernel(T: int, N: int, seq: int, tp: int, interpret: bool) -> Any:
    """The kernel for the causal mask of all T x T, whose blocks know which part of it is empty."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    queries, keys = math.gcd(T // seq, SPLASH_BLOCK), math.gcd(T, SPLASH_BLOCK)
    blocks = splash.BlockSizes(
        block_q=queries, block_kv=keys, block_kv_compute=keys,
        block_q_dkv=queries, block_kv_dkv=keys, block_kv_dkv_compute=keys,
        block_q_dq=queries, block_kv_dq=keys,
    )  # fmt: skip
    return splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((T, T))] * N),
        block_sizes=blocks, head_shards=tp, q_seq_shards=seq, residual_checkpoint_name=SAVED, interpret=interpret,
    )  # fmt: skip


def _splash(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments_BT: jax.Array, segments_BS: jax.Array, kernel: Any
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    q_BTNH = q_BTNH * q_BTNH.shape[-1] ** -0.5
    q_BNTH, k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (q_BTNH, k_BSKH, v_BSKH))
    o_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, SegmentIds(segments_BT, segments_BS))
    return o_BNTH.astype(q_BTNH.dtype).transpose(0, 2, 1, 3)


# ---- over a cache ----------------------------------------------------------------------------------------------------


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
