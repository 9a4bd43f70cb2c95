"""Names and layouts of Hugging Face's Qwen3ForCausalLM, in one table used both ways.

Their linear weights are [out, in], ours [in, out]. Layers are separate there, stacked here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from cacherl_jax import mesh as meshes
from cacherl_jax.config import ModelConfig
from cacherl_jax.model import qwen3
from cacherl_jax.model.qwen3 import Weight, layer_table

# ours -> theirs, within a layer. All matrices are transposed between the two.
LAYER_NAMES: dict[str, str] = {
    "attention_norm_D": "input_layernorm",
    "query_DA": "self_attn.q_proj",
    "key_DC": "self_attn.k_proj",
    "value_DC": "self_attn.v_proj",
    "query_norm_H": "self_attn.q_norm",
    "key_norm_H": "self_attn.k_norm",
    "output_AD": "self_attn.o_proj",
    "mlp_norm_D": "post_attention_layernorm",
    "gate_DF": "mlp.gate_proj",
    "up_DF": "mlp.up_proj",
    "down_FD": "mlp.down_proj",
}
TOP_NAMES: dict[str, str] = {
    "embed_VD": "model.embed_tokens.weight",
    "final_norm_D": "model.norm.weight",
    "unembed_VD": "lm_head.weight",
}
EMBEDDING, HEAD = TOP_NAMES["embed_VD"], TOP_NAMES["unembed_VD"]

# Reads a part of one of their tensors, given its name and a slice of each axis.
Read = Callable[[str, tuple[slice, ...]], np.ndarray]


class Place(NamedTuple):
    """Where one of their tensors belongs in our tree: the weight's name and, of a stack, the layer."""

    weight: str
    layer: int | None
    shape: tuple[int, ...]  # theirs


def places(config: ModelConfig) -> dict[str, Place]:
    """Every tensor of a checkpoint by its name there, from the embedding up."""
    V, D = config.vocab_size, config.hidden_size
    found = {EMBEDDING: Place("embed_VD", None, (V, D))}
    for i in range(config.num_layers):
        for ours, weight in layer_table(config).items():
            found[_name(ours, i)] = Place(ours, i, weight.shape[::-1])
    found[TOP_NAMES["final_norm_D"]] = Place("final_norm_D", None, (D,))
    return found if config.tie_word_embeddings else found | {HEAD: Place("unembed_VD", None, (V, D))}


def from_hf(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Our nested dict from a state dict of numpy arrays. Raises KeyError naming a tensor that is missing."""
    tree: dict[str, Any] = {
        ours: tensors[theirs] for ours, theirs in TOP_NAMES.items() if ours != "unembed_VD" or not config.tie_word_embeddings
    }
    layers = {}
    for ours in layer_table(config):
        stacked = [tensors[_name(ours, i)] for i in range(config.num_layers)]
        layers[ours] = np.stack([w.T for w in stacked])
    return tree | {"layers": layers}


def to_hf(config: ModelConfig, tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state dict of numpy arrays from our nested dict."""
    tensors = {TOP_NAMES[ours]: np.asarray(value) for ours, value in tree.items() if ours != "layers"}
    for ours, stacked in tree["layers"].items():
        for i, w in enumerate(np.asarray(stacked)):
            tensors[_name(ours, i)] = layer_to_hf(w)
    return tensors


def layer_to_hf(w: np.ndarray) -> np.ndarray:
    """Their tensor from one layer of a weight of ours."""
    return np.ascontiguousarray(w.T)


def load(config: ModelConfig, read: Read, mesh: Mesh, on_tensor: Callable[[], Any] = lambda: None) -> qwen3.Qwen3:
    """The model on `mesh` in config.dtype, every shard filled from the parts of their tensors that it holds.

    The host holds one tensor at a time, and of it what this process's devices need: stacks are filled where they lie, layer
    by layer. Raises ConfigError when a weight does not divide over the mesh.
    """
    dtype = jnp.dtype(config.dtype)

    def array(name: str, theirs: str, weight: Weight) -> jax.Array:
        blocks: dict[Any, np.ndarray] = {}  # devices that hold the same part share one reading of it

        def block(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # jax's own type allows it
            bounds = tuple(s.indices(n)[:2] for s, n in zip(index, weight.shape, strict=True))
            if bounds not in blocks:
                blocks[bounds] = _read_ours(read, name, theirs, bounds).astype(dtype, copy=False)
            return blocks[bounds]

        made = jax.make_array_from_callback(weight.shape, sharding(name, weight), block)
        made.block_until_ready()
        on_tensor()
        return made

    def sharding(name: str, weight: Weight) -> NamedSharding:
        return meshes.parameter_sharding(mesh, weight.shape, weight.axes, name)

    qwen3.shardings(config, mesh)  # refused before anything is read
    table = qwen3.table(config)
    tree = {name: array(name, TOP_NAMES[name], weight) for name, weight in table.items() if name != "layers"}
    layers = {}
    for name, weight in layer_table(config).items():
        whole = sharding(name, table["layers"][name])
        stack = jax.jit(lambda shape=table["layers"][name].shape: jnp.zeros(shape, dtype), out_shardings=whole)()
        put = jax.jit(_put_layer, donate_argnums=0, out_shardings=whole)
        for i in range(config.num_layers):
            stack = put(stack, array(name, _name(name, i), weight), i)
            stack.block_until_ready()  # the layer is let go of before the next is read
        layers[name] = stack
    return qwen3.from_dict(config, tree | {"layers": layers})


def _put_layer(stack: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)


def _read_ours(read: Read, name: str, theirs: str, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
    """The part of our weight within `bounds`, from the part of their tensor that holds it."""
    index = tuple(slice(*b) for b in bounds)
    return read(theirs, index) if name in TOP_NAMES else read(theirs, index[::-1]).T


def _name(ours: str, layer: int) -> str:
    return f"model.layers.{layer}.{LAYER_NAMES[ours]}.weight"
