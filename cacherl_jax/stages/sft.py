"""The stage `sft`: the policy cloned from demonstrators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cacherl_jax import metrics
from cacherl_jax.run_directory import RunDirectory
from cacherl_jax.stages.inputs import (
    MODEL,
    THINK,
    load_specs,
    load_tokenizer,
    model_config,
)
from cacherl_jax.train import sft
from cacherl_jax.trajectories.transcripts import read_transcripts

EXPERT = "expert"


def supervised(run: RunDirectory, progress: metrics.ProgressFactory) -> dict[str, Any]:
    """The policy cloned from all demonstrators; beside it, for comparison only, one cloned from the expert alone."""
    run.require("think")
    result = {"sft": _supervised(run, "sft", None, progress)}
    data = run.config.data
    if data.source == "world" and EXPERT in data.demonstrators and len(data.demonstrators) > 1:
        result["expert_sft"] = _supervised(run, "expert_sft", EXPERT, progress)
    return result


def _supervised(run: RunDirectory, stage: str, agent: str | None, progress: metrics.ProgressFactory) -> dict[str, Any]:
    def body(folder: Path) -> dict[str, Any]:
        config, tok, specs = model_config(run), load_tokenizer(run), load_specs(run)
        transcripts, _ = read_transcripts(run.out / "think" / "transcripts.jsonl")
        rows, too_long = sft.transcript_rows(
            tok,
            (t for t in transcripts if agent is None or t.agent == agent),
            specs,
            context=min(config.rollout.context, config.sft.packed_length or config.rollout.context),
            max_tool_tokens=config.rollout.max_tool_tokens,
        )
        sft.train(config, rows, folder, progress=progress)
        return {"rows": len(rows), "too_long": too_long, "tokens": int(sum(len(r.tokens_T) for r in rows))}

    return run.run(stage, (*THINK, *MODEL, "sft", "rollout.context", "rollout.max_tool_tokens"), body)
