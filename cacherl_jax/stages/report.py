"""The stage `report`: summary.json, figure, table, page of trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cacherl_jax import metrics, processes
from cacherl_jax.evaluate import process_accuracy, report
from cacherl_jax.reward import answer, process
from cacherl_jax.run_directory import RunDirectory
from cacherl_jax.stages.inputs import (
    POLICIES,
    load_specs,
    load_tasks,
    load_tokenizer,
    load_trajectories,
)
from cacherl_jax.train import scoring
from cacherl_jax.trajectory import Trajectory
from cacherl_jax.types import Task, ToolSpec
from cacherl_jax.whole_files import write_json


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
    played = [run.out / "grpo" / "rollouts" / f"{step:05d}.jsonl" for step in range(len(last))]
    summary["reward_correlations"] = scoring.correlations_of(played)
    summary["warnings"] = {text.partition(":")[0]: text for row in reversed(last) for text in row["warnings"]}
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
