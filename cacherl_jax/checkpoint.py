"""Checkpoints by orbax: the model as a nested dict under our own names, the optimizer's state, the number of updates."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from cacherl_jax.model import qwen3
from cacherl_jax.train.step import TrainState


def _tree(state: TrainState) -> dict[str, Any]:
    # The optimizer's state as a flat list: on disk are arrays, never objects of a framework.
    return {"model": qwen3.to_dict(state.model), "optimizer": jax.tree.leaves(state.opt_state), "step": state.step}


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


class Checkpoints:
    """The checkpoints of one training run, the newest `keep` of them. A half-written one is never taken for whole.

    They are written by a thread of their own, which no Ctrl-C reaches: orbax interrupted in its own bookkeeping can wait
    for minutes, or refuse the next save. A checkpoint that was begun is finished before the process ends.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        self._manager = ocp.CheckpointManager(
            directory.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        )
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._writer:
            self._writer.submit(self._manager.close).result()

    def save(self, step: int, state: TrainState) -> None:
        """Writes the state after `step` updates; once is enough. Returns when it is on disk."""
        if step > 0 and self._manager.latest_step() != step:
            self._writer.submit(self._write, step, state).result()

    def _write(self, step: int, state: TrainState) -> None:
        self._manager.save(step, args=ocp.args.StandardSave(_tree(state)))
        self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> tuple[int, TrainState] | None:
        """The newest checkpoint, placed as `like` is; None where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        tree = self._manager.restore(step, args=ocp.args.StandardRestore(_abstract(_tree(like))))
        opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), tree["optimizer"])
        return step, TrainState(qwen3.from_dict(like.model.config, tree["model"]), opt_state, tree["step"])


def restore_model(directory: Path, like: qwen3.Qwen3) -> qwen3.Qwen3:
    """The model of the newest checkpoint, placed as `like` is. Raises FileNotFoundError where there is none."""
    with ocp.CheckpointManager(directory.resolve()) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {directory}")
        handler = ocp.args.PyTreeRestore(
            {"model": _abstract(qwen3.to_dict(like))},
            restore_args={"model": ocp.checkpoint_utils.construct_restore_args(_abstract(qwen3.to_dict(like)))},
            partial_restore=True,
        )
        return qwen3.from_dict(like.config, manager.restore(step, args=handler)["model"])
