"""Figures of what a cache answers and how often it is right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cacherl_jax.evaluate.coverage import Coverage
from cacherl_jax.evaluate.report import TIER_COLOURS
from cacherl_jax.types import TIER_ORDER
from cacherl_jax.versions import require


def _pyplot() -> Any:
    matplotlib = require("matplotlib", "report")
    matplotlib.use("Agg")
    return require("matplotlib.pyplot", "report")


def draw_coverage(found: Coverage, path: Path, *, tools: int = 25) -> None:
    """PNG: shares of tiers by depth and by tool, the most called ones. Raises MissingExtra where matplotlib is absent."""
    plt = _pyplot()
    called = sorted(found.by_tool, key=lambda tool: (-sum(found.by_tool[tool].values()), tool))[:tools]
    of_tools = "by tool" if len(called) == len(found.by_tool) else f"by tool, the {tools} most called"
    sides = (
        ("by call of the episode", {str(depth): tiers for depth, tiers in found.by_depth.items()}),
        (of_tools, {tool: found.by_tool[tool] for tool in called}),
    )
    height = 1.5 + 0.22 * max(len(rows) for _, rows in sides)
    figure, axes = plt.subplots(1, 2, figsize=(13, height), constrained_layout=True)
    for ax, (title, rows) in zip(axes, sides, strict=True):
        names = [f"{name}  ({sum(tiers.values())})" for name, tiers in rows.items()]
        left = [0.0] * len(rows)
        for tier in [t.value for t in TIER_ORDER if t.value in found.tiers]:
            shares = [tiers.get(tier, 0) / sum(tiers.values()) for tiers in rows.values()]
            ax.barh(names, shares, left=left, color=TIER_COLOURS[tier], label=tier)
            left = [a + b for a, b in zip(left, shares, strict=True)]
        ax.invert_yaxis()
        ax.set(title=title, xlabel="share of calls", xlim=(0, 1))
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(found.tiers), fontsize=8)
    figure.suptitle(
        f"{found.calls} calls of {found.tasks} tasks: {found.exact:.0%} exact; {len(found.unfinishable)} tasks cannot be finished"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_audit(found: Mapping[str, Any], path: Path) -> None:
    """PNG of `cache.audit.audit`: precision of each tier with its 95 % interval, reads and writes apart; fidelity against the
    share of right answers. Raises MissingExtra where matplotlib is absent."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    names, width = list(found["tiers"]), 0.38
    for i, (of, shade) in enumerate((("reads", 1.0), ("writes", 0.45))):
        for x, tier in enumerate(names):
            row = found["tiers"][tier][of]
            if row["precision"] is None:
                continue
            mean, low, high = row["precision"]
            place = x + (i - 0.5) * width
            left.bar(place, mean, width, color=TIER_COLOURS.get(tier, "#999999"), alpha=shade)
            left.errorbar(place, mean, yerr=[[mean - low], [high - mean]], color="black", capsize=3)
            left.text(place, 0.02, f"{of}\n{row['served']}", ha="center", fontsize=7)
    left.set(title=f"Right answers, {found['calls']} held-out calls", ylabel="precision", ylim=(0, 1.02))
    left.set_xticks(range(len(names)), names)
    right.plot([0, 1], [0, 1], color="#999999", linestyle="--")
    if found["fidelity"] is not None:
        mean, share, size = zip(*found["fidelity"]["bins"], strict=True)
        right.scatter(mean, share, s=[20 + 200 * n / max(size) for n in size], color="#0072B2", alpha=0.7)
    right.set(title="Fidelity, bins of equal size", xlabel="stated", ylabel="share right", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
