"""The mesh and every partition spec. Axes: data (replicas), fsdp (parameters and batch), tp (heads, ffn, vocabulary).

Axis types are Auto: XLA propagates from the shardings of parameters and batches, which are set where the arrays are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cacherl_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tp")

# Logical axes of parameters (model/qwen3.py) to mesh axes. None: replicated.
LOGICAL_TO_MESH: dict[str, str | None] = {
    "layer": None,
    "embed": "fsdp",
    "heads": "tp",
    "kv_heads": "tp",
    "head": None,
    "ffn": "tp",
    "vocab": "tp",
    "norm": None,
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (all by default). Raises ConfigError when the sizes do not multiply to their number."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = (config.data, config.fsdp, config.tp)
    if int(np.prod(sizes)) != len(devices):
        raise ConfigError(
            f"mesh data={config.data} x fsdp={config.fsdp} x tp={config.tp} = {int(np.prod(sizes))} devices, "
            f"but there are {len(devices)}"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def parameter_sharding(mesh: Mesh, shape: Sequence[int], logical: Sequence[str], name: str) -> NamedSharding:
    """Where a parameter lives. Raises ConfigError when a dimension does not divide over its mesh axis."""
    axes = [LOGICAL_TO_MESH[axis] for axis in logical]
    for size, axis, what in zip(shape, axes, logical, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ConfigError(f"{name}: {what} of size {size} does not divide over mesh axis {axis}={mesh.shape[axis]}")
    return NamedSharding(mesh, P(*axes))


def row_ways(mesh: Mesh) -> int:
    """In how many parts a batch's rows are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def place(batch: Any, mesh: Mesh) -> Any:
    """`batch`, a pytree of arrays with rows first, with its rows split over (data, fsdp).

    Raises ConfigError when the number of rows does not divide.
    """
    ways = row_ways(mesh)

    def put(x: Any) -> jax.Array:
        if x.shape[0] % ways:
            raise ConfigError(f"a batch of {x.shape[0]} rows does not divide over data x fsdp = {ways} devices")
        return jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))

    return jax.tree.map(put, batch)
