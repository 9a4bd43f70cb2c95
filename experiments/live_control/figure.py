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
from cacherl_jax.types import Tier
from cacherl_jax.whole_files import write_json

HERE = Path(__file__).parent
SEEDS = HERE / "seeds"
ARMS = ("sft", "expert_sft", "live", "ours 100", "paper 100", "exact 100", "ours 60", "paper 60", "exact 60")
COLOURS = {"sft": "#888888", "expert_sft": "#888888", "live": "#222222", "ours": "#1b7837", "paper": "#b2182b", "exact": "#2166ac"}
WITHOUT_RL = ("sft", "expert_sft")
ANSWERS_ONLY = tuple(f"{arm} answers" for arm in ("live", "ours 60", "paper 60", "exact 60"))
DRAWS = 10_000


def collect(out: Path) -> None:
    """Keeps of every seed in `out` whose arms are all done what the tables need, as seeds/seedN.json; and, where those paid by
    answers alone are done, as seeds/answers/seedN.json."""
    for folder in sorted(out.glob("seed*")):
        for arms, kept in ((ARMS, SEEDS), (ANSWERS_ONLY, SEEDS / "answers")):
            paths = {arm: folder / arm / "result.json" for arm in arms}
            if all(path.is_file() for path in paths.values()):
                facts = {arm: json.loads(path.read_text()) for arm, path in paths.items()}
                kept.mkdir(parents=True, exist_ok=True)
                (kept / f"{folder.name}.json").write_text(json.dumps(facts, separators=(",", ":")) + "\n")


def load(kept: Path) -> dict[int, dict[str, Any]]:
    """seed -> arm -> what its run left."""
    found = {int(path.stem.removeprefix("seed")): json.loads(path.read_text()) for path in kept.glob("seed*.json")}
    return {seed: found[seed] for seed in sorted(found)}


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


def tier_mix(results: dict[int, dict[str, Any]], chosen: slice = slice(None)) -> dict[str, float]:
    """Shares of tiers over the calls of a step, mean of the seeds and of all or the chosen steps."""
    rows = [row["tiers"] for facts in results.values() for row in facts["steps"][chosen]]
    return {tier: float(np.mean([row.get(tier, 0.0) for row in rows])) for tier in sorted({t for row in rows for t in row})}


def measured(results: dict[str, dict[int, dict[str, Any]]], live: str) -> dict[str, dict[str, Any]]:
    """A row an arm; `live` is the arm that the others' are compared with, beside SFT."""
    families = sorted(set(next(iter(results["sft"].values()))["families"]))
    rows = {}
    for arm in results:
        row: dict[str, Any] = {
            "process": hierarchical(values(results[arm], "process"), draws=DRAWS).to_json(),
            "answer": hierarchical(values(results[arm], "answer"), draws=DRAWS).to_json(),
            "by_seed": [float(v.mean()) for v in values(results[arm], "process")],
            "families": {f: hierarchical(values(results[arm], "process", f), draws=DRAWS).to_json() for f in families},
        }
        if arm not in WITHOUT_RL:
            row["over_sft"] = difference(results[arm], results["sft"]).to_json()
            row["over_live"] = difference(results[arm], results[live]).to_json()
            row["families_over_sft"] = {f: difference(results[arm], results["sft"], "process", f).to_json() for f in families}
            row |= {"tiers_first": tier_mix(results[arm], slice(1)), "tiers_last": tier_mix(results[arm], slice(-1, None))}
            row["tiers"] = tier_mix(results[arm])
            row["live_calls_of_rl"] = [facts["live_calls_of_rl"] for facts in results[arm].values()]
            row["held"] = [facts.get("initial_policy_calls_held") for facts in results[arm].values()]
            row["cpu_seconds"] = [facts["cpu_seconds"] for facts in results[arm].values()]
        rows[arm] = row
    return rows


def main() -> None:
    for folder in sys.argv[1:]:
        collect(Path(folder))
    seeds, answers = load(SEEDS), load(SEEDS / "answers")
    if not seeds:
        raise SystemExit(f"no seed has all of {', '.join(ARMS)}")
    results = {arm: {seed: facts[arm] for seed, facts in seeds.items()} for arm in ARMS}
    arms = measured(results, "live")
    summary: dict[str, Any] = {"seeds": list(seeds), "test_tasks": len(seeds[min(seeds)]["sft"]["process"]), "arms": arms}
    recording = [facts["live_calls_of_recording"] for facts in results["sft"].values()]
    demonstrated = [facts["live_calls_of_demonstrations"] for facts in results["sft"].values()]
    summary |= {"live_calls_of_recording": recording, "live_calls_of_demonstrations": demonstrated}
    of_rl = np.array(arms["live"]["live_calls_of_rl"])
    summary["runs_until_paid"] = float(np.mean(np.array(recording) / of_rl))
    summary["runs_until_paid_with_demonstrations"] = float(np.mean((np.array(recording) + demonstrated) / of_rl))
    if answers := {seed: facts for seed, facts in answers.items() if seed in seeds}:
        alone = {"sft": {seed: seeds[seed]["sft"] for seed in answers}}
        alone |= {arm: {seed: facts[arm] for seed, facts in answers.items()} for arm in ANSWERS_ONLY}
        summary["answers_only"] = {"seeds": list(answers), "arms": measured(alone, ANSWERS_ONLY[0])}
    write_json(HERE / "result.json", summary)
    (HERE / "table.md").write_text("\n".join(tables(summary)) + "\n")
    draw(summary)
    print((HERE / "table.md").read_text())


