"""The stage `grpo`: reinforcement, tools answered by the training store, or in the control by themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cacherl_jax import metrics
from cacherl_jax.config import ConfigError
from cacherl_jax.corpus import live_tools
from cacherl_jax.evaluate import process_accuracy
from cacherl_jax.model import qwen3
from cacherl_jax.reward.judge import open_judge
from cacherl_jax.rollout import runner
from cacherl_jax.rollout.engine import Engine
from cacherl_jax.run_directory import RunDirectory
from cacherl_jax.stages.inputs import (
    EVAL_SAMPLE,
    GRPO,
    load_policy,
    load_specs,
    load_tasks,
    load_tokenizer,
    model_config,
    open_cache,
)
from cacherl_jax.train import grpo
from cacherl_jax.types import ToolProvider


def reinforce(
    run: RunDirectory,
    progress: metrics.ProgressFactory,
    *,
    stage: str = "grpo",
    start: str = "sft",
    parts: Sequence[str] = GRPO,
) -> dict[str, Any]:
    """GRPO on the training tasks, every tool call answered by the training store; with `grpo.tools` "live" by the tools.

    start: the stage whose policy it begins with; parts: the configuration that both depend on.
    """
    run.require(start)

    def body(folder: Path) -> dict[str, Any]:
        config, tok, specs = model_config(run), load_tokenizer(run), load_specs(run)
        training: ToolProvider | None = open_cache(run, "train", specs)
        if config.grpo.tools == "live":
            training = live_tools(config, "train")
            if training is None:
                raise ConfigError(f"grpo.tools='live': the tools of data.source={config.data.source!r} cannot be run")
        held_out = load_tasks(run, "validation")
        cached = open_cache(run, "validation", specs)
        greedy = dataclasses.replace(config.rollout, temperature=0.0)

        def validate(engine: Engine, model: qwen3.Qwen3) -> float:
            episodes = [(task, EVAL_SAMPLE) for task in held_out]
            trajectories = runner.run(engine, model, tok, specs, episodes, cached, greedy, config.seed)
            return process_accuracy.evaluate(held_out, trajectories, specs).process.mean

        reference = load_policy(run, start, config)
        tasks = load_tasks(run, "train")
        _, live_calls = grpo.train(
            config, reference, tok, tasks, specs, training, folder, base=run.out / start, validate=validate, progress=progress,
            judge=open_judge(config.reward, folder / "verdicts.sqlite"),
        )  # fmt: skip
        return {"live_calls": live_calls}

    return run.run(stage, parts, body)
