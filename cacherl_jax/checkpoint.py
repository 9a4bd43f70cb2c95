"""Checkpoints by orbax: the model as a nested dict under our own names, the optimizer's state, the number of updates; and
where it does not follow from the step, the position in the data, in the JSON beside them.

That is all there is to save: batches, their order and every random key are functions of (seed, step, position), so that a
run which goes on from a checkpoint meets the same ones. Arrays are restored onto whatever mesh the reader names.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from cacherl_jax.config import ModelConfig
from cacherl_jax.model import qwen3
from cacherl_jax.model_folder import FILE_BYTES, save_args
from cacherl_jax.train.step import TrainState


class Checkpoints:
    """The checkpoints of one training run: the newest `latest`, and the `best` whose metric was highest.

    `save` returns when the state is on the host; it is written while training goes on, and a half-written checkpoint is
    never taken for whole. orbax is called by a thread of its own, which no Ctrl-C reaches: interrupted in its own
    bookkeeping it can wait for minutes, or refuse the next save. What was begun is finished before the process ends.
    """

    def __init__(self, directory: Path, *, latest: int = 1, best: int = 0) -> None:
        # best_fn makes orbax store metrics; with max_to_keep it would delete the newest where an older one is better.
        self._best = best
        policies = [LatestN(latest), BestN(get_metric_fn=_metric, n=best, keep_checkpoints_without_metrics=False)]
        options = ocp.CheckpointManagerOptions(
            create=True,
            cleanup_tmp_directories=True,  # of a process that was killed
            best_fn=_metric if best else None,
            preservation_policy=AnyPreservationPolicy(policies),
        )
        self._manager = ocp.CheckpointManager(directory.resolve(), options=options, item_handlers=ocp.PyTreeCheckpointHandler())
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._writer:
            self._writer.submit(self._manager.close).result()

    def save(self, step: int, state: TrainState, metric: float | None = None, position: int | None = None) -> None:
        """Saves the state after `step` steps; once is enough. Waits for the save before it, not for this one.

        Raises what went wrong in the save before; leaving the `with` raises what went wrong in the last.
        """
        if step > 0 and self._manager.latest_step() != step:
            metrics = {"metric": metric} if self._best else None
            about = None if position is None else {"position": position}
            self._writer.submit(self._begin, step, _tree(state), metrics, about).result()

    def _begin(
        self, step: int, tree: dict[str, Any], metrics: dict[str, float | None] | None, about: dict[str, Any] | None
    ) -> None:
        args = ocp.args.PyTreeSave(tree, save_args=save_args(tree), ocdbt_target_data_file_size=FILE_BYTES)
        self._manager.save(step, args=args, metrics=metrics, custom_metadata=about)

    def restore(self, like: TrainState) -> tuple[int, TrainState] | None:
        """The newest checkpoint, as `like` says: arrays, or their shapes with shardings. None where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        tree = self._manager.restore(step, args=_restore_args(_tree(like)))
        opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), tree["optimizer"])
        return step, TrainState(_from_dict(like.model, tree["model"]), opt_state, tree["step"])

    def position(self) -> int | None:
        """The position that the newest checkpoint was saved with; None where there is none."""
        step = self._manager.latest_step()
        return None if step is None else (self._manager.metadata(step).custom_metadata or {}).get("position")


def restore_model(directory: Path, like: qwen3.Qwen3) -> qwen3.Qwen3:
    """The model of the newest checkpoint as `like` says, such as `abstract_model`: no other copy of the weights is made.

    Raises FileNotFoundError where there is none.
    """
    with ocp.CheckpointManager(directory.resolve(), item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {directory}")
        tree = manager.restore(step, args=_restore_args({"model": _to_dict(like)}, partial=True))
        return _from_dict(like, tree["model"])


# ---- shapes instead of arrays ----------------------------------------------------------------------------------------


def abstract_model(config: ModelConfig, mesh: Mesh) -> qwen3.Qwen3:
    """The model's shapes, dtypes and places on `mesh`, to restore into. Raises ConfigError if a weight does not divide."""
    shapes = jax.eval_shape(lambda: qwen3.init(config, jax.random.key(0)))
    return jax.tree.map(_placed, shapes, qwen3.shardings(config, mesh))


def abstract_state(model: Any, tx: Any, mesh: Mesh) -> TrainState:
    """The shapes and places of a training state of `model`, itself shapes with places, to restore into.

    What the optimizer holds for a parameter, in the parameter's shape, lies where the parameter lies; the rest on every
    device.
    """
    state = jax.eval_shape(lambda model: TrainState.create(model, tx), model)
    places = {_names(path): x for path, x in jax.tree_util.tree_leaves_with_path(model)}

    def place(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = _names(path)
        of = next((places[names[i:]] for i in range(len(names)) if names[i:] in places), None)
        return _placed(x, of.sharding if of is not None and of.shape == x.shape else NamedSharding(mesh, P()))

    opt_state = jax.tree_util.tree_map_with_path(place, state.opt_state)
    step: Any = _placed(state.step, NamedSharding(mesh, P()))
    return TrainState(model, opt_state, step)


def new_state(model: Any, tx: Any, mesh: Mesh) -> TrainState:
    """A training state of `model` without updates, placed as `abstract_state` says: that of a run which has no checkpoint."""
    shapes = jax.tree.map(lambda x: _placed(x, x.sharding), model)
    places = jax.tree.map(lambda x: x.sharding, abstract_state(shapes, tx, mesh))

    def rest(model: Any) -> Any:
        state = TrainState.create(model, tx)
        return state.opt_state, state.step

    opt_state, step = jax.jit(rest, out_shardings=(places.opt_state, places.step))(model)
    return TrainState(model, opt_state, step)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


# ---- on disk ---------------------------------------------------------------------------------------------------------


def _tree(state: TrainState) -> dict[str, Any]:
    # The optimizer's state as a flat list: on disk are arrays, never objects of a framework.
    return {"model": _to_dict(state.model), "optimizer": jax.tree.leaves(state.opt_state), "step": state.step}


def _to_dict(model: Any) -> dict[str, Any]:
    """A module's arrays, or their shapes, as nested dicts under the names of its attributes, as `qwen3.to_dict` gives them."""
    tree: dict[str, Any] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(model):
        *parents, name = _attributes(path)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = x
    return tree


def _from_dict(like: Any, tree: dict[str, Any]) -> Any:
    def find(path: Any, _: Any) -> Any:
        node: Any = tree
        for name in _attributes(path):
            node = node[name]
        return node

    return jax.tree_util.tree_map_with_path(find, like)


def _attributes(path: Any) -> list[str]:
    return [name for name in _names(path) if name != "value"]  # the last step, inside an nnx.Param


def _metric(metrics: dict[str, float | None]) -> float:
    return -math.inf if metrics["metric"] is None else metrics["metric"]


def _restore_args(like: Any, *, partial: bool = False) -> Any:
    abstract = jax.tree.map(lambda x: _placed(x, x.sharding), like)
    return ocp.args.PyTreeRestore(
        abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=partial
    )
