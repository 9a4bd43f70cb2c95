"""Qwen3, dense, as pure functions over a frozen pytree. Read top to bottom: parameters, block, forward, cached extension.

Shapes: B rows, T tokens, D hidden, N query heads, K key-value heads, H head, A all query heads (N H), C all key-value heads
(K H), F ffn, V vocabulary, L layers, S cache slots.
Layers are stacked on a leading axis and scanned. Modules are `flax.nnx.Module`s used as immutable pytrees: only jax's own
transformations touch them. Source: Qwen3 technical report (arXiv 2505.09388) and transformers' Qwen3ForCausalLM, whose
outputs the parity test compares.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cacherl_jax import mesh as meshes
from cacherl_jax.config import ConfigError, MemoryConfig, ModelConfig
from cacherl_jax.model import attention, rope


class Weight(NamedTuple):
    """A row of the table of parameters. init is the standard deviation's config field, or "ones"."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str


def layer_table(c: ModelConfig) -> dict[str, Weight]:
    """The parameters of one layer, without the stacking axis: initialisation, sharding and loading follow from it.

    All heads lie in one axis: with an axis of heads XLA on TPUs rearranges the weights of all layers, in a copy that stays.
    """
    D, H, F = c.hidden_size, c.head_dim, c.intermediate_size
    A, C = c.num_heads * H, c.num_kv_heads * H
    matrix = "initializer_range"
    return {
        "attention_norm_D": Weight((D,), ("norm",), "ones"),
        "query_DA": Weight((D, A), ("embed", "heads"), matrix),
        "key_DC": Weight((D, C), ("embed", "kv_heads"), matrix),
        "value_DC": Weight((D, C), ("embed", "kv_heads"), matrix),
        "query_norm_H": Weight((H,), ("norm",), "ones"),
        "key_norm_H": Weight((H,), ("norm",), "ones"),
        "output_AD": Weight((A, D), ("heads", "embed"), matrix),
        "mlp_norm_D": Weight((D,), ("norm",), "ones"),
        "gate_DF": Weight((D, F), ("embed", "ffn"), matrix),
        "up_DF": Weight((D, F), ("embed", "ffn"), matrix),
        "down_FD": Weight((F, D), ("ffn", "embed"), matrix),
    }


def table(c: ModelConfig) -> dict[str, Any]:
    """All parameters as the nested dict that checkpoints hold; layers stacked."""
    V, D = c.vocab_size, c.hidden_size
    layers = {name: Weight((c.num_layers, *w.shape), ("layer", *w.axes), w.init) for name, w in layer_table(c).items()}
    top: dict[str, Any] = {"embed_VD": Weight((V, D), ("vocab", "embed"), "embedding_range")}
    top |= {"layers": layers, "final_norm_D": Weight((D,), ("norm",), "ones")}
    if not c.tie_word_embeddings:
        top["unembed_VD"] = Weight((V, D), ("vocab", "embed"), "initializer_range")
    return top


class Layers(nnx.Module):
    """The stacked parameters of all layers; inside the scan, those of one."""

    attention_norm_D: nnx.Param
    query_DA: nnx.Param
    key_DC: nnx.Param
    value_DC: nnx.Param
    query_norm_H: nnx.Param
    key_norm_H: nnx.Param
    output_AD: nnx.Param
    mlp_norm_D: nnx.Param
    gate_DF: nnx.Param
    up_DF: nnx.Param
    down_FD: nnx.Param

    def __init__(self, tree: dict[str, Any]) -> None:
        for name, value in tree.items():
            setattr(self, name, nnx.Param(value))


class Qwen3(nnx.Module):
    """The model's parameters and its static configuration."""

    def __init__(self, config: ModelConfig, tree: dict[str, Any]) -> None:
        self.config = config
        self.embed_VD = nnx.Param(tree["embed_VD"])
        self.layers = Layers(tree["layers"])
        self.final_norm_D = nnx.Param(tree["final_norm_D"])
        if not config.tie_word_embeddings:
            self.unembed_VD = nnx.Param(tree["unembed_VD"])
        self.adapter: Any = nnx.data(None)  # or a lora.Adapter, stacked as the layers are


def from_dict(config: ModelConfig, tree: dict[str, Any]) -> Qwen3:
    """The model from a nested dict of arrays shaped as `table(config)` says. Raises ValueError naming what differs."""
    expected = table(config)
    flat_expected, flat = _flat(expected), _flat(tree)
    if flat_expected.keys() != flat.keys():
        raise ValueError(f"parameters do not match: missing or surplus {sorted(flat_expected.keys() ^ flat.keys())}")
    for name, weight in flat_expected.items():
        if tuple(flat[name].shape) != weight.shape:
            raise ValueError(f"parameter {name} has shape {tuple(flat[name].shape)}, expected {weight.shape}")
    return Qwen3(config, tree)


