"""Low-rank adapters (LoRA): W + alpha / rank * A B for chosen matrices W of every layer, W frozen.

An adapter is a frozen pytree beside the model. Its attributes bear the names of the weights they belong to; qwen3.py adds
their part wherever a layer multiplies by such a weight. Layers are stacked, as there. Axis letters as there, R the rank.
Source: Hu et al., arXiv 2106.09685; starting values as in the PEFT library.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from cacherl_jax import mesh as meshes
from cacherl_jax.config import ConfigError, LoraConfig, ModelConfig
from cacherl_jax.model import hf, qwen3
from cacherl_jax.model.qwen3 import Qwen3

# The names of the configuration to those of the weights, in the order of the layer.
WEIGHTS: dict[str, str] = {
    "query": "query_DA",
    "key": "key_DC",
    "value": "value_DC",
    "output": "output_AD",
    "gate": "gate_DF",
    "up": "up_DF",
    "down": "down_FD",
}


class Weight(NamedTuple):
    """A row of the table of parameters. bound is that of the uniform distribution of starting values; 0 gives zeros."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    bound: float


def table(model: ModelConfig, config: LoraConfig) -> dict[str, dict[str, Weight]]:
    """All parameters of an adapter as the nested dict that checkpoints hold: for each weight "a" and "b".

    They are [L, inputs, R] and [L, R, outputs]. Raises ConfigError when nothing is adapted.
    """
    if not config.rank or not config.matrices:
        raise ConfigError(f"an adapter of rank {config.rank} for matrices {list(config.matrices)} has no parameters")
    layer, L, R = qwen3.layer_table(model), model.num_layers, config.rank
    rows = {}
    for name in (weight for short, weight in WEIGHTS.items() if short in config.matrices):
        (inputs, outputs), axes, _ = layer[name]
        a = Weight((L, inputs, R), ("layer", axes[0], "rank"), inputs**-0.5)  # Kaiming's uniform with slope sqrt(5)
        rows[name] = {"a": a, "b": Weight((L, R, outputs), ("layer", "rank", axes[1]), 0.0)}
    return rows


class Factors(nnx.Module):
    """A and B of one weight of all layers; inside the scan, of one."""

    a: nnx.Param
    b: nnx.Param

    def __init__(self, tree: dict[str, Any]) -> None:
        self.a, self.b = nnx.Param(tree["a"]), nnx.Param(tree["b"])


class Adapter(nnx.Module):
    """The factors by the names of their weights (`adapter.query_DA.a`), and the static configurations."""

    def __init__(self, model: ModelConfig, config: LoraConfig, tree: dict[str, Any]) -> None:
        self.model, self.config = model, config
        for name, factors in tree.items():
            setattr(self, name, Factors(factors))

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.config.alpha / self.config.rank


def init(model: ModelConfig, config: LoraConfig, key: jax.Array, mesh: Mesh | None = None) -> Adapter:
    """A new adapter in float32, each factor made on its own shard when `mesh` is given: A random, B zero, so that the model
    is what it was. Raises ConfigError if a factor does not divide over the mesh."""
    rows = table(model, config)
    keys = dict(zip(rows, jax.random.split(key, len(rows)), strict=True))

    def value(name: str, w: Weight) -> jax.Array:
        if not w.bound:
            return jnp.zeros(w.shape, jnp.float32)
        return jax.random.uniform(keys[name], w.shape, jnp.float32, -w.bound, w.bound)

    def build() -> dict[str, Any]:
        return {name: {part: value(name, w) for part, w in parts.items()} for name, parts in rows.items()}

    where = None if mesh is None else _shardings(rows, mesh)
    return Adapter(model, config, jax.jit(build, out_shardings=where)())


def shardings(model: ModelConfig, config: LoraConfig, mesh: Mesh) -> Adapter:
    """Where each factor lives on `mesh`, as an adapter of shardings: an axis that it shares with its weight is split alike."""
    return Adapter(model, config, _shardings(table(model, config), mesh))


def _shardings(rows: dict[str, dict[str, Weight]], mesh: Mesh) -> dict[str, Any]:
    return {
        name: {part: meshes.parameter_sharding(mesh, w.shape, w.axes, f"{name}.{part}") for part, w in parts.items()}
        for name, parts in rows.items()
    }


def to_dict(adapter: Adapter) -> dict[str, Any]:
    """The nested dict of arrays that `from_dict` takes and checkpoints hold."""
    factors = {name: getattr(adapter, name) for name in table(adapter.model, adapter.config)}
    return {name: {"a": f.a[...], "b": f.b[...]} for name, f in factors.items()}


