"""The stages of a run, in order: record, think, sft, grpo, eval, report. Each reads what earlier ones wrote to the run's folder.

    record/   tools.json, tasks.SPLIT.jsonl, transcripts.jsonl, training.sqlite, validation.sqlite, evaluation.sqlite
    think/    transcripts.jsonl, tokenizer/
    sft/      checkpoints, metrics.jsonl; expert_sft/ likewise, trained on the expert's transcripts alone
    grpo/     checkpoints, metrics.jsonl, rollouts/
    eval/     one file of trajectories a policy and tool source
    report/   training.png, trajectories.html, table.md
    summary.json

Training opens training.sqlite (and validation.sqlite for its curve); evaluation.sqlite is opened by eval alone.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cacherl_jax import corpus as corpora
from cacherl_jax import metrics, processes
from cacherl_jax.cache.fit import fit
from cacherl_jax.cache.fit import write as write_fitted
from cacherl_jax.cache.imports import describe
from cacherl_jax.cache.lookup import record_transcript
from cacherl_jax.cache.snapshot import snapshot_id
from cacherl_jax.cache.store import SQLiteStore
from cacherl_jax.config import ConfigError
from cacherl_jax.evaluate import coverage, intervals, process_accuracy, report
from cacherl_jax.model import qwen3
from cacherl_jax.reward import answer, process
from cacherl_jax.rollout import runner
from cacherl_jax.rollout.engine import Engine
from cacherl_jax.run_directory import RunDirectory, write_json, write_lines
from cacherl_jax.stage_inputs import (
    STORES,
    given_tokenizer,
    load_policy,
    load_specs,
    load_tasks,
    load_tokenizer,
    load_trajectories,
    model_config,
    open_cache,
)
from cacherl_jax.text import chat
from cacherl_jax.text.tokenizer import Tokenizer, train_tokenizer
from cacherl_jax.tools.registry import specs_to_json
from cacherl_jax.train import grpo, sft
from cacherl_jax.trajectories.teacher import ScriptedTeacher
from cacherl_jax.trajectories.thinking import ThinkingReport, add_thinking
from cacherl_jax.trajectories.transcripts import read_transcripts, write_transcripts
from cacherl_jax.trajectory import Trajectory
from cacherl_jax.types import Task, ToolProvider, ToolSpec, Transcript

SPLITS = ("train", "validation", "test")
EXPERT = "expert"
POLICIES = ("sft", "expert_sft", "grpo")

# The configuration that each stage depends on.
RECORD = ("seed", "data", "cache")
THINK = (*RECORD, "tokenizer", "weights")
MODEL = ("model", "mesh", "memory.compute")  # the rest of memory changes rounding at most
GRPO = (*THINK, *MODEL, "sft", "rollout", "grpo")

EVAL_SAMPLE = 0


# ---- record ----------------------------------------------------------------------------------------------------------


def record(run: RunDirectory, progress: metrics.ProgressFactory) -> dict[str, Any]:
    """Tasks, the demonstrators' transcripts and the three stores."""

    def body(folder: Path) -> dict[str, Any]:
        corpus = corpora.open_corpus(run.config)
        specs, cache = corpus.specs, run.config.cache
        write_json(folder / "tools.json", specs_to_json(specs))
        result: dict[str, Any] = {"tools": len(specs), "left_out": corpus.problems, "differs_from_published": corpus.differences}
        for split in SPLITS:
            tasks = corpus.tasks(split)
            write_lines(folder / f"tasks.{split}.jsonl", (t.to_json() for t in tasks))
            transcripts = []
            with progress(total=corpus.transcript_count(split), desc=f"record {split}") as bar:
                for transcript in corpus.transcripts(split):
                    transcripts.append(transcript)
                    bar.update(1)
            path = folder / STORES[split]
            path.unlink(missing_ok=True)  # of an interrupted attempt
            with SQLiteStore(path, mode="rw") as store:
                describe(store, specs, cache.key, corpus.provenance)
                with store.transaction():
                    for transcript in transcripts:
                        record_transcript(store, transcript, specs, cache.key)
                if cache.adapted or cache.fidelity == "fitted":
                    with store.transaction():
                        write_fitted(store, fit(store, specs, cache))
                result[split] = {
                    "tasks": len(tasks),
                    "transcripts": len(transcripts),
                    "calls": sum(len(m.tool_calls) for t in transcripts for m in t.messages),
                    "snapshot": snapshot_id(store),
                }
            if split == "train":
                write_transcripts(folder / "transcripts.jsonl", transcripts)
        return result

    return run.run("record", RECORD, body, alone=True)


# ---- think -----------------------------------------------------------------------------------------------------------


