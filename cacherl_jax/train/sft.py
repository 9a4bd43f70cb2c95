"""Supervised fine-tuning: next-token loss on the assistant's own tokens of recorded (and thinking-augmented) episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax

from cacherl_jax import checkpoint, interrupts, mesh, metrics
from cacherl_jax.config import Config
from cacherl_jax.data.pipeline import EpochBatches, Row
from cacherl_jax.model import qwen3
from cacherl_jax.text import chat
from cacherl_jax.text.tokenizer import Tokenizer
from cacherl_jax.train import step as steps
from cacherl_jax.train.optimizer import make_optimizer
from cacherl_jax.types import ToolSpec, Transcript


def transcript_rows(
    tok: Tokenizer, transcripts: Iterable[Transcript], specs: Mapping[str, ToolSpec], *, context: int, max_tool_tokens: int
) -> tuple[list[Row], int]:
    """Rows to train on, and how many transcripts were left out for being longer than `context` tokens.

    None is cut: a cut transcript would teach the model to stop where the context ends.
    """
    rows, too_long = [], 0
    for transcript in transcripts:
        tokens_T, sampled_T, _ = chat.transcript_tokens(tok, transcript, specs, max_tool_tokens)
        if len(tokens_T) > context:
            too_long += 1
        else:
            rows.append(Row(tokens_T, sampled_T))
    return rows, too_long


def train(
    config: Config,
    rows: Sequence[Row],
    directory: Path,
    *,
    progress: Callable[..., metrics.Progress],
) -> qwen3.Qwen3:
    """Trains from scratch for `config.sft.steps` updates, or goes on from the newest checkpoint in `directory`.

    Ctrl-C saves before it ends the run. The same rows, config and seed give the same losses, interrupted or not.
    """
    tx = make_optimizer(config.sft.optimizer, config.sft.steps)
    devices = mesh.make_mesh(config.mesh)
    state = steps.TrainState.create(qwen3.init(config.model, jax.random.key(config.seed), devices), tx)
    with interrupts.held(), checkpoint.Checkpoints(directory / "checkpoints", keep=1) as saved:
        done, state = saved.restore(state) or (0, state)
        batches = EpochBatches(rows, tokens_per_batch=config.sft.tokens_per_batch, seed=config.seed, ways=mesh.row_ways(devices))
        update = steps.make_update(tx)
        log = metrics.MetricsWriter(directory / "metrics.jsonl", resume_step=done)
        try:
            with log, progress(total=config.sft.steps, initial=done, desc=directory.name) as bar:
                while done < config.sft.steps:
                    interrupts.check()
                    batch = mesh.place(batches.batch(done), devices)
                    gradients, values, _ = steps.accumulate(steps.sft_gradients, state.model, [batch])
                    state, norm = update(state, gradients)
                    done += 1
                    if done % 10 == 0 or done == config.sft.steps:
                        row = {k: float(v) for k, v in values.items()} | {"grad_norm": float(norm)}
                        log.write({"stage": directory.name, "step": done} | row)
                        bar.set_postfix(loss=f"{row['loss']:.3f}")
                    bar.update(1)
                    if done % config.sft.checkpoint_every == 0 or done == config.sft.steps:
                        saved.save(done, state)
        except interrupts.Interrupted:
            saved.save(done, state)
            raise
    return state.model