def tables(summary: dict[str, Any]) -> list[str]:
    arms = summary["arms"]
    lines = [*table(arms), "", *family_table(arms)]
    lines += ["", *tier_table(arms), ""]
    recording, demonstrated = summary["live_calls_of_recording"], summary["live_calls_of_demonstrations"]
    lines.append(f"Live calls by seed: of recording the initial policy {_listed(recording)};")
    lines.append(f"of RL with live tools {_listed(arms['live']['live_calls_of_rl'])}.")
    paid, whole = summary["runs_until_paid"], summary["runs_until_paid_with_demonstrations"]
    lines.append(f"The cache has paid for itself after {paid:.2f} runs; with the demonstrators' calls, which SFT needs anyway")
    lines.append(f"({_listed(demonstrated)}), after {whole:.1f} runs.")
    if answers := summary.get("answers_only"):
        named = ", ".join(map(str, answers["seeds"]))
        lines += ["", f"Paid by answers alone, seed {named}:", "", *table(answers["arms"]), "", *family_table(answers["arms"])]
    return lines


def _listed(numbers: list[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)


def table(arms: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| trained with | process accuracy, live | over SFT | over live tools | answer | exact, first and last step |"]
    lines.append("|" + "---|" * 6)
    for arm, row in arms.items():
        cells = [arm, text(Interval(**row["process"]))]
        cells += [text(Interval(**row[k]), True) if k in row else "" for k in ("over_sft", "over_live")]
        cells.append(f"{row['answer']['mean']:.3f}")
        exact = [row[k].get("exact", 0) for k in ("tiers_first", "tiers_last") if k in row]
        cells.append(", ".join(f"{share:.2f}" for share in exact))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def family_table(arms: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| family | " + " | ".join(arms) + " |", "|" + "---|" * (1 + len(arms))]
    for f in arms["sft"]["families"]:
        lines.append(f"| {f} | " + " | ".join(f"{row['families'][f]['mean']:.2f}" for row in arms.values()) + " |")
    return lines


def tier_table(arms: dict[str, dict[str, Any]]) -> list[str]:
    served = {arm: row["tiers"] for arm, row in arms.items() if "tiers" in row}
    tiers = [tier.value for tier in Tier if any(tier.value in row for row in served.values())]
    lines = ["| calls of GRPO, all steps | " + " | ".join(tiers) + " |", "|" + "---|" * (1 + len(tiers))]
    lines += [f"| {arm} | " + " | ".join(f"{row.get(tier, 0):.3f}" for tier in tiers) + " |" for arm, row in served.items()]
    return lines


def draw(summary: dict[str, Any]) -> None:
    """Left every arm's accuracy, right what separates it from training with live tools that were paid alike."""
    arms = summary["arms"]
    answers = {arm: row for arm, row in summary.get("answers_only", {"arms": {}})["arms"].items() if arm != "sft"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.4), width_ratios=(1.3, 1))
    for x, (arm, row) in enumerate((arms | answers).items()):
        point(left, x, row["process"], arm)
        left.scatter([x + 0.18] * len(row["by_seed"]), row["by_seed"], s=9, color=COLOURS[arm.split()[0]], alpha=0.5)
    compared = [arm for arm in arms | answers if "over_live" in (arms | answers)[arm] and not arm.startswith("live")]
    for x, arm in enumerate(compared):
        point(right, x, (arms | answers)[arm]["over_live"], arm)
    for axis, names, label in (
        (left, list(arms | answers), "process accuracy with live tools"),
        (right, compared, "difference to training with live tools"),
    ):
        axis.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
        axis.set_ylabel(label)
    right.axhline(0, color=COLOURS["live"], lw=0.8)
    alone = f" (paid by answers alone: {len(summary['answers_only']['seeds'])})" if answers else ""
    seeds = f"{len(summary['seeds'])} seeds{alone}"
    figure.suptitle(f"{summary['test_tasks']} unseen tasks, {seeds}, 95 % intervals over seeds and tasks")
    figure.tight_layout()
    figure.savefig(HERE / "figure.png", dpi=150)


def point(axis: plt.Axes, x: float, i: dict[str, float], arm: str) -> None:
    face = "white" if arm.endswith("answers") else None
    error = [[i["mean"] - i["low"]], [i["high"] - i["mean"]]]
    axis.errorbar(x, i["mean"], error, fmt="o", color=COLOURS[arm.split()[0]], markerfacecolor=face, capsize=4)


if __name__ == "__main__":
    main()
