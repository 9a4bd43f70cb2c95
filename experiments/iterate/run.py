"""Two rounds of SFT, GRPO and rejection sampling, one seed, on the demo's world and on SGD.

Command:  python experiments/iterate/run.py --sgd DATA/sgd --out runs/iterate
Smoke:    python experiments/iterate/run.py --smoke --out runs/iterate_smoke

The same command goes on where it was stopped. Writes result.json, figure.png, table.md and a page a world beside this file,
in a smoke run into --out. Without --sgd, and in a smoke run, the demo's world alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cacherl_jax import metrics
from cacherl_jax.config import Config, load_config, smoke, with_overrides
from cacherl_jax.run_directory import RunDirectory
from cacherl_jax.stages import iterate
from cacherl_jax.versions import require
from cacherl_jax.whole_files import write_json

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
# Together 1.3 hours of one core. Every SFT of a world takes the same number of updates, whatever its rows.
ROUNDS = {
    "demo": ["iterate.rejection.tasks=800", "iterate.mix.repeats=3"],
    "sgd_small": [
        "sft.steps=1000", "grpo.steps=6", "grpo.validate_every=6", "iterate.rejection.tasks=200", "iterate.rejection.samples=2",
        "iterate.mix.repeats=3",
    ],
}  # fmt: skip


def configs(sgd: Path | None, small: bool) -> dict[str, Config]:
    chosen = {"demo": ROUNDS["demo"]}
    if sgd is not None and not small:
        chosen["sgd_small"] = [*ROUNDS["sgd_small"], f"data.path={sgd}"]
    whole = {name: with_overrides(load_config(CONFIGS / f"{name}.py"), sets) for name, sets in chosen.items()}
    return {name: smoke(config) for name, config in whole.items()} if small else whole


def table(results: dict[str, Any]) -> str:
    """Markdown: every version on the one metric, and what each round accepted."""
    lines = [
        "| world | version | rows of its SFT | of them accepted | process accuracy | answer | gain over sft0 |",
        "|---" * 7 + "|",
    ]
    for name, result in results.items():
        for round_ in result["rounds"]:
            data = round_["data"]
            for version in round_["versions"]:
                measured, gain = version[version["evaluated"]], version["gain_over_sft0"]
                cells = (_interval(measured["process"]), _interval(measured["answer"]), _interval(gain))
                rows = f"{data['rows']:,} | {data.get('accepted_rows', 0):,}"
                lines.append(f"| {name}, {version['evaluated']} | {version['version']} | {rows} | {' | '.join(cells)} |")
    lines += ["", "| world | round | episodes | tasks with one accepted | ends |", "|---" * 5 + "|"]
    for name, result in results.items():
        for round_ in result["rounds"]:
            if (r := round_["rejection"]) is not None:
                ends = ", ".join(f"{reason.replace('_', ' ')} {n}" for reason, n in r["counts"].items() if n)
                lines.append(f"| {name} | {round_['round']} | {r['episodes']:,} | {r['tasks_accepted']} of {r['tasks']} | {ends} |")
    return "\n".join(lines) + "\n"


def _interval(v: dict[str, float]) -> str:
    return f"{v['mean']:.3f} [{v['low']:.2f}, {v['high']:.2f}]"


def draw(results: dict[str, Any], path: Path) -> None:
    require("matplotlib", "report").use("Agg")
    plt = require("matplotlib.pyplot", "report")
    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 3.6), constrained_layout=True, squeeze=False)
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        for source, colour, line in (("live", "#0072B2", "o-"), ("cached", "#E69F00", "x:")):  # often the same
            if source in result["versions"][0]:
                points = [version[source]["process"] for version in result["versions"]]
                errors = np.clip([[p["mean"] - p["low"] for p in points], [p["high"] - p["mean"] for p in points]], 0, None)
                names = [version["version"] for version in result["versions"]]
                axis.errorbar(names, [p["mean"] for p in points], errors, fmt=line, color=colour, capsize=3, label=source)
        axis.set(title=f"{name}, {result['tasks']} test tasks", ylabel="process accuracy", ylim=(0, 1))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sgd", type=Path, help="folder with SGD's train/ and dev/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--smoke", action="store_true", help="seconds: a tiny model that learns nothing")
    args = parser.parse_args(argv)
    into = args.out if args.smoke else HERE
    results = {}
    for name, config in configs(args.sgd, args.smoke).items():
        run = RunDirectory(args.out / name, config)
        results[name] = iterate.iterate(run, metrics.progress_factory(enabled=not args.smoke))
        shutil.copy(run.out / "rounds.html", into / f"{name}.html")
    write_json(into / "result.json", results)
    (into / "table.md").write_text(table(results))
    draw(json.loads((into / "result.json").read_text()), into / "figure.png")
    print((into / "table.md").read_text())


if __name__ == "__main__":
    main()
