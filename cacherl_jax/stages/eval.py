"""The stage `eval`: test tasks by each policy, live and from a store that training never opens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cacherl_jax import corpus as corpora
from cacherl_jax import metrics, processes
from cacherl_jax.evaluate import coverage, intervals, process_accuracy
from cacherl_jax.rollout import runner
from cacherl_jax.run_directory import RunDirectory
from cacherl_jax.stages.inputs import (
    EVAL_SAMPLE,
    GRPO,
    POLICIES,
    SPLITS,
    load_policy,
    load_specs,
    load_tasks,
    load_tokenizer,
    load_trajectories,
    model_config,
    open_cache,
    open_engine,
)
from cacherl_jax.types import Task, ToolProvider, ToolSpec
from cacherl_jax.whole_files import write_lines


def evaluate(run: RunDirectory, progress: metrics.ProgressFactory) -> dict[str, Any]:
    """Test tasks by each policy, with live tools where the corpus has them and with the evaluation store."""
    run.require("grpo")

    def body(folder: Path) -> dict[str, Any]:
        policies = {p: p for p in POLICIES if run.done(p) is not None}
        results: dict[str, Any] = play(run, folder, policies, progress)
        specs, tasks = load_specs(run), load_tasks(run, "test")
        results["coverage"] = {
            split: coverage.coverage(load_tasks(run, split), open_cache(run, split, specs)).to_json() for split in SPLITS
        }
        source = "live" if "grpo.live" in results else "cached"
        before, after = (correct(folder / f"{p}.{source}.jsonl", tasks, specs) for p in ("sft", "grpo"))
        results["gain"] = dataclasses.asdict(
            intervals.paired_difference(after, before, seed=run.config.seed, draws=run.config.eval.bootstrap)
        )
        return results

    return run.run("eval", (*GRPO, "eval"), body)


def play(run: RunDirectory, folder: Path, policies: Mapping[str, str], progress: metrics.ProgressFactory) -> dict[str, Any]:
    """Plays the test tasks with the policies of finished stages, named as `policies` says, once from the evaluation store and
    once live where the tools can be run. Results are named "POLICY.cached" and "POLICY.live", as are the files of
    trajectories in `folder`; a file that is there is not played again."""
    config, tok, specs = model_config(run), load_tokenizer(run), load_specs(run)
    tasks = load_tasks(run, "test")
    providers: dict[str, ToolProvider] = {"cached": open_cache(run, "test", specs)}
    live = corpora.live_tools(config, "test")
    if live is not None:
        providers["live"] = live
    engine = open_engine(config, tuple(tok.stop_ids))
    sampling = dataclasses.replace(config.rollout, temperature=config.eval.temperature)
    results: dict[str, Any] = {}
    with progress(total=len(tasks) * len(policies) * len(providers), desc="eval") as bar:
        for policy, stage in policies.items():
            model = engine.place(load_policy(run, stage, config))
            for source, provider in providers.items():
                path = folder / f"{policy}.{source}.jsonl"
                if not path.is_file():
                    trajectories = runner.run(
                        engine, model, tok, specs, [(task, EVAL_SAMPLE) for task in tasks], provider, sampling,
                        config.seed, on_done=lambda _: bar.update(1),
                    )  # fmt: skip
                    if processes.is_first():
                        write_lines(path, (t.to_json() for t in trajectories))
                    processes.wait()
                else:
                    bar.update(len(tasks))
                trajectories = load_trajectories(path)
                results[f"{policy}.{source}"] = process_accuracy.evaluate(tasks, trajectories, specs).to_json()
    return results


def correct(path: Path, tasks: Sequence[Task], specs: Mapping[str, ToolSpec]) -> list[float]:
    """Process accuracy of each task, from a file that `play` wrote."""
    trajectories = load_trajectories(path)
    return [process_accuracy.process_accuracy(t, r.calls_made, specs) for t, r in zip(tasks, trajectories, strict=True)]