def to_dict(model: Qwen3) -> dict[str, Any]:
    """The nested dict of arrays that `from_dict` takes and checkpoints hold."""
    read = table(model.config)
    layers = {name: getattr(model.layers, name)[...] for name in read["layers"]}
    return {name: layers if name == "layers" else getattr(model, name)[...] for name in read}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for name, value in tree.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def init(config: ModelConfig, key: jax.Array, mesh: Mesh | None = None) -> Qwen3:
    """Random parameters, each made on its own shard when `mesh` is given. Raises ConfigError if one does not divide."""
    if config.vocab_size <= 0:
        raise ValueError("model.vocab_size is not set; it comes from the tokenizer")
    dtype = jnp.dtype(config.dtype)
    weights = table(config)
    flat = _flat(weights)
    keys = dict(zip(flat, jax.random.split(key, len(flat)), strict=True))

    def make(prefix: str, tree: dict[str, Any]) -> dict[str, Any]:
        out = {}
        for name, w in tree.items():
            if isinstance(w, dict):
                out[name] = make(f"{prefix}{name}.", w)
            elif w.init == "ones":
                out[name] = jnp.ones(w.shape, dtype)
            else:
                scale = getattr(config, w.init)
                out[name] = (jax.random.normal(keys[prefix + name], w.shape, jnp.float32) * scale).astype(dtype)
        return out

    def build() -> dict[str, Any]:
        return make("", weights)

    if mesh is None:
        return Qwen3(config, jax.jit(build)())
    return Qwen3(config, jax.jit(build, out_shardings=_shardings(config, mesh))())


def shardings(config: ModelConfig, mesh: Mesh) -> Qwen3:
    """Where each parameter lives on `mesh`, as a model of shardings. Raises ConfigError if one does not divide."""
    return Qwen3(config, _shardings(config, mesh))


