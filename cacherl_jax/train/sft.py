"""Supervised fine-tuning: next-token loss on the assistant's own tokens of recorded (and thinking-augmented) episodes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cacherl_jax import adapter_folder, checkpoint, interrupts, mesh, metrics, processes
from cacherl_jax.config import Config
from cacherl_jax.data.packing import PackedBatches
from cacherl_jax.data.pipeline import EpochBatches, Row
from cacherl_jax.model import attention, lora, qwen3
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
    """Trains `config.weights`, or random weights, for `config.sft.steps` updates, or goes on from the newest checkpoint in
    `directory`. With `config.sft.lora` an adapter is trained in their place, and merged at the end.

    Ctrl-C and SIGTERM save before they end the run. The same rows, config and seed give the same losses, interrupted or not,
    and by several processes as by one: batches and their order are functions of (seed, update).
    """
    sft = config.sft
    tx = make_optimizer(sft.optimizer, sft.steps)
    devices = mesh.make_mesh(config.mesh)
    adapted = sft.lora.rank > 0
    weights: Any = checkpoint.abstract_model(config.model, devices)
    if adapted:
        weights = adapter_folder.abstract_adapter(config.model, sft.lora, devices)
    like = checkpoint.abstract_state(weights, tx, devices)
    batches = _batches(config, rows, mesh.row_ways(devices))
    execution = qwen3.Execution(devices, config.memory)
    attention.refuse_lengths(batches.lengths, devices, execution.dtype(config.model))
    processes.refuse_differences({"rows": _digest(rows)})
    with interrupts.held(), checkpoint.Checkpoints(adapter_folder.checkpoints(directory, sft.lora)) as saved:
        frozen = _first_model(config, devices) if adapted else None

        def first() -> Any:
            if not adapted:
                return _first_model(config, devices)
            return lora.init(config.model, sft.lora, jax.random.fold_in(jax.random.key(config.seed), 1), devices)

        done, state = saved.restore(like) or (0, checkpoint.new_state(first(), tx, devices))
        update = steps.make_update(tx, like)
        gradients_of = partial(steps.sft_gradients, execution=execution)
        log = metrics.MetricsWriter(directory / "metrics.jsonl", resume_step=done, writes=processes.is_first())
        rate = metrics.Rate()
        try:
            with log, progress(total=sft.steps, initial=done, desc=directory.name) as bar:
                while done < sft.steps:
                    processes.check()
                    chosen = [batches.batch(done * sft.accumulate + i) for i in range(sft.accumulate)]
                    tokens = sum(int((batch.segment_ids_BT > 0).sum()) for batch in chosen)
                    filled = tokens / sum(batch.segment_ids_BT.size for batch in chosen)  # the rest is padding
                    placed = [mesh.place(batch, devices) for batch in chosen]
                    gradients, values, _ = steps.accumulate(gradients_of, state.model, frozen, placed)
                    state, norm = update(state, gradients)
                    del gradients  # or they would lie beside the next update's
                    done += 1
                    rate.add(tokens)
                    if done % 10 == 0 or done == sft.steps:
                        row = {k: float(v) for k, v in values.items()} | {"grad_norm": float(norm)}
                        row |= {"tokens": tokens, "filled": filled}
                        log.write({"stage": directory.name, "step": done} | row | {"rate": rate.read()})
                        bar.set_postfix(loss=f"{row['loss']:.3f}")
                    bar.update(1)
                    if done % sft.checkpoint_every == 0 or done == sft.steps:
                        saved.save(done, state)
        except interrupts.Interrupted:
            saved.save(done, state)
            raise
    if frozen is None:
        return state.model
    base = Path(config.weights) if config.weights else config.seed
    shown = [row.tokens_T for row in rows]
    return adapter_folder.finish(directory, base, lora.attach(frozen, state.model), done, shown, donate=True)


def _batches(config: Config, rows: Sequence[Row], ways: int) -> EpochBatches | PackedBatches:
    sft = config.sft
    if sft.packed_length:
        return PackedBatches(rows, sft.packed_length, tokens_per_batch=sft.tokens_per_batch, seed=config.seed, ways=ways)
    return EpochBatches(rows, tokens_per_batch=sft.tokens_per_batch, seed=config.seed, ways=ways)


def _first_model(config: Config, devices: Mesh) -> qwen3.Qwen3:
    if not config.weights:
        return qwen3.init(config.model, jax.random.key(config.seed), devices)
    return checkpoint.restore_model(Path(config.weights) / "checkpoints", checkpoint.abstract_model(config.model, devices))


def _digest(rows: Sequence[Row]) -> str:
    """Of what is trained on: processes that do not share it would each go on with their own."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.int64(len(row.tokens_T)).tobytes() + row.tokens_T.tobytes() + row.mask_T.tobytes())
    return digest.hexdigest()
