"""Draws figure.png and prints the tables of README.md from the results kept in this folder.

Command:  python experiments/demo/figure.py
"""

import json
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from cacherl_jax.metrics import read_metrics

HERE = Path(__file__).parent
POLICIES = {"sft": "SFT, all demonstrators", "expert_sft": "SFT, expert alone", "grpo": "GRPO from the cache"}
COLOURS = {"sft": "#BBBBBB", "expert_sft": "#777777", "grpo": "#009E73"}


def main() -> None:
    summaries = [json.loads(path.read_text()) for path in sorted(HERE.glob("seed*/summary.json"))]
    curves = [read_metrics(path) for path in sorted(HERE.glob("seed*/metrics.jsonl"))]
    families = list(summaries[0]["families"]["sft"])

    def of(policy: str, family: str) -> float:
        """Accuracy over the tasks of all seeds."""
        parts = [s["families"][policy][family] for s in summaries]
        return sum(part["accuracy"] * part["n"] for part in parts) / sum(part["n"] for part in parts)

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), constrained_layout=True, width_ratios=(1, 0.8, 1.6))
    for seed, rows in enumerate(curves):
        checked = [(r["step"], r["validation"]) for r in rows if r.get("validation") is not None]
        left.plot(*zip(*checked, strict=True), "o-", color=("#009E73", "#0072B2", "#E69F00")[seed], label=f"seed {seed}")
    left.set(title="Validation tasks, tools answered by a cache", xlabel="GRPO step", ylabel="process accuracy", ylim=(0, 1))
    left.legend(loc="lower right")
    for x, policy in enumerate(POLICIES):
        values = [s[policy]["process_accuracy"] for s in summaries]
        bar = middle.bar(x, np.mean(values), color=COLOURS[policy])
        middle.bar_label(bar, fmt="%.2f", label_type="center")
        middle.plot([x] * len(values), values, "k.", zorder=3)
    middle.set(title=f"{summaries[0]['tasks']} test tasks, live tools", ylim=(0, 1))
    middle.set_xticks(range(3), [textwrap.fill(name, 13) for name in POLICIES.values()], fontsize=9)
    width = 0.27
    for i, policy in enumerate(POLICIES):
        shares = [of(policy, family) for family in families]
        right.bar(np.arange(len(families)) + (i - 1) * width, shares, width, color=COLOURS[policy], label=POLICIES[policy])
    right.set_xticks(range(len(families)), [f.replace("_", "\n") for f in families])
    right.set(title="by family, tasks of all seeds", ylim=(0, 1.3))
    right.legend(loc="upper center", fontsize=8, ncols=3)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "figure.png", dpi=110)

    def cell(measured: dict) -> str:
        return f"{measured['process_accuracy']:.3f} [{measured['low']:.2f}, {measured['high']:.2f}]"

    print("| seed | SFT, all | SFT, expert alone | GRPO, live | GRPO, cached | gain over SFT | CPU-s |")
    print("|---|---|---|---|---|---|---|")
    for s in summaries:
        gain = s["gain"]
        print(
            f"| {s['seed']} | {cell(s['sft'])} | {cell(s['expert_sft'])} | {cell(s['grpo'])} "
            f"| {s['grpo']['process_accuracy_cached']:.3f} | {gain['mean']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}] "
            f"| {s['cpu_seconds']:.0f} |"
        )
    print("\n| family (tasks, three seeds) | SFT, all | SFT, expert alone | GRPO |\n|---|---|---|---|")
    for family in families:
        n = sum(s["families"]["sft"][family]["n"] for s in summaries)
        print(f"| {family} ({n}) | " + " | ".join(f"{of(p, family):.2f}" for p in POLICIES) + " |")
    kept = [json.loads(path.read_text()) for path in sorted(HERE.glob("seed*/outcomes.json"))]
    kinds = ("right", "stops early", "wrong argument", "calls too much", "other")
    print(f"\n| family | policy | {' | '.join(kinds)} |\n|---|---|{'---|' * len(kinds)}")
    for family in ("chain3", "chain4", "choose", "error_recovery", "write_then_read"):
        for policy in POLICIES:
            counts = [sum(k["outcomes"][policy][family].get(kind, 0) for k in kept) for kind in kinds]
            print(f"| {family} | {POLICIES[policy]} | {' | '.join(map(str, counts))} |")
    for seed, k in enumerate(kept):
        late = [group["all right"] for group in k["groups"][10:]]
        spread = f"{min(late):.2f} to {max(late):.2f}, mean {np.mean(late):.2f}"
        print(f"\ngroups all right after step 10, seed {seed}: {spread}", end="")
    print()
    for kind in ("calls", "rollouts"):
        names = sorted({t for s in summaries for t in s["tiers"][kind]})
        print(
            f"\ntiers by {kind}:", {t: round(float(np.mean([s["tiers"][kind].get(t, 0.0) for s in summaries])), 3) for t in names}
        )


if __name__ == "__main__":
    main()
