"""Figure and tables of the experiment's result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

ARMS = {"paper": "#D55E00", "none": "#777777", "calibrated": "#009E73"}
NAMES = {
    "sft": "before (SFT)",
    "paper": "paper's tiers",
    "none_divided": "no tiers, divided",
    "none": "no tiers",
    "calibrated": "calibrated",
}
LAST = 5  # steps at each end that the table averages


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Rollouts that left the cache, training reward and tier-blind reward by step, and live accuracy after training."""
    fig, axes = plt.subplots(1, 4, figsize=(16, 3.8), constrained_layout=True)
    shown = {
        "left": "rollouts that left the cache",
        "reward": "training reward (not comparable between lines)",
        "reference": "tier-blind reward",
    }
    arms = _arms(result)
    for ax, (key, title) in zip(axes, shown.items(), strict=False):
        for arm in arms:
            curves_ST = np.array([[step[key] for step in seed[arm]["steps"]] for seed in result["seeds"].values()])
            steps_T = np.arange(1, curves_ST.shape[1] + 1)
            ax.plot(steps_T, curves_ST.T, color=ARMS[arm], alpha=0.35, linewidth=1)
            ax.plot(steps_T, curves_ST.mean(axis=0), color=ARMS[arm], linewidth=2, label=NAMES[arm])
        ax.set(title=title, xlabel="GRPO step", ylim=(0, 1))
    axes[0].legend()
    policies = ["sft", *arms]
    for x, policy in enumerate(policies):
        lives = [_live(seed, policy)["process"] for seed in result["seeds"].values()]
        axes[3].bar(x, np.mean([p["mean"] for p in lives]), color=ARMS.get(policy, "#BBBBBB"))
        at = x + np.linspace(-0.2, 0.2, len(lives))
        low_high = np.array([[p["mean"] - p["low"], p["high"] - p["mean"]] for p in lives]).T
        axes[3].errorbar(at, [p["mean"] for p in lives], np.maximum(low_high, 0), fmt="k.", linewidth=1)
    axes[3].set_xticks(range(len(policies)), [NAMES[policy].replace(" ", "\n", 1) for policy in policies])
    axes[3].set(title="right calls, live tools", ylim=(0, 1))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _arms(result: Mapping[str, Any]) -> list[str]:
    """Those that were run."""
    return [arm for arm in ARMS if arm in next(iter(result["seeds"].values()))]


def _live(seed: Mapping[str, Any], policy: str) -> Mapping[str, Any]:
    return seed[policy] if policy == "sft" else seed[policy]["live"]


def tables(result: Mapping[str, Any]) -> str:
    """Markdown: each run's drift and live accuracy, the monitor's warnings, and the random groups."""
    lines = [
        "| seed | tiers count as | left the cache, first 5 steps | last 5 | tier-blind reward, first 5 steps | last 5 "
        "| right calls, live | answer, live |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, seed in result["seeds"].items():
        lines.append(f"| {number} | before (SFT) | | | | | {_cell(seed['sft']['process'])} | {_cell(seed['sft']['answer'])} |")
        for arm in _arms(result):
            steps, live = seed[arm]["steps"], seed[arm]["live"]
            ends = [np.mean([s[key] for s in part]) for key in ("left", "reference") for part in (steps[:LAST], steps[-LAST:])]
            means = " | ".join(f"{end:.2f}" for end in ends)
            lines.append(f"| {number} | {NAMES[arm]} | {means} | {_cell(live['process'])} | {_cell(live['answer'])} |")
    lines += ["", "| tiers count as | seed | warnings, with the step of the first |", "|---|---|---|"]
    for arm in _arms(result):
        for number, seed in result["seeds"].items():
            warned = ", ".join(f"{name} ({w['step']})" for name, w in seed[arm]["warned"].items()) or "none"
            lines.append(f"| {NAMES[arm]} | {number} | {warned} |")
    tiers = list(next(iter(result["random_groups"].values())))
    lines += ["", f"| tiers count as | {' | '.join(tiers)} |", "|---" * (len(tiers) + 1) + "|"]
    for way, by_tier in result["random_groups"].items():
        cells = " | ".join(f"{by_tier[t]['mean']:+.4f} ± {by_tier[t]['error']:.4f}" for t in tiers)
        lines.append(f"| {NAMES[way]} | {cells} |")
    return "\n".join(lines) + "\n"


def _cell(interval: Mapping[str, float]) -> str:
    return f"{interval['mean']:.3f} [{interval['low']:.2f}, {interval['high']:.2f}]"
