"""A folder with a model to start from: what `cacherl convert` writes, and in part what a finished stage leaves.

    DIR/model.json      its ModelConfig
    DIR/checkpoints/0/  the weights, as a stage's checkpoints hold them: checkpoint.restore_model reads them onto any mesh
    DIR/tokenizer/      tokenizer.json and the rest of the original, byte for byte: config.json, chat template, ...

A stage has `checkpoints` too; its ModelConfig stands in settings.json, its tokenizer in the stage `think` beside it or, of a
round's stage, beside the round.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts  # comes with orbax-checkpoint, a core dependency

from cacherl_jax import mesh as meshes
from cacherl_jax.config import Config, ConfigError, ModelConfig
from cacherl_jax.model import qwen3

# On disk: what is compressed at once, and after how much a file is closed. Both are held in memory while they are written.
# A layer lies in chunks of its own, so that it can be read alone, whatever mesh wrote it.
CHUNK_BYTES, FILE_BYTES = 8 * 2**20, 32 * 2**20


def write(folder: Path, model: qwen3.Qwen3) -> None:
    """Writes model.json and checkpoints/ into `folder`. One stack of weights at a time is on its way to disk."""
    tree = {"model": qwen3.to_dict(model)}
    room = 1 + max(x.nbytes for x in jax.tree.leaves(tree))  # orbax wants more than the largest
    handler = ocp.PyTreeCheckpointHandler(handler_impl=ocp.BasePyTreeCheckpointHandler(save_concurrent_bytes=room))
    with ocp.CheckpointManager((folder / "checkpoints").resolve(), item_handlers=handler) as manager:
        manager.save(0, args=ocp.args.PyTreeSave(tree, save_args=save_args(tree), ocdbt_target_data_file_size=FILE_BYTES))
        manager.wait_until_finished()
    (folder / "model.json").write_text(json.dumps(dataclasses.asdict(model.config), indent=1) + "\n")


def save_args(tree: dict[str, Any]) -> Any:
    """How orbax lays out a tree with "model", a model as a nested dict."""
    args: Any = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    if "layers" in tree["model"]:  # an adapter has none
        by_layer = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,))
        args["model"]["layers"] = jax.tree.map(lambda _: by_layer, tree["model"]["layers"])
    return args


def is_converted(folder: Path) -> bool:
    return (folder / "model.json").is_file()


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of a converted model or of a stage is. Raises ConfigError when a stage has none beside it."""
    if is_converted(folder):
        return folder / "tokenizer"
    for beside in folder.resolve().parents[:2]:
        if (found := beside / "think" / "tokenizer").is_dir():
            return found
    raise ConfigError(f"{folder} has no tokenizer: neither {folder.parent} nor its parent holds the stage `think`")


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


def reader(folder: Path, config: ModelConfig) -> Callable[[str, int | None], np.ndarray]:
    """read(weight, layer), from the newest checkpoint as it is stored; layer None is the whole weight.

    A layer is read alone, where orbax would bring the stack: what is held beside it are the stored chunks that it lies in.
    Raises ConfigError naming a weight that is missing, surplus or misshapen.
    """
    table = qwen3.table(config)
    expected = {name: w.shape for name, w in (table | table["layers"]).items() if name != "layers"}
    saved = _saved_shapes(folder)
    for name in sorted(saved.keys() | expected.keys()):
        if saved.get(name) != expected.get(name):
            raise ConfigError(f"weight {name!r} of {folder} has shape {saved.get(name)}, expected {expected.get(name)}")
    opened: dict[str, ts.TensorStore] = {}

    def read(name: str, layer: int | None) -> np.ndarray:
        if name not in opened:
            opened.clear()  # and with it the chunks of the one before
            opened[name] = _opened(folder, f"layers.{name}" if name in table["layers"] else name)
        stored = opened[name] if layer is None else opened[name][layer]
        return stored.read().result()

    return read


def _opened(folder: Path, path: str) -> ts.TensorStore:
    """An array of the newest checkpoint, which orbax stores as zarr in an OCDBT database."""
    store = {"driver": "ocdbt", "base": f"file://{_newest(folder) / 'default'}/", "path": f"model.{path}/"}
    plain = ts.open({"driver": "auto", "kvstore": store}, read=True).result()
    chunk = plain.chunk_layout.read_chunk.shape
    if not chunk or chunk[0] in (None, 1):
        return plain
    # A stage's chunk is a device's whole stack: decoded once, not for each layer.
    room = plain.dtype.numpy_dtype.itemsize * chunk[0] * math.prod(plain.shape[1:])
    context = ts.Context({"cache_pool": {"total_bytes_limit": 2 * room}})
    return ts.open({"driver": "auto", "kvstore": store}, read=True, context=context, recheck_cached_data=False).result()


def _newest(folder: Path) -> Path:
    with ocp.CheckpointManager((folder / "checkpoints").resolve()) as manager:
        return Path(manager.directory) / str(manager.latest_step())


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
