"""Draws figure.png and writes result.json from a finished run: services seen and unseen apart, tiers, cross coverage.

Command:  python experiments/sgd_small/collect.py runs/sgd_small
"""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cacherl_jax.config import Config
from cacherl_jax.evaluate import coverage, intervals, process_accuracy
from cacherl_jax.evaluate.report import TIER_COLOURS
from cacherl_jax.metrics import read_metrics
from cacherl_jax.reward import process
from cacherl_jax.run_directory import RunDirectory
from cacherl_jax.stages import inputs

HERE = Path(__file__).parent


def main() -> None:
    out = Path(sys.argv[1])
    run = RunDirectory(out, Config.from_json(json.loads((out / "run.json").read_text())["config"]))
    specs, tasks = inputs.load_specs(run), inputs.load_tasks(run, "test")
    result: dict = {"cpu_seconds_by_stage": run.cpu_seconds(), "cpu_seconds": sum(run.cpu_seconds().values())}
    correct = {}
    for policy in ("sft", "grpo"):
        trajectories = inputs.load_trajectories(out / "eval" / f"{policy}.cached.jsonl")
        pairs = zip(tasks, trajectories, strict=True)
        correct[policy] = [process_accuracy.process_accuracy(t, r.calls_made, specs) for t, r in pairs]
        for group in ("seen", "unseen"):
            chosen = [i for i, t in enumerate(tasks) if t.family.startswith(group + "/")]
            measured = process_accuracy.evaluate([tasks[i] for i in chosen], [trajectories[i] for i in chosen], specs)
            result[f"{policy}.{group}"] = {
                "tasks": len(chosen),
                "process_accuracy": [measured.process.mean, measured.process.low, measured.process.high],
                "milestones": measured.milestones.mean,
                "parts of the process reward": _parts([(tasks[i], trajectories[i]) for i in chosen], specs),
                "calls_per_task": measured.calls_per_task,
                "stops": dict(Counter(trajectories[i].stop.value for i in chosen)),
                "tiers": dict(Counter(o.tier.value for i in chosen for o in trajectories[i].observations)),
            }
    for group in ("seen", "unseen"):
        chosen = [i for i, t in enumerate(tasks) if t.family.startswith(group + "/")]
        gain = intervals.paired_difference(
            [correct["grpo"][i] for i in chosen], [correct["sft"][i] for i in chosen], seed=0, draws=10_000
        )
        result[f"gain.{group}"] = [gain.mean, gain.low, gain.high]
        served = coverage.coverage([tasks[i] for i in chosen], inputs.open_cache(run, "train", specs))
        result[f"reference calls of test tasks in the training store, {group}"] = served.to_json()["tiers"]
    result["tiers in training"] = json.loads((out / "summary.json").read_text())["tiers"]
    (HERE / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    shutil.copy(out / "summary.json", HERE / "summary.json")
    shutil.copy(out / "grpo" / "metrics.jsonl", HERE / "metrics.jsonl")
    _draw(read_metrics(out / "sft" / "metrics.jsonl"), read_metrics(out / "grpo" / "metrics.jsonl"), result)


def _parts(pairs: list, specs: dict) -> dict[str, float]:
    """What the calls got right, from the names of tools to whole calls: means over tasks."""
    rewards = [process.process_reward(task, trajectory, specs) for task, trajectory in pairs]
    return {part: sum(getattr(r, part) for r in rewards) / len(rewards) for part in process.WEIGHTS}


def _draw(sft: list, grpo: list, result: dict) -> None:
    figure, (first, second, third, fourth) = plt.subplots(1, 4, figsize=(17, 4), constrained_layout=True)
    rows = [r for r in sft if "loss" in r]
    first.plot([r["step"] for r in rows], [r["loss"] for r in rows], color="#555555", lw=0.8)
    first.set(title="SFT: loss on the assistant's tokens", xlabel="step", ylim=(0, None))
    rows = [r for r in grpo if "tiers" in r]
    steps = [r["step"] for r in rows]
    second.plot(steps, [r["process"] for r in rows], color="#0072B2", label="process reward, train tasks")
    second.plot(steps, [r["accuracy"] for r in rows], color="#009E73", label="process accuracy, train tasks, sampled")
    checked = [(r["step"], r["validation"]) for r in grpo if r.get("validation") is not None]
    second.plot(*zip(*checked, strict=True), "o--", color="black", label="process accuracy, held-out tenth, greedy")
    second.set(title="GRPO from the cache", xlabel="step", ylim=(0, 1))
    second.legend(fontsize=8)
    tiers = [t for t in TIER_COLOURS if any(r["tiers"].get(t) for r in rows)]
    third.stackplot(
        steps, [[r["tiers"].get(t, 0) for r in rows] for t in tiers], labels=tiers, colors=[TIER_COLOURS[t] for t in tiers]
    )
    third.set(title="How the cache answered in training", xlabel="step", ylabel="share of calls", ylim=(0, 1), xmargin=0)
    third.legend(fontsize=8, loc="lower right")
    parts = (*process.WEIGHTS, "accuracy")
    for i, (policy, colour) in enumerate((("sft", "#BBBBBB"), ("grpo", "#009E73"))):
        found = result[f"{policy}.seen"]
        values = [*(found["parts of the process reward"][part] for part in process.WEIGHTS), found["process_accuracy"][0]]
        bars = fourth.bar([x + (i - 0.5) * 0.38 for x in range(len(parts))], values, 0.36, color=colour, label=policy.upper())
        fourth.bar_label(bars, fmt="%.2f", fontsize=8)
    fourth.set_xticks(range(len(parts)), ["tool\nnames", "para-\nmeters", "values", "whole\ncalls", "whole\ntasks"])
    fourth.set(title=f"dev, {result['sft.seen']['tasks']} dialogues, seen: matched", ylim=(0, 1))
    fourth.legend()
    for axes in (first, second, third, fourth):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "figure.png", dpi=100)


if __name__ == "__main__":
    main()
