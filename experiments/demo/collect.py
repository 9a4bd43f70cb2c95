"""Keeps of a finished run what the README speaks of: summary, metrics, and how the episodes that went wrong went wrong.

Command:  python experiments/demo/collect.py runs/demo0 runs/demo1 runs/demo2
"""

import json
import shutil
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from cacherl_jax.evaluate.process_accuracy import process_accuracy
from cacherl_jax.stages import inputs
from cacherl_jax.tools.world import tool_specs
from cacherl_jax.trajectory import Trajectory
from cacherl_jax.types import Task

HERE = Path(__file__).parent


def outcome(task: Task, trajectory: Trajectory) -> str:
    """right; wrong argument: the tools of a reference in order; stops early, calls too much: by their number; other."""
    calls = trajectory.calls_made
    if process_accuracy(task, calls, tool_specs()):
        return "right"
    names = [call.name for call in calls]
    if any(names == [call.name for call in reference] for reference in task.references):
        return "wrong argument"
    wanted = len(task.references[0])
    return "stops early" if len(calls) < wanted else "calls too much" if len(calls) > wanted else "other"


def flat_groups(run: Path) -> list[dict[str, float]]:
    """By step of GRPO: the shares of groups whose advantages are all zero, and of those whose rollouts are all right."""
    shares = []
    for path in sorted((run / "grpo" / "rollouts").glob("*.jsonl")):
        groups = defaultdict(list)
        for row in map(json.loads, path.read_text().splitlines()):
            groups[row["task_id"]].append(row["rewards"])
        flat = [all(abs(r["advantage"]) < 1e-9 for r in group) for group in groups.values()]
        right = [all(r["process"] >= 1 for r in group) for group in groups.values()]
        shares.append({"flat": float(np.mean(flat)), "all right": float(np.mean(right))})
    return shares


def main() -> None:
    for run in map(Path, sys.argv[1:]):
        summary = json.loads((run / "summary.json").read_text())
        folder = HERE / f"seed{summary['seed']}"
        folder.mkdir(exist_ok=True)
        shutil.copy(run / "summary.json", folder)
        shutil.copy(run / "grpo" / "metrics.jsonl", folder)
        tasks = [Task.from_json(json.loads(line)) for line in (run / "record" / "tasks.test.jsonl").read_text().splitlines()]
        outcomes: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
        for policy in inputs.POLICIES:
            for task, trajectory in zip(tasks, inputs.load_trajectories(run / "eval" / f"{policy}.live.jsonl"), strict=True):
                outcomes[policy][task.family][outcome(task, trajectory)] += 1
        kept = {"outcomes": outcomes, "groups": flat_groups(run)}
        (folder / "outcomes.json").write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
