"""The stage `sft`: the policy cloned from demonstrators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cacherl_jax import metrics
from cacherl_jax.config import Config
from cacherl_jax.data.pipeline import Row
from cacherl_jax.run_directory import RunDirectory
from cacherl_jax.stages.inputs import (
    SFT,
    load_specs,
    load_tokenizer,
    model_config,
)
from cacherl_jax.train import sft
from cacherl_jax.trajectories.transcripts import read_transcripts
from cacherl_jax.types import Transcript

EXPERT = "expert"


def supervised(run: RunDirectory, progress: metrics.ProgressFactory) -> dict[str, Any]:
    """The policy cloned from all demonstrators; beside it, for comparison only, one cloned from the expert alone."""
    run.require("think")
    result = {"sft": clone(run, "sft", lambda: transcript_rows(run, thought(run)), progress)}
    data = run.config.data
    if data.source == "world" and EXPERT in data.demonstrators and len(data.demonstrators) > 1:
        own = (t for t in thought(run) if t.agent == EXPERT)
        result["expert_sft"] = clone(run, "expert_sft", lambda: transcript_rows(run, own), progress)
    return result


def thought(run: RunDirectory) -> Iterator[Transcript]:
    """The recorded transcripts with their reasoning. Nothing is read before the first is asked for."""
    yield from read_transcripts(run.out / "think" / "transcripts.jsonl")[0]


def row_limit(config: Config) -> int:
    """Tokens that the longest row to train on may have."""
    return min(config.rollout.context, config.sft.packed_length or config.rollout.context)


def transcript_rows(run: RunDirectory, transcripts: Iterable[Transcript]) -> tuple[list[Row], dict[str, Any]]:
    """Transcripts as rows to train on, and how many are left out for their length."""
    rows, too_long = sft.transcript_rows(
        load_tokenizer(run),
        transcripts,
        load_specs(run),
        context=row_limit(run.config),
        max_tool_tokens=run.config.rollout.max_tool_tokens,
    )
    return rows, {"too_long": too_long}


def clone(
    run: RunDirectory,
    stage: str,
    rows: Callable[[], tuple[list[Row], dict[str, Any]]],
    progress: metrics.ProgressFactory,
    parts: Sequence[str] = SFT,
) -> dict[str, Any]:
    """Trains on `rows()`, which also says what its result is to keep of them; called only if there is something to do.
    `parts` names the configuration that the rows and the training depend on."""

    def body(folder: Path) -> dict[str, Any]:
        examples, facts = rows()
        sft.train(model_config(run), examples, folder, progress=progress)
        return {"rows": len(examples), "tokens": int(sum(len(r.tokens_T) for r in examples))} | facts

    return run.run(stage, parts, body)