def think(run: RunDirectory, progress: metrics.ProgressFactory) -> dict[str, Any]:
    """Hybrid thinking transcripts, and the tokenizer trained on them (or the one that the configuration names)."""
    run.require("record")

    def body(folder: Path) -> dict[str, Any]:
        specs = load_specs(run)
        transcripts, problems = read_transcripts(run.out / "record" / "transcripts.jsonl")
        counts, teacher, thought = ThinkingReport(), ScriptedTeacher(specs), []
        with progress(total=len(transcripts), desc="think") as bar:
            for transcript in transcripts:
                thought.append(add_thinking(transcript, teacher, counts))
                bar.update(1)
        write_transcripts(folder / "transcripts.jsonl", thought)
        given = given_tokenizer(run.config)
        if given is not None:
            tok = Tokenizer.load(given)
            tok.save(folder / "tokenizer")
            if not run.config.tokenizer.path:
                # With all that came with the weights, such as config.json: `convert --to-hf` of a stage gives it back.
                shutil.copytree(given, folder / "tokenizer", dirs_exist_ok=True)
        else:
            texts = (text for transcript in thought for text in _texts(transcript))
            # Tools that training never shows get no tokens of their own: their definitions are read as text.
            used = {name for transcript in thought for name in transcript.tools}
            runs = chat.template_runs([spec for name, spec in specs.items() if name in used])
            try:
                tok = train_tokenizer(texts, runs, run.config.tokenizer.vocab_size)
            except ValueError as error:
                raise ConfigError(f"tokenizer.vocab_size: {error}") from error
            tok.save(folder / "tokenizer")
        return {"transcripts": len(thought), "unreadable": problems, "vocab_size": tok.vocab_size} | counts.to_json()

    return run.run("think", THINK, body, alone=True)


def _texts(transcript: Transcript) -> Iterable[str]:
    for message in transcript.messages:
        yield from (message.reasoning or "", message.content)
        yield from (call.arguments for call in message.tool_calls)


# ---- sft -------------------------------------------------------------------------------------------------------------


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


# ---- grpo ------------------------------------------------------------------------------------------------------------


def reinforce(run: RunDirectory, progress: metrics.ProgressFactory) -> dict[str, Any]:
    """GRPO on the training tasks, every tool call answered by the training store."""
    run.require("sft")

    def body(folder: Path) -> dict[str, Any]:
        config, tok, specs = model_config(run), load_tokenizer(run), load_specs(run)
        training = open_cache(run, "train", specs)
        held_out = load_tasks(run, "validation")
        cached = open_cache(run, "validation", specs)
        greedy = dataclasses.replace(config.rollout, temperature=0.0)

        def validate(engine: Engine, model: qwen3.Qwen3) -> float:
            episodes = [(task, EVAL_SAMPLE) for task in held_out]
            trajectories = runner.run(engine, model, tok, specs, episodes, cached, greedy, config.seed)
            return process_accuracy.evaluate(held_out, trajectories, specs).process.mean

        reference = load_policy(run, "sft", config)
        tasks = load_tasks(run, "train")
        _, live_calls = grpo.train(
            config, reference, tok, tasks, specs, training, folder, base=run.out / "sft", validate=validate, progress=progress
        )
        return {"live_calls": live_calls}

    return run.run("grpo", GRPO, body)


# ---- eval ------------------------------------------------------------------------------------------------------------


def evaluate(run: RunDirectory, progress: metrics.ProgressFactory) -> dict[str, Any]:
    """Test tasks by each policy, with live tools where the corpus has them and with the evaluation store."""
    run.require("grpo")

    def body(folder: Path) -> dict[str, Any]:
        config, tok, specs = model_config(run), load_tokenizer(run), load_specs(run)
        tasks = load_tasks(run, "test")
        providers: dict[str, ToolProvider] = {"cached": open_cache(run, "test", specs)}
        live = corpora.live_tools(config, "test")
        if live is not None:
            providers["live"] = live
        engine = Engine.of_run(config, tok.stop_ids)
        sampling = dataclasses.replace(config.rollout, temperature=config.eval.temperature)
        results: dict[str, Any] = {}
        with progress(total=len(tasks) * len(_policies(run)) * len(providers), desc="eval") as bar:
            for policy in _policies(run):
                model = engine.place(load_policy(run, policy, config))
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
        results["coverage"] = {
            split: coverage.coverage(load_tasks(run, split), open_cache(run, split, specs)).to_json() for split in SPLITS
        }
        before, after = (_correct(folder / f"{p}.{'live' if live else 'cached'}.jsonl", tasks, specs) for p in ("sft", "grpo"))
        results["gain"] = dataclasses.asdict(
            intervals.paired_difference(after, before, seed=config.seed, draws=config.eval.bootstrap)
        )
        return results

    return run.run("eval", (*GRPO, "eval"), body)