def from_dict(model: ModelConfig, config: LoraConfig, tree: dict[str, Any]) -> Adapter:
    """The adapter from a nested dict of arrays shaped as `table` says. Raises ValueError naming what differs."""
    expected = {f"{name}.{part}": w.shape for name, parts in table(model, config).items() for part, w in parts.items()}
    found = {f"{name}.{part}": tuple(x.shape) for name, parts in tree.items() for part, x in parts.items()}
    if expected.keys() != found.keys():
        raise ValueError(f"adapter does not match: missing or surplus {sorted(expected.keys() ^ found.keys())}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"adapter's {name} has shape {found[name]}, expected {shape}")
    return Adapter(model, config, tree)


# ---- with a model ----------------------------------------------------------------------------------------------------


def attach(base: Qwen3, adapter: Adapter) -> Qwen3:
    """The model that computes with both. It shares its arrays with `base` and `adapter`.

    Raises ValueError when they are of different models, or `base` has an adapter already.
    """
    if base.adapter is not None:
        raise ValueError("the model has an adapter already; merge or detach it first")
    # How weights are stored and drawn is the base's own affair.
    if table(base.config, adapter.config) != table(adapter.model, adapter.config):
        raise ValueError(f"the adapter was made for {adapter.model}, not for {base.config}")
    return _with_adapter(base, adapter)


def detach(model: Qwen3) -> Qwen3:
    """The model without its adapter: its base."""
    return _with_adapter(model, None)


def _with_adapter(model: Qwen3, adapter: Adapter | None) -> Qwen3:
    new = jax.tree.map(lambda x: x, model)  # another object with the same arrays
    new.adapter = nnx.data(adapter)
    return new


def merge(model: Qwen3, *, donate: bool = False) -> Qwen3:
    """The model with W + alpha / rank * A B in place of W and the adapter, the sum taken in float32 and rounded to W's dtype.

    Layer by layer: no float32 copy of a stack is made. `donate` gives the base's matrices away: then they are changed in
    place, and the base, with every model that shares them, is gone.
    """
    if model.adapter is None:
        raise ValueError("the model has no adapter to merge")
    merged = detach(model)
    for name, factors in to_dict(model.adapter).items():
        w = getattr(model.layers, name)[...]
        new = _adding(w.sharding, donate)(w, factors["a"], factors["b"], model.adapter.scale)
        setattr(merged.layers, name, nnx.Param(new))
    return merged


@functools.cache
def _adding(where: jax.sharding.Sharding, donate: bool) -> Callable[..., jax.Array]:
    return jax.jit(_add_product, donate_argnums=(0,) if donate else (), out_shardings=where)


def _add_product(w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """The stack w with scale * a b added to each of its layers."""

    def layer(i: jax.Array, w: jax.Array) -> jax.Array:
        a_i, b_i = (jax.lax.dynamic_index_in_dim(x, i, keepdims=False).astype(jnp.float32) for x in (a, b))
        product = jnp.matmul(a_i, b_i, precision=jax.lax.Precision.HIGHEST)
        old = jax.lax.dynamic_index_in_dim(w, i, keepdims=False)
        new = (old.astype(jnp.float32) + scale * product).astype(w.dtype)
        return jax.lax.dynamic_update_index_in_dim(w, new, i, 0)

    return jax.lax.fori_loop(0, w.shape[0], layer, w)


# ---- the PEFT library's layout ---------------------------------------------------------------------------------------


def peft_config(adapter: Adapter, base: str) -> dict[str, Any]:
    """What PEFT's adapter_config.json says; `base` is the name or folder of the model that the adapter belongs to."""
    modules = [hf.LAYER_NAMES[name].rpartition(".")[2] for name in table(adapter.model, adapter.config)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.config.rank,
        "lora_alpha": adapter.config.alpha,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }


def peft_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """The tensors of PEFT's adapter_model.safetensors by name: lora_A [rank, in] and lora_B [out, rank] of each layer."""
    tensors = {}
    for name, factors in to_dict(adapter).items():
        for i, (a_IR, b_RO) in enumerate(zip(np.asarray(factors["a"]), np.asarray(factors["b"]), strict=True)):
            module = f"base_model.model.model.layers.{i}.{hf.LAYER_NAMES[name]}"
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a_IR.T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b_RO.T)
    return tensors
