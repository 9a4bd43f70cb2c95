"""Draws figure.png and writes result.json and table.md from the seeds that are done: those in seeds/, and those of the folders
that are named, which it keeps there.

Command:  python experiments/live_control/figure.py runs/live_control
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from cacherl_jax.evaluate.intervals import Interval, hierarchical
from cacherl_jax.run_directory import write_json

HERE = Path(__file__).parent
SEEDS = HERE / "seeds"
ARMS = ("sft", "expert_sft", "live", "ours 100", "paper 100", "exact 100", "ours 60", "paper 60", "exact 60")
COLOURS = {"sft": "#888888", "expert_sft": "#888888", "live": "#222222", "ours": "#1b7837", "paper": "#b2182b", "exact": "#2166ac"}
WITHOUT_RL = ("sft", "expert_sft")
DRAWS = 10_000


def collect(out: Path) -> None:
    """Keeps of every seed in `out` whose arms are all done what the tables need, as seeds/seedN.json."""
    for folder in sorted(out.glob("seed*")):
        paths = {arm: folder / arm / "result.json" for arm in ARMS}
        if all(path.is_file() for path in paths.values()):
            facts = {arm: json.loads(path.read_text()) for arm, path in paths.items()}
            SEEDS.mkdir(exist_ok=True)
            (SEEDS / f"{folder.name}.json").write_text(json.dumps(facts, separators=(",", ":")) + "\n")


def load() -> dict[str, dict[int, dict[str, Any]]]:
    """arm -> seed -> what its run left."""
    found = {int(path.stem.removeprefix("seed")): json.loads(path.read_text()) for path in SEEDS.glob("seed*.json")}
    if not found:
        raise SystemExit(f"no seed has all of {', '.join(ARMS)}")
    return {arm: {seed: found[seed][arm] for seed in sorted(found)} for arm in ARMS}


def values(results: dict[int, dict[str, Any]], what: str, family: str = "") -> list[np.ndarray]:
    """A seed's numbers by task, of one family or all."""
    chosen = []
    for facts in results.values():
        of_family = np.array([not family or f == family for f in facts["families"]])
        chosen.append(np.array(facts[what], float)[of_family])
    return chosen


def difference(a: dict, b: dict, what: str = "process", family: str = "") -> Interval:
    pairs = zip(values(a, what, family), values(b, what, family), strict=True)
    return hierarchical([x - y for x, y in pairs], draws=DRAWS)


def text(i: Interval, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{i.mean:{sign}.3f} [{i.low:{sign}.3f}, {i.high:{sign}.3f}]"


def tier_mix(results: dict[int, dict[str, Any]], step: int) -> dict[str, float]:
    """Shares of tiers over the calls of a step, mean of the seeds."""
    rows = [facts["steps"][step]["tiers"] for facts in results.values()]
    return {tier: float(np.mean([row.get(tier, 0.0) for row in rows])) for tier in sorted({t for row in rows for t in row})}


def main() -> None:
    for folder in sys.argv[1:]:
        collect(Path(folder))
    results = load()
    seeds, families = sorted(results["sft"]), sorted(set(next(iter(results["sft"].values()))["families"]))
    summary: dict[str, Any] = {"seeds": seeds, "test_tasks": len(next(iter(results["sft"].values()))["process"]), "arms": {}}
    for arm in ARMS:
        row: dict[str, Any] = {
            "process": hierarchical(values(results[arm], "process"), draws=DRAWS).to_json(),
            "answer": hierarchical(values(results[arm], "answer"), draws=DRAWS).to_json(),
            "by_seed": [float(v.mean()) for v in values(results[arm], "process")],
            "families": {f: hierarchical(values(results[arm], "process", f), draws=DRAWS).to_json() for f in families},
        }
        if arm not in WITHOUT_RL:
            row["over_sft"] = difference(results[arm], results["sft"]).to_json()
            row["over_live"] = difference(results[arm], results["live"]).to_json()
            row["families_over_sft"] = {f: difference(results[arm], results["sft"], "process", f).to_json() for f in families}
            row |= {"tiers_first": tier_mix(results[arm], 0), "tiers_last": tier_mix(results[arm], -1)}
            row["live_calls_of_rl"] = [facts["live_calls_of_rl"] for facts in results[arm].values()]
            row["held"] = [facts.get("initial_policy_calls_held") for facts in results[arm].values()]
            row["cpu_seconds"] = [facts["cpu_seconds"] for facts in results[arm].values()]
        summary["arms"][arm] = row
    recording = [facts["live_calls_of_recording"] for facts in results["sft"].values()]
    live = summary["arms"]["live"]["live_calls_of_rl"]
    summary["live_calls_of_recording"] = recording
    summary["runs_until_paid"] = float(np.mean(np.array(recording) / np.array(live)))
    write_json(HERE / "result.json", summary)
    (HERE / "table.md").write_text("\n".join(table(summary, families)) + "\n")
    draw(summary)
    print((HERE / "table.md").read_text())


def table(summary: dict[str, Any], families: list[str]) -> list[str]:
    arms = summary["arms"]
    lines = ["| trained with | process accuracy, live | over SFT | over live tools | answer | exact, first and last step |"]
    lines.append("|" + "---|" * 6)
    for arm, row in arms.items():
        cells = [arm, text(Interval(**row["process"]))]
        cells += [text(Interval(**row[k]), True) if k in row else "" for k in ("over_sft", "over_live")]
        cells.append(f"{row['answer']['mean']:.3f}")
        exact = [row[k].get("exact", 0) for k in ("tiers_first", "tiers_last") if k in row]
        cells.append(", ".join(f"{share:.2f}" for share in exact))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| family | " + " | ".join(arms) + " |", "|" + "---|" * (1 + len(arms))]
    for f in families:
        lines.append(f"| {f} | " + " | ".join(f"{row['families'][f]['mean']:.2f}" for row in arms.values()) + " |")
    lines += ["", f"Live calls of recording, by seed: {summary['live_calls_of_recording']}; of RL with live tools:"]
    lines.append(f"{arms['live']['live_calls_of_rl']}; the cache has paid for itself after {summary['runs_until_paid']:.2f} runs.")
    return lines


def draw(summary: dict[str, Any]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), width_ratios=(1, 1))
    for x, (arm, row) in enumerate(summary["arms"].items()):
        colour = COLOURS[arm.split()[0]]
        i = row["process"]
        left.errorbar(x, i["mean"], [[i["mean"] - i["low"]], [i["high"] - i["mean"]]], fmt="o", color=colour, capsize=4)
        left.scatter([x + 0.18] * len(row["by_seed"]), row["by_seed"], s=9, color=colour, alpha=0.5)
        if arm not in (*WITHOUT_RL, "live"):
            i = row["over_live"]
            right.errorbar(x, i["mean"], [[i["mean"] - i["low"]], [i["high"] - i["mean"]]], fmt="o", color=colour, capsize=4)
    names = list(summary["arms"])
    left.set_xticks(range(len(names)), names, rotation=30, ha="right")
    left.set_ylabel("process accuracy with live tools")
    right.set_xticks(range(3, len(names)), names[3:], rotation=30, ha="right")
    right.axhline(0, color=COLOURS["live"], lw=0.8)
    right.set_ylabel("difference to training with live tools")
    figure.suptitle(f"{summary['test_tasks']} unseen tasks, {len(summary['seeds'])} seeds, 95 % intervals over seeds and tasks")
    figure.tight_layout()
    figure.savefig(HERE / "figure.png", dpi=150)


if __name__ == "__main__":
    main()