def _shardings(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    for field_, heads in (("num_heads", config.num_heads), ("num_kv_heads", config.num_kv_heads)):
        if heads % mesh.shape["tp"]:
            raise ConfigError(f"model.{field_}={heads} does not divide over mesh axis tp={mesh.shape['tp']}")
    return _map_table(lambda name, w: meshes.parameter_sharding(mesh, w.shape, w.axes, name), table(config))


def _map_table(fn: Any, tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        name: _map_table(fn, w, f"{prefix}{name}.") if isinstance(w, dict) else fn(prefix + name, w) for name, w in tree.items()
    }


def copy(model: Qwen3) -> Qwen3:
    """The same values in buffers of their own, for a caller that donates them."""
    return jax.tree.map(jnp.copy, model)


@partial(jax.jit, static_argnames="dtype")
def cast(model: Qwen3, dtype: str) -> Qwen3:
    """The model with weights in `dtype`, where they lie."""
    tree = jax.tree.map(lambda w: w.astype(dtype), to_dict(model))
    return Qwen3(replace(model.config, dtype=dtype), tree)


# ---- the block -------------------------------------------------------------------------------------------------------


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, the statistics in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def rope_angles(positions_BT: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """(sin, cos), [B, T, 1, H/2] in float32: bfloat16 would round position 257 to 256."""
    frequencies_h, factor = rope.frequencies(config)
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies_h.reshape(1, 1, 1, -1)
    return jnp.sin(angles) * factor, jnp.cos(angles) * factor


def rotate(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding over halves (first half with second), as in the reference implementation."""
    sin, cos = angles
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


class Layer(NamedTuple):
    """One layer inside a scan: its parameters, and its part of the adapter or None."""

    weights: Layers
    adapter: Any

    def project(self, name: str, x: jax.Array) -> jax.Array:
        """[B, T, inputs] to [B, T, outputs]: x W, and with an adapter for that weight x W + scale (x A) B."""
        y = x @ getattr(self.weights, name)[...]
        factors = getattr(self.adapter, name, None)
        return y if factors is None else y + self.adapter.scale * (x @ factors.a[...] @ factors.b[...])


def _qkv(layer: Layer, x_BTD: jax.Array, angles: Any, c: ModelConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    h_BTD = rms_norm(x_BTD, layer.weights.attention_norm_D[...], c.rms_norm_eps)
    heads = (*x_BTD.shape[:2], -1, c.head_dim)
    q_BTNH, k_BTKH, v_BTKH = (layer.project(name, h_BTD).reshape(heads) for name in ("query_DA", "key_DC", "value_DC"))
    q_BTNH = rotate(rms_norm(q_BTNH, layer.weights.query_norm_H[...], c.rms_norm_eps), angles)
    k_BTKH = rotate(rms_norm(k_BTKH, layer.weights.key_norm_H[...], c.rms_norm_eps), angles)
    return q_BTNH, k_BTKH, v_BTKH


def _finish(layer: Layer, x_BTD: jax.Array, o_BTNH: jax.Array, c: ModelConfig) -> jax.Array:
    x_BTD = x_BTD + layer.project("output_AD", o_BTNH.reshape(*x_BTD.shape[:2], -1))
    h_BTD = rms_norm(x_BTD, layer.weights.mlp_norm_D[...], c.rms_norm_eps)
    gate_BTF = jax.nn.silu(layer.project("gate_DF", h_BTD))
    return x_BTD + layer.project("down_FD", gate_BTF * layer.project("up_DF", h_BTD))


# ---- forward: training and scoring -----------------------------------------------------------------------------------


def segment_positions(segment_ids_BT: jax.Array) -> jax.Array:
    """The index of each token within its segment: a token whose segment differs from the one before starts at 0."""
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)[None]
    starts_BT = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index_T - jax.lax.cummax(jnp.where(starts_BT, index_T, 0), axis=1)


@dataclass(frozen=True)
class Execution:
    """How a forward pass is carried out; it changes memory and time, not what is computed beyond rounding."""

    mesh: Mesh | None = None  # where the parameters and the batch lie; None: on one device
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def dtype(self, c: ModelConfig) -> Any:
        """Of matrix products and of what flows between layers."""
        return jnp.dtype(c.dtype if self.memory.compute == "weights" else self.memory.compute)


ONE_DEVICE = Execution()


def forward(
    model: Qwen3,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    execution: Execution = ONE_DEVICE,
) -> jax.Array:
    """Hidden states after the final norm, [B, T, D]. Attention is causal and stays within a segment; 0 is padding."""
    c, mesh = model.config, execution.mesh
    dtype = execution.dtype(c)
    if positions_BT is None:
        positions_BT = segment_positions(segment_ids_BT)
    angles = rope_angles(positions_BT, c)
    x_BTD = embed(model.embed_VD[...], tokens_BT, dtype, mesh)

    def block(x_BTD: jax.Array, stacked: tuple[Layers, Any]) -> tuple[jax.Array, None]:
        if dtype != jnp.dtype(c.dtype):  # a layer at a time: without it XLA converts the whole stack beforehand and keeps it
            stacked = jax.lax.optimization_barrier(stacked)
        layer = Layer(*jax.tree.map(lambda w: w.astype(dtype), stacked))
        q_BTNH, k_BTKH, v_BTKH = _qkv(layer, x_BTD, angles, c)
        o_BTNH = attention.attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, mesh)
        return meshes.constrain(_finish(layer, x_BTD, o_BTNH, c), mesh, meshes.HIDDEN_BTD), None

    x_BTD, _ = jax.lax.scan(_remat(block, execution.memory.remat), x_BTD, (model.layers, model.adapter))
    return rms_norm(x_BTD, model.final_norm_D[...].astype(dtype), c.rms_norm_eps)


def _remat(block: Any, policy: str) -> Any:
    """The block, whose backward pass computes again what the policy does not keep."""
    policies = jax.checkpoint_policies
    if policy == "none":
        return block
    attended = policies.save_only_these_names(attention.SAVED)
    kept = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, attended)
    # Inside a scan nothing can merge the two computations: prevent_cse would only cost.
    return jax.checkpoint(block, policy=kept if policy == "dots" else policies.nothing_saveable, prevent_cse=False)


def embed(embed_VD: jax.Array, tokens_BT: jax.Array, dtype: Any, mesh: Mesh | None) -> jax.Array:
    """The tokens' rows of the embedding, [B, T, D].

    On a mesh each device looks all tokens of its group up in its own slice, and the slices change places: the table itself
    never moves, and its gradient is summed in its own dtype where it lies.
    """
    if mesh is None:
        return jnp.take(embed_VD, tokens_BT, axis=0).astype(dtype)

    def local(slice_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        tokens_GBT = jax.lax.all_gather(tokens_BT, meshes.SHARDED)
        if mesh.shape["tp"] == 1:
            x_GBTD = jnp.take(slice_VD, tokens_GBT, axis=0).astype(dtype)
        else:
            V = slice_VD.shape[0]
            own_GBT = tokens_GBT - V * jax.lax.axis_index("tp")
            found_GBTD = jnp.take(slice_VD, jnp.clip(own_GBT, 0, V - 1), axis=0).astype(dtype)
            x_GBTD = jnp.where(((own_GBT >= 0) & (own_GBT < V))[..., None], found_GBTD, 0)
            x_GBTD = jax.lax.psum(x_GBTD, "tp")
        return jax.lax.all_to_all(x_GBTD, meshes.SHARDED, split_axis=0, concat_axis=3, tiled=True)[0]

    specs = P("tp", meshes.SHARDED), meshes.TOKENS_BT
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=meshes.HIDDEN_BTD, check_vma=False)(embed_VD, tokens_BT)


def unembedding(model: Qwen3) -> jax.Array:
    """The output matrix [V, D]; the embedding itself where they are tied."""
    return model.embed_VD[...] if model.config.tie_word_embeddings else model.unembed_VD[...]


def logits(model: Qwen3, hidden: jax.Array) -> jax.Array:
    """Float32 logits [..., V]. For a few positions; whole sequences go through losses.token_logprobs."""
    return jnp.einsum("...D,VD->...V", hidden, unembedding(model), preferred_element_type=jnp.float32)


# ---- extend: rollouts ------------------------------------------------------------------------------------------------


class KVCache(NamedTuple):
    """Keys and values of all rows, heads-major, [L, B, K, S, H]."""

    k_LBKSH: jax.Array
    v_LBKSH: jax.Array


def init_cache(config: ModelConfig, rows: int, context: int) -> KVCache:
    shape = (config.num_layers, rows, config.num_kv_heads, context, config.head_dim)
    return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def extend(
    model: Qwen3,
    cache: KVCache,
    tokens_BT: jax.Array,
    starts_B: jax.Array,
    counts_B: jax.Array,
    rows_B: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Reads tokens into the cache: row b's first counts_b tokens go to positions starts_b onward.

    rows_B names the cache row of each b, all different; by default they are the cache's rows in order. Rows with count 0
    keep their cache. Returns hidden states after the final norm, [B, T, D] (meaningless beyond a row's count), and the
    cache. T = 1 decodes, larger T prefills. The caller keeps starts + counts <= S. Layers only read the cache; what they
    add is written behind the last one, in place where the caller donates the cache.
    """
    c = model.config
    B, T = tokens_BT.shape
    steps_T = jnp.arange(T, dtype=jnp.int32)[None]
    positions_BT = starts_B[:, None] + steps_T
    read_B = jnp.where(counts_B > 0, starts_B, 0)  # a row that stands still makes no other read as far as it
    angles = rope_angles(positions_BT, c)
    x_BTD = jnp.take(model.embed_VD[...], tokens_BT, axis=0)

    def block(x_BTD: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
        weights, adapter, index = xs
        layer = Layer(weights, adapter)
        q_BTNH, k_BTKH, v_BTKH = _qkv(layer, x_BTD, angles, c)
        o_BTNH = attention.attend_cache(q_BTNH, k_BTKH, v_BTKH, cache.k_LBKSH, cache.v_LBKSH, index, read_B, rows_B)
        return _finish(layer, x_BTD, o_BTNH, c), (k_BTKH, v_BTKH)

    layers = (model.layers, model.adapter, jnp.arange(c.num_layers, dtype=jnp.int32))
    x_BTD, (k_LBTKH, v_LBTKH) = jax.lax.scan(block, x_BTD, layers)
    new = KVCache(k_LBTKH.transpose(0, 1, 3, 2, 4), v_LBTKH.transpose(0, 1, 3, 2, 4))
    cache = _write(cache, new, starts_B, counts_B, jnp.arange(B, dtype=jnp.int32) if rows_B is None else rows_B)
    return rms_norm(x_BTD, model.final_norm_D[...], c.rms_norm_eps), cache


def _write(cache: KVCache, new: KVCache, starts_B: jax.Array, counts_B: jax.Array, rows_B: jax.Array) -> KVCache:
    """The cache with the first counts_b of T new slots, [L, B, K, T, H], in row rows_b from starts_b on.

    By slices, a row at a time and all layers at once. For a scatter, XLA on TPUs gives the cache another layout: a copy of
    the whole before each program and one after it.
    """
    S = cache.k_LBKSH.shape[3]
    T = min(new.k_LBKSH.shape[3], S)

    def one(b: jax.Array, cache: KVCache) -> KVCache:
        first = jnp.minimum(starts_B[b], S - T)  # near the end of the cache the slice starts before the row's new slots
        shift = starts_B[b] - first
        steps_T = jnp.arange(T, dtype=jnp.int32) - shift
        mask_111T1 = ((steps_T >= 0) & (steps_T < counts_B[b])).reshape(1, 1, 1, T, 1)

        def put(x_LBKSH: jax.Array, new_LBKTH: jax.Array) -> jax.Array:
            new_L1KTH = jnp.roll(jax.lax.dynamic_slice_in_dim(new_LBKTH, b, 1, axis=1)[:, :, :, :T], shift, axis=3)
            at = (0, rows_B[b], 0, first, 0)
            old_L1KTH = jax.lax.dynamic_slice(x_LBKSH, at, new_L1KTH.shape)
            return jax.lax.dynamic_update_slice(x_LBKSH, jnp.where(mask_111T1, new_L1KTH, old_L1KTH), at)

        return jax.tree.map(put, cache, new)

    return jax.lax.fori_loop(0, rows_B.shape[0], one, cache)
