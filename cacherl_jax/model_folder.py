"""A folder with a model to start from: what `cacherl convert` writes, and in part what a finished stage leaves.

    DIR/model.json      its ModelConfig
    DIR/checkpoints/0/  the weights, as a stage's checkpoints hold them: checkpoint.restore_model reads them onto any mesh
    DIR/tokenizer/      tokenizer.json and the rest of the original, byte for byte: config.json, chat template, ...

A stage has `checkpoints` too; its ModelConfig stands in settings.json, its tokenizer in the stage `think` beside it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from cacherl_jax import mesh as meshes
from cacherl_jax.config import Config, ConfigError, ModelConfig
from cacherl_jax.model import qwen3

CHUNK_BYTES = 64 * 2**20  # of a file on disk: what a device reads to get its part, and what is compressed at once


def write(folder: Path, model: qwen3.Qwen3) -> None:
    """Writes model.json and checkpoints/ into `folder`. One stack of weights at a time is on its way to disk."""
    tree = {"model": qwen3.to_dict(model)}
    room = 1 + max(x.nbytes for x in jax.tree.leaves(tree))  # orbax wants more than the largest
    handler = ocp.PyTreeCheckpointHandler(handler_impl=ocp.BasePyTreeCheckpointHandler(save_concurrent_bytes=room))
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    with ocp.CheckpointManager((folder / "checkpoints").resolve(), item_handlers=handler) as manager:
        manager.save(0, args=ocp.args.PyTreeSave(tree, save_args=chunks))
        manager.wait_until_finished()
    (folder / "model.json").write_text(json.dumps(dataclasses.asdict(model.config), indent=1) + "\n")


def is_converted(folder: Path) -> bool:
    return (folder / "model.json").is_file()


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of a converted model or of a stage is."""
    return folder / "tokenizer" if is_converted(folder) else folder.parent / "think" / "tokenizer"


def model_config(folder: Path) -> ModelConfig:
    """The configuration of the model in `folder`. Raises ConfigError when it holds none, or a stage that has not finished."""
    if is_converted(folder):
        data = json.loads((folder / "model.json").read_text())
    elif (folder / "settings.json").is_file() and (folder / "checkpoints").is_dir():
        if not (folder / "done.json").is_file():
            raise ConfigError(f"{folder} is a stage that has not finished")
        data = json.loads((folder / "settings.json").read_text())["model"]
    else:
        raise ConfigError(f"{folder} holds no model: neither model.json nor a stage's settings.json and checkpoints/")
    if not data["vocab_size"]:  # a stage takes it from its tokenizer
        data["vocab_size"] = _saved_shapes(folder)["embed_VD"][0]
    return Config.from_json({"model": data}).model


def stacks(folder: Path, config: ModelConfig, mesh: jax.sharding.Mesh) -> Iterator[tuple[str, jax.Array]]:
    """Every weight of the newest checkpoint by its name, layers stacked, one after the other: the caller lets go of each.

    Raises ConfigError naming a weight that is missing, surplus or misshapen, before the first.
    """
    table = qwen3.table(config)
    weights = {name: w for name, w in table.items() if name != "layers"} | table["layers"]
    saved = _saved_shapes(folder)
    for name in sorted(saved.keys() | weights.keys()):
        expected = weights[name].shape if name in weights else None
        if saved.get(name) != expected:
            raise ConfigError(f"weight {name!r} of {folder} has shape {saved.get(name)}, expected {expected}")
    with ocp.CheckpointManager((folder / "checkpoints").resolve()) as manager:
        for name, weight in weights.items():
            sharding = meshes.parameter_sharding(mesh, weight.shape, weight.axes, name)
            like = jax.ShapeDtypeStruct(weight.shape, jnp.dtype(config.dtype), sharding=sharding)
            tree = {"model": {"layers": {name: like}} if name in table["layers"] else {name: like}}
            arguments = ocp.args.PyTreeRestore(
                tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
            )
            yield name, jax.tree.leaves(manager.restore(manager.latest_step(), args=arguments))[0]


def _saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of the newest checkpoint, layers stacked."""
    with ocp.CheckpointManager((folder / "checkpoints").resolve(), item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        step = manager.latest_step()
        if step is None:
            raise ConfigError(f"no checkpoint in {folder / 'checkpoints'}")
        tree = manager.item_metadata(step).tree["model"]
    return {name: tuple(w.shape) for name, w in (tree | tree["layers"]).items() if name != "layers"}


def conversion_mesh(hidden_size: int) -> jax.sharding.Mesh:
    """As many of the host's devices as divide the hidden size: converting takes none of an accelerator's memory."""
    devices = jax.local_devices(backend="cpu")
    ways = math.gcd(hidden_size, len(devices))
    return meshes.make_mesh(dataclasses.replace(Config().mesh, fsdp=ways), devices[:ways])
