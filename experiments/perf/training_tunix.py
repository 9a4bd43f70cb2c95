"""The side of Tunix: the jitted train step of its `PeftTrainer`, without its progress bar and logs. Started by training.py."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import rollouts_task
import training_task as task
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3.params import create_model_from_safe_tensors
from tunix.sft import utils
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput


def training(work: task.Work, root: Path) -> Any:
    sizes = task.MODELS[work.model]
    config = qwen3.ModelConfig(
        num_layers=sizes["layers"],
        vocab_size=sizes["vocab"],
        embed_dim=sizes["hidden"],
        hidden_dim=sizes["ffn"],
        num_heads=sizes["heads"],
        head_dim=sizes["head_dim"],
        num_kv_heads=sizes["kv_heads"],
        rope_theta=int(task.ROPE_THETA),
        norm_eps=task.EPS,
        use_tied_embedding=bool(sizes["tied"]),
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )
    model = create_model_from_safe_tensors(str(task.folder_of(work, root)), config, dtype=jnp.float32)
    adamw = optax.adamw(task.LEARNING_RATE, task.B1, task.B2, task.ADAM_EPS, weight_decay=0.0)
    trainer = PeftTrainer(model, optax.chain(optax.clip_by_global_norm(task.CLIP), adamw), TrainingConfig(eval_every_n_steps=1))

    def inputs(x: TrainingInput) -> dict[str, Any]:
        mask_BT = x.input_mask
        return {
            "input_tokens": x.input_tokens,
            "input_mask": mask_BT,
            "positions": utils.build_positions_from_mask(mask_BT),
            "attention_mask": utils.make_causal_attn_mask(mask_BT),
        }

    train_step, _ = trainer.with_gen_model_input_fn(inputs).jit_train_and_eval_step(cache_nnx_graph=True)
    tokens_BT = jnp.asarray(work.tokens_BT())
    batch = TrainingInput(tokens_BT, jnp.ones(tokens_BT.shape, bool))

    def train(count: int) -> list[Any]:
        losses = [train_step(batch)[0] for _ in range(count)]
        jax.block_until_ready((losses, jax.tree.leaves(trainer.model.__dict__.get("state", losses))))
        return losses

    return train


def main(root: Path) -> None:
    tally = rollouts_task.count_compilations()
    programs = {name: training(work, root) for name, work in task.WORKS.items()}
    versions = f"Tunix {version('google-tunix')}, jax {jax.__version__}, flax {version('flax')}"
    rollouts_task.serve(programs, tally, versions, task.described)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
