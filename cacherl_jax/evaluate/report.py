"""The figure, the table and the page of a run, for people who would rather look."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from cacherl_jax.trajectory import Source, Trajectory
from cacherl_jax.types import TIER_ORDER, Task
from cacherl_jax.versions import require

# Colours that stay apart for colour-blind readers (Okabe-Ito), from faithful to not.
TIER_COLOURS = {
    "live": "#56B4E9",
    "loop": "#999999",
    "exact": "#009E73",
    "adapted": "#0072B2",
    "fuzzy": "#E69F00",
    "best_effort": "#D55E00",
    "miss": "#CC79A7",
}
POLICY_NAMES = {"sft": "SFT, all\ndemonstrators", "expert_sft": "SFT, expert\nalone", "grpo": "GRPO from\nthe cache"}


def draw_training(metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], path: Path) -> None:
    """PNG: reward and accuracy over GRPO's steps, the tier mix, and the policies' test accuracy with 95 % intervals.

    Raises MissingExtra naming the extra where matplotlib is absent.
    """
    matplotlib = require("matplotlib", "report")
    matplotlib.use("Agg")
    plt = require("matplotlib.pyplot", "report")
    rows = [row for row in metrics if "tiers" in row]
    steps = [row["step"] for row in rows]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    left.plot(steps, [row["process"] for row in rows], color="#0072B2", label="process reward")
    left.plot(steps, [row["answer"] for row in rows], color="#E69F00", label="answer reward")
    left.plot(steps, [row["accuracy"] for row in rows], color="#009E73", label="process accuracy, sampled")
    checked = [(row["step"], row["validation"]) for row in metrics if row.get("validation") is not None]
    left.plot(*zip(*checked, strict=True), "o--", color="black", label="process accuracy, validation")
    left.set(title="Training", xlabel="GRPO step", ylim=(0, 1.02))
    left.legend(loc="lower right", fontsize=8)
    tiers = [t.value for t in TIER_ORDER if any(row["tiers"].get(t.value) for row in rows)]
    shares = [[row["tiers"].get(tier, 0.0) for row in rows] for tier in tiers]
    if tiers:
        middle.stackplot(steps, shares, labels=tiers, colors=[TIER_COLOURS[t] for t in tiers])
        middle.legend(loc="lower right", fontsize=8)
    middle.set(title="How the cache answered", xlabel="GRPO step", ylabel="share of calls", ylim=(0, 1), xmargin=0)
    policies = [p for p in POLICY_NAMES if p in summary]
    values = [summary[p]["process_accuracy"] for p in policies]
    errors = [
        [v - summary[p]["low"] for p, v in zip(policies, values, strict=True)],
        [summary[p]["high"] - v for p, v in zip(policies, values, strict=True)],
    ]
    bars = right.bar([POLICY_NAMES[p] for p in policies], values, yerr=errors, capsize=4, color=["#BBBBBB", "#888888", "#009E73"])
    right.bar_label(bars, [f"{v:.2f}" for v in values], label_type="center")
    right.set(title=f"Process accuracy, {summary['tasks']} test tasks, {summary['evaluated']}", ylim=(0, 1))
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_table(summary: Mapping[str, Any], path: Path) -> None:
    """Markdown: the headline figures of each policy, then process accuracy by family."""
    policies = [p for p in POLICY_NAMES if p in summary]
    names = [POLICY_NAMES[p].replace("\n", " ") for p in policies]
    lines = [f"| {summary['tasks']} test tasks, {summary['evaluated']} | {' | '.join(names)} |", "|---" * (len(policies) + 1) + "|"]

    def row(name: str, cells: Sequence[str]) -> None:
        lines.append(f"| {name} | {' | '.join(cells)} |")

    row("process accuracy", [_interval(summary[p]["process_accuracy"], summary[p]["low"], summary[p]["high"]) for p in policies])
    for key, name in (("milestones", "milestone share"), ("answer_accuracy", "answer accuracy"), ("calls_per_task", "calls")):
        row(name, [f"{summary[p][key]:.2f}" for p in policies])
    for family in summary["families"][policies[0]]:
        cells = [summary["families"][p][family] for p in policies]
        row(f"{family} ({cells[0]['n']})", [_interval(c["accuracy"], c["low"], c["high"]) for c in cells])
    gain = summary["gain"]
    lines += ["", f"Gain of GRPO over SFT, paired: {_interval(gain['mean'], gain['low'], gain['high'])}."]
    path.write_text("\n".join(lines) + "\n")


def _interval(mean: float, low: float, high: float) -> str:
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def write_page(
    trajectories: Sequence[Trajectory],
    tasks: Mapping[str, Task],
    decode: Callable[[Sequence[int]], str],
    rewards: Sequence[Mapping[str, float]],
    path: Path,
) -> None:
    """One HTML page without outside references: each trajectory's tokens, sampled and injected ones apart, every tool text
    in its tier's colour, with what the episode earned."""
    episodes = []
    for trajectory, reward in zip(trajectories, rewards, strict=True):
        task = tasks[trajectory.task_id]
        spans = []
        for segment in trajectory.segments:
            observation = None if segment.observation is None else trajectory.observations[segment.observation]
            spans.append(
                {
                    "kind": segment.source.value,
                    "tier": observation.tier.value if observation else "",
                    "note": _note(segment.source, observation),
                    "text": _shortened(decode(trajectory.tokens_T[segment.start : segment.stop].tolist()), segment.source),
                }
            )
        episodes.append({"task": task, "trajectory": trajectory, "reward": reward, "spans": spans})
    template = resources.files("cacherl_jax.evaluate").joinpath("page.html").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    path.write_text(environment.from_string(template).render(episodes=episodes, tiers=TIER_COLOURS))


def _note(source: Source, observation: Any) -> str:
    if observation is None:
        return f"{source.value} tokens"
    return (
        f"{observation.kind.value}, tier {observation.tier.value}, score {observation.score:.2f}, "
        f"fidelity {observation.fidelity:.2f}, entry {observation.entry[:12] or 'none'}"
    )


def _shortened(text: str, source: Source) -> str:
    """The tools' definitions are the same in every episode; their ends suffice."""
    return f"{text[:60]} … {text[-60:]}" if source is Source.PROMPT and len(text) > 200 else text