def _policies(run: RunDirectory) -> list[str]:
    return [p for p in POLICIES if run.done(p) is not None]


def _correct(path: Path, tasks: Sequence[Task], specs: Mapping[str, ToolSpec]) -> list[float]:
    trajectories = load_trajectories(path)
    return [process_accuracy.process_accuracy(t, r.calls_made, specs) for t, r in zip(tasks, trajectories, strict=True)]


# ---- report ----------------------------------------------------------------------------------------------------------


def summarise(run: RunDirectory, progress: metrics.ProgressFactory) -> dict[str, Any]:
    """summary.json, the figure, the table and the page of trajectories. Made anew at every call, by the first process."""
    if not processes.is_first():
        return {}
    results, rl, recorded = run.require("eval"), run.require("grpo"), run.require("record")
    specs, tok = load_specs(run), load_tokenizer(run)
    tasks = {task.id: task for task in load_tasks(run, "test")}
    source = "live" if "grpo.live" in results else "cached"
    rows = metrics.read_metrics(run.out / "grpo" / "metrics.jsonl")
    spent = run.cpu_seconds()
    summary: dict[str, Any] = {
        "name": run.config.name,
        "seed": run.config.seed,
        "tasks": len(tasks),
        "cpu_seconds": round(sum(spent.values()), 1),
        "cpu_seconds_by_stage": spent,
        "evaluated": source,
        "cache": {"snapshot": recorded["train"]["snapshot"], "evaluation_snapshot": recorded["test"]["snapshot"]},
        "coverage": results["coverage"],
        "gain": results["gain"],
        "families": {},
    }
    for policy in [p for p in POLICIES if f"{p}.{source}" in results]:
        measured = results[f"{policy}.{source}"]
        summary[policy] = _headline(measured)
        summary["families"][policy] = measured["families"]
    summary["grpo"]["process_accuracy_cached"] = results["grpo.cached"]["process"]["mean"]
    summary["grpo"]["live_calls"] = rl["live_calls"]
    last = [row for row in rows if "tiers" in row]
    summary["tiers"] = _tier_shares(run, len(last))
    folder = run.out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    report.draw_training(rows, summary, folder / "training.png")
    report.write_table(summary, folder / "table.md")
    shown = _shown(load_trajectories(run.out / "eval" / "grpo.cached.jsonl"), tasks)
    rewards = [_rewards(tasks[t.task_id], t, specs) for t in shown]
    report.write_page(shown, tasks, tok.decode, rewards, folder / "trajectories.html")
    write_json(run.out / "summary.json", summary)
    return summary


def _headline(measured: Mapping[str, Any]) -> dict[str, Any]:
    process_ = measured["process"]
    return {
        "process_accuracy": process_["mean"],
        "low": process_["low"],
        "high": process_["high"],
        "milestones": measured["milestones"]["mean"],
        "answer_accuracy": measured["answer"]["mean"],
        "calls_per_task": measured["calls_per_task"],
    }


def _tier_shares(run: RunDirectory, steps: int) -> dict[str, dict[str, float]]:
    """Shares of tiers over all of GRPO's rollouts: by call, and by rollout (its worst tier; "none" made no call)."""
    calls: dict[str, int] = {}
    rollouts: dict[str, int] = {}
    for step in range(steps):
        for trajectory in load_trajectories(run.out / "grpo" / "rollouts" / f"{step:05d}.jsonl"):
            for observation in trajectory.observations:
                calls[observation.tier.value] = calls.get(observation.tier.value, 0) + 1
            worst = trajectory.worst_tier
            name = worst.value if worst else "none"
            rollouts[name] = rollouts.get(name, 0) + 1
    return {
        name: {k: v / max(1, sum(counts.values())) for k, v in sorted(counts.items())}
        for name, counts in (("calls", calls), ("rollouts", rollouts))
    }


def _shown(trajectories: Sequence[Trajectory], tasks: Mapping[str, Task], count: int = 10) -> list[Trajectory]:
    """Up to `count` trajectories, taking families in turn so that the page shows each kind."""
    by_family: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        by_family.setdefault(tasks[trajectory.task_id].family, []).append(trajectory)
    rounds = max(map(len, by_family.values()), default=0)
    in_turn = [members[i] for i in range(rounds) for members in by_family.values() if i < len(members)]
    return in_turn[:count]


def _rewards(task: Task, trajectory: Trajectory, specs: Mapping[str, ToolSpec]) -> dict[str, Any]:
    parts = process.process_reward(task, trajectory, specs)
    return {
        "answer": answer.answer_reward(task, trajectory),
        "process": parts.total,
        "correct": process_accuracy.process_accuracy(task, trajectory.calls_made, specs),
    }
