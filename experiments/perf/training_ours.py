"""Our side: gradients of a batch and the update, as train/sft.py runs them. Started by training.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import rollouts_task
import training_task as task
from safetensors.numpy import load_file
from training import model_config

from cacherl_jax.config import OptimizerConfig
from cacherl_jax.data.pipeline import Row, collate
from cacherl_jax.model import qwen3
from cacherl_jax.model.hf import from_hf
from cacherl_jax.train import step as steps
from cacherl_jax.train.optimizer import make_optimizer

OPTIMIZER = OptimizerConfig(
    name="adamw", learning_rate=task.LEARNING_RATE, b1=task.B1, b2=task.B2, clip_norm=task.CLIP, warmup_steps=0, schedule="constant"
)


def training(work: task.Work, root: Path) -> Any:
    config, tensors = model_config(work.model), load_file(task.folder_of(work, root) / "model.safetensors")
    model = qwen3.Qwen3(config, jax.tree.map(jax.numpy.asarray, from_hf(config, tensors)))
    tx = make_optimizer(OPTIMIZER, 1_000_000)
    update, state = steps.make_update(tx), steps.TrainState.create(model, tx)
    rows = [Row(tokens_T, tokens_T >= 0) for tokens_T in work.tokens_BT()]
    batch = jax.tree.map(jax.numpy.asarray, collate(rows, work.length, work.rows))

    def train(count: int) -> list[Any]:
        nonlocal state
        losses = []
        for _ in range(count):
            gradients, values, _ = steps.accumulate(steps.sft_gradients, state.model, None, [batch])
            state, _ = update(state, gradients)
            losses.append(values["loss"])
        jax.block_until_ready(state)
        return losses

    return train


def main(root: Path) -> None:
    tally = rollouts_task.count_compilations()
    programs = {name: training(work, root) for name, work in task.WORKS.items()}
    rollouts_task.serve(programs, tally, f"cacherl_jax, jax {jax.__version__}", task.described)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
