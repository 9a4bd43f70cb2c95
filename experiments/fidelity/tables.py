"""The figure and the tables of README.md, from metrics.json."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TITLES = {
    "sgd, state": "SGD train, 3 splits",
    "sgd, raw": "SGD train, 3 splits, raw keys",
    "sgd, state, dev": "SGD dev, once",
    "sgd, raw, dev": "SGD dev, once, raw keys",
    "taskmaster4, state": "Taskmaster-4, 3 splits",
    "star, state": "STAR, 3 splits",
    "tau_bench, state": "tau-bench airline runs, 3 splits",
}
COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#555555")


MIN_DRAWN = 20  # answers below which a bar would say nothing


def print_tables(metrics: dict) -> None:
    names = [n for n in TITLES if n in metrics]
    print("| corpus | tier | served | reads, writes | precision [95 %] | of reads | of writes | F1 of facts |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        for tier, parts in metrics[name]["tiers"].items():
            if tier != "miss":
                everything, reads, writes = parts["all"], parts["reads"], parts["writes"]
                print(
                    f"| {TITLES[name]} | {tier.replace('_', ' ')} | {everything['served']:,} "
                    f"| {reads['served']:,}, {writes['served']:,} "
                    f"| {cell(everything)} | {cell(reads)} | {cell(writes)} | {everything['f1']:.2f} |"
                )
    columns = [f"Jaccard ≥ {t}{echo}" for t in (0.5, 0.7, 0.85) for echo in ("", ", echo")]
    print("\n| corpus | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name in names:
        rows = [metrics[name]["jaccard"].get(column, {}).get("all") for column in columns]
        print(f"| {TITLES[name]} | " + " | ".join(f"{cell(r)} of {r['served']:,}" if r else "-" for r in rows) + " |")
    print("\n| corpus | calls | dialogues | not exact | adapted, share of these | Brier | Brier of tiers | slope | fit, CPU-s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names:
        of = metrics[name]
        f = of["fidelity"]
        slope = f["slope"]
        print(
            f"| {TITLES[name]} | {of['calls']:,} | {of['dialogues']:,} | {of['not_exact']:,} "
            f"| {of['adapted_share_of_not_exact']:.1%} | {f['brier']:.4f} | {f['brier_of_tiers']:.4f} "
            f"| {slope[0]:.3f} [{slope[1]:.3f}, {slope[2]:.3f}] | {', '.join(map(str, of['fit_cpu_seconds']))} |"
        )
    print("\n| corpus | swap | asked | by tier: served, of these with the unswapped call's result |")
    print("|---|---|---|---|")
    for name in names:
        for kind, row in metrics[name]["swaps"].items():
            tiers = "; ".join(f"{tier} {c['served']}, {c['unswapped']}" for tier, c in row["tiers"].items())
            print(f"| {TITLES[name]} | {kind} | {row['asked']} | {tiers} |")


def cell(row: dict) -> str:
    if row["precision"] is None:
        return "-"
    return "{:.3f} [{:.3f}, {:.3f}]".format(*row["precision"])


def draw(metrics: dict, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), constrained_layout=True, width_ratios=(1.7, 1))
    names = [n for n in TITLES if n in metrics and "raw" not in n]
    first = metrics[names[0]]
    tiers = [t for t in {**first["tiers"], **first["jaccard"]} if t != "miss"]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        for x, tier in enumerate(tiers):
            row = {**metrics[name]["tiers"], **metrics[name]["jaccard"]}.get(tier, {}).get("all")
            if row and row["served"] >= MIN_DRAWN:
                mean, low, high = row["precision"]
                at = x + (i - (len(names) - 1) / 2) * width
                left.bar(at, mean, width, color=COLOURS[i])
                left.errorbar(at, mean, [[mean - low], [high - mean]], color="black", capsize=2, lw=0.8)
    labels = [t.replace("_", " ").replace("Jaccard", "Jaccard\n").replace(", ", ",\n") for t in tiers]
    left.set_xticks(range(len(tiers)), labels, fontsize=8)
    left.set(title="Share of answers equal to the call's own recording", ylim=(0, 1.02))
    right.plot((0, 1), (0, 1), color="#BBBBBB", lw=1)
    for i, name in enumerate(names):
        p, y, _ = zip(*metrics[name]["fidelity"]["bins"], strict=True)
        right.plot(p, y, "o-", color=COLOURS[i], ms=4, lw=1, label=TITLES[name])
    right.set(title="Fidelity: ten bins of equal mass", xlabel="estimated fidelity", ylabel="share right")
    right.legend(fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
