"""The mesh and every partition spec. Axes: data (replicas), fsdp (parameters and rows), seq (parameters and the tokens of a
row), tp (heads, ffn, vocabulary).

Axis types are Auto: XLA propagates from the shardings of parameters and batches, which are set where the arrays are made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cacherl_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "seq", "tp")
AUTO = (AxisType.Auto,) * len(AXES)
ROWS = ("data", "fsdp")  # the axes that split rows
SHARDED = ("fsdp", "seq")  # the axes that split parameters along the hidden size
TOKENS_BT = P(ROWS, "seq")
HIDDEN_BTD = P(ROWS, "seq", None)
HEADS_BTNH = P(ROWS, "seq", "tp", None)

# Logical axes of parameters (model/qwen3.py) to mesh axes. None: replicated.
LOGICAL_TO_MESH: dict[str, str | tuple[str, ...] | None] = {
    "layer": None,
    "embed": SHARDED,
    "heads": "tp",
    "kv_heads": "tp",
    "ffn": "tp",
    "vocab": "tp",
    "norm": None,
    "rank": None,
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (all by default). Raises ConfigError when the sizes do not multiply to their number, or the
    devices are not of as many slices as `config.slices` says."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = (config.data, config.fsdp, config.seq, config.tp)
    if int(np.prod(sizes)) != len(devices):
        product = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ConfigError(f"mesh {product} = {int(np.prod(sizes))} devices, but there are {len(devices)}")
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) != config.slices:
        raise ConfigError(f"mesh.slices={config.slices}, but the devices are of {len(slices)} slices")
    if config.slices == 1:
        return jax.make_mesh(sizes, AXES, axis_types=AUTO, devices=devices)
    within = (config.data // config.slices, *sizes[1:])
    hybrid = mesh_utils.create_hybrid_device_mesh(within, (config.slices, 1, 1, 1), devices)
    return Mesh(hybrid, AXES, axis_types=AUTO)


def parameter_sharding(mesh: Mesh, shape: Sequence[int], logical: Sequence[str], name: str) -> NamedSharding:
    """Where a parameter lives. Raises ConfigError when a dimension does not divide over its mesh axis."""
    axes = [LOGICAL_TO_MESH[axis] for axis in logical]
    for size, axis, what in zip(shape, axes, logical, strict=True):
        over = () if axis is None else (axis,) if isinstance(axis, str) else axis
        if size % math.prod(mesh.shape[a] for a in over):
            named = " x ".join(f"{a}={mesh.shape[a]}" for a in over)
            raise ConfigError(f"{name}: {what} of size {size} does not divide over mesh axis {named}")
    return NamedSharding(mesh, P(*axes))


def one_device() -> Mesh:
    """The first device alone, for work that needs no others."""
    return make_mesh(MeshConfig(), jax.devices()[:1])


def rollout_mesh(mesh: Mesh, tp: int) -> Mesh:
    """The same devices laid out for rollouts: rows over all of them but `tp` ways of heads (0: as many as in `mesh`).

    Raises ConfigError when the devices of a process do not divide: its rows would lie on another's devices.
    """
    devices, tp = mesh.devices.reshape(-1), tp or mesh.shape["tp"]
    own = len(devices) // jax.process_count()
    if own % tp:
        raise ConfigError(f"rollout.tp={tp} does not divide the {own} devices of a process")
    # Not by jax.make_mesh: where links matter it orders devices anew, and those of one tp group may lie on two hosts.
    by_host = sorted(devices, key=lambda d: (d.process_index, d.id))
    return Mesh(np.array(by_host).reshape(-1, 1, 1, tp), AXES, axis_types=AUTO)


def row_ways(mesh: Mesh) -> int:
    """In how many parts a batch's rows are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def place(batch: Any, mesh: Mesh) -> Any:
    """`batch`, a pytree of arrays [B, T], with its rows split over (data, fsdp) and its tokens over seq.

    Every process holds the whole batch and gives its own devices their part of it. Raises ConfigError when rows or tokens do
    not divide.
    """
    ways, seq = row_ways(mesh), mesh.shape["seq"]

    def put(x: Any) -> jax.Array:
        if x.shape[0] % ways:
            raise ConfigError(f"a batch of {x.shape[0]} rows does not divide over data x fsdp = {ways} devices")
        if x.shape[1] % seq:
            raise ConfigError(f"rows of {x.shape[1]} tokens do not divide over seq = {seq} devices")
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, TOKENS_BT), lambda index: x[index])

    return jax.tree.map(put, batch)


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Of an array with rows first."""
    return NamedSharding(mesh, P(ROWS))


def cache_sharding(mesh: Mesh) -> NamedSharding:
    """Of a KV cache [L, B, K, S, H]: rows over the data axes, heads over tp."""
    return NamedSharding(mesh, P(None, ROWS, "tp"))


def local_row_ways(mesh: Mesh) -> int:
    """In how many parts the rows of this process are split."""
    parts = rows_sharding(mesh).addressable_devices_indices_map((row_ways(mesh),)).values()
    return len({part[0].start or 0 for part in parts if part})


def local_rows(x: jax.Array) -> np.ndarray:
    """The rows of an array, rows first, that lie on devices of this process, in order."""
    if x.is_fully_addressable:
        return np.asarray(x)
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def constrain(x: jax.Array, mesh: Mesh | None, spec: P) -> jax.Array:
    """Inside a program: `x` laid out on `mesh` as `spec` says; as it is where there is no mesh."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def gathered(x: jax.Array) -> jax.Array:
    """Inside a program over a mesh: `x` whole on every device of a tp group. Outside of one, `x`."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, P(*[None] * x.ndim))
