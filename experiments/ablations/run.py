"""Rows of the paper's table of ablations (paper: arXiv 2606.14179): one part is taken away, all else stays.

Command:  python experiments/ablations/run.py --out runs/ablations
Others:   python experiments/ablations/run.py --out runs/ablations --rows rejection kl data thinking
Smoke:    python experiments/ablations/run.py --smoke --out runs/ablations_smoke

Every policy is measured alike: process accuracy, which knows no tiers, on the test tasks with live tools. A seed changes the
world's rows, the tasks, the initialisation and every draw; both sides of a row share it. The same command goes on where it was
stopped. Writes result.json, figure.png and table.md beside this file, in a smoke run into --out; rows that are there, of the same
seeds, stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cacherl_jax import metrics
from cacherl_jax.config import Config, load_config, smoke, with_overrides
from cacherl_jax.evaluate.intervals import hierarchical_difference
from cacherl_jax.run_directory import RunDirectory
from cacherl_jax.stages import eval, grpo, inputs, iterate, record, sft, think
from cacherl_jax.trajectories.transcripts import read_transcripts
from cacherl_jax.types import Transcript
from cacherl_jax.versions import require
from cacherl_jax.whole_files import write_json

HERE = Path(__file__).parent
PAPER_FULL = 0.779  # validation reward, which is another metric than ours: relative changes are compared


def world() -> Config:
    """What is ablated. The one place to change for another world or size."""
    return load_config(HERE.parents[1] / "configs" / "hard_world.py")


Thoughts = Literal["all", "wrapped", "none"]


@dataclass(frozen=True)
class Row:
    """A part taken away. paper: what remains of PAPER_FULL there. changes: overrides of the configuration. thoughts: which
    reasoning SFT sees. removed, full: the policies compared, "VARIANT:POLICY"; a row's own name is its variant."""

    part: str
    paper: float
    changes: tuple[str, ...] = ()
    thoughts: Thoughts = "all"
    removed: str = ""
    full: str = "full:grpo"


FAITHFUL = [f"cache.fidelity_{tier}=1.0" for tier in ("exact", "adapted", "fuzzy", "best_effort", "miss")]
ROWS = {
    "grpo": Row("GRPO", 0.756, removed="full:sft"),
    "tier": Row("tier-aware reward", 0.645, ("cache.fidelity=table", *FAITHFUL)),  # every answer weighs as a true one
    "exact": Row("cache tiers (exact only)", 0.542, ("cache.adapted=false", "cache.fuzzy_threshold=1.1", "cache.best_effort=off")),
    "reasoning": Row("written reasoning", 0.458, thoughts="wrapped"),
    # Run by the same command, and left to those with accelerators.
    "rejection": Row("rejection sampling", 0.687, removed="full:grpo", full="rounds:grpo"),
    "kl": Row("KL", 0.621, ("grpo.kl_coef=0.0",)),
    "data": Row("44K data (1.5K instead)", 0.614),  # the same share of ours, see `config_of`
    "thinking": Row("thinking mode", 0.412, thoughts="none"),
}
HERE_RUN = ("grpo", "tier", "exact", "reasoning")
DATA_LEFT = 1.5 / 44.449


def policies_of(name: str) -> tuple[str, str]:
    """(removed, full) of a row, each "VARIANT:POLICY"."""
    row = ROWS[name]
    return row.removed or f"{name}:grpo", row.full


def config_of(variant: str, seed: int, small: bool) -> Config:
    config = with_overrides(smoke(world()) if small else world(), [f"seed={seed}"])
    if variant == "data":
        fewer = max(1, round(config.data.train_tasks * DATA_LEFT))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, train_tasks=fewer))
    if variant == "rounds":
        return with_overrides(config, ["iterate.rounds=2"])
    return with_overrides(config, ROWS[variant].changes if variant in ROWS else [])


# ---- one run ---------------------------------------------------------------------------------------------------------


def unthought(run: RunDirectory, thoughts: Thoughts) -> list[Transcript]:
    """The transcripts as SFT is to see them. "wrapped": without what the teacher wrote; what the agents themselves said before
    they acted still stands in the thinking block. "none": as they were recorded."""
    recorded, _ = read_transcripts(run.out / "record" / "transcripts.jsonl")
    if thoughts == "none":
        return recorded
    shown = []
    for before, after in zip(recorded, sft.thought(run), strict=True):
        pairs = zip(before.messages, after.messages, strict=True)
        messages = [dataclasses.replace(b, reasoning=a.reasoning) if a.content == b.content else b for a, b in pairs]
        shown.append(dataclasses.replace(after, messages=tuple(messages)))
    return shown


def clone(run: RunDirectory, thoughts: Thoughts, full: RunDirectory, progress: metrics.ProgressFactory) -> None:
    """SFT of a variant. That of the full system is copied where nothing differs but what serves or weighs answers."""
    alike = dataclasses.replace(run.config, cache=full.config.cache, grpo=full.config.grpo) == full.config
    shared = full.out != run.out and thoughts == "all" and alike and full.done("sft") is not None

    def copy(folder: Path) -> dict[str, Any]:
        shutil.copytree(full.out / "sft" / "checkpoints", folder / "checkpoints", dirs_exist_ok=True)
        return full.require("sft")

    def rows() -> Any:
        return sft.transcript_rows(run, sft.thought(run) if thoughts == "all" else unthought(run, thoughts))

    if shared and transcripts_of(full) == transcripts_of(run):
        run.run("sft", inputs.SFT, copy)
    else:
        sft.clone(run, "sft", rows, progress)


def transcripts_of(run: RunDirectory) -> bytes:
    return (run.out / "think" / "transcripts.jsonl").read_bytes()


def train(run: RunDirectory, variant: str, full: RunDirectory, progress: metrics.ProgressFactory) -> dict[str, list[float]]:
    """All stages of a variant; each policy's process accuracy on the test tasks, task by task, with live tools."""
    if variant == "rounds":
        iterate.iterate(run, progress)
        folder, names = run.out / "round1" / "eval" / "grpo1", {"grpo": "grpo1"}
    else:
        thoughts = ROWS[variant].thoughts if variant in ROWS else "all"
        record.record(run, progress)
        think.think(run, progress)
        clone(run, thoughts, full, progress)
        grpo.reinforce(run, progress)
        played = {"sft": "sft", "grpo": "grpo"} if variant == "full" else {"grpo": "grpo"}
        run.run("eval", (*inputs.GRPO, "eval"), partial(eval.play, run, policies=played, progress=progress))
        folder, names = run.out / "eval", played
    tasks, specs = inputs.load_tasks(run, "test"), inputs.load_specs(run)
    return {policy: eval.correct(folder / f"{name}.live.jsonl", tasks, specs) for policy, name in names.items()}


# ---- all of them -----------------------------------------------------------------------------------------------------


def compare(name: str, right: dict[str, list[list[float]]], draws: int) -> dict[str, Any]:
    """A row of the table; `right` has a list a seed of every "VARIANT:POLICY"."""
    removed, full = (right[policy] for policy in policies_of(name))
    difference = hierarchical_difference(removed, full, seed=0, draws=draws)
    whole = float(np.mean([np.mean(run) for run in full]))
    return {
        "removed": ROWS[name].part,
        "full": whole,
        "without": float(np.mean([np.mean(run) for run in removed])),
        "by_seed": [[float(np.mean(run)) for run in runs] for runs in (full, removed)],
        "difference": difference.to_json(),
        # The interval is that of the difference, over the full system's mean as measured.
        "relative": {k: getattr(difference, k) / whole if whole else 0.0 for k in ("mean", "low", "high")},
        "paper_relative": ROWS[name].paper / PAPER_FULL - 1,
    }


def with_earlier(rows: Sequence[dict[str, Any]], seeds: Sequence[int], path: Path) -> list[dict[str, Any]]:
    """`rows`, and beside them the others of an earlier result with the same seeds, in the order of ROWS."""
    known = json.loads(path.read_text()) if path.is_file() else {"seeds": [], "rows": []}
    kept = known["rows"] if known["seeds"] == list(seeds) else []
    by_part = {row["removed"]: row for row in (*kept, *rows)}
    return [by_part[row.part] for row in ROWS.values() if row.part in by_part]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| removed | process accuracy, full | without | difference | relative | the paper's |", "|---" * 6 + "|"]
    for row in rows:
        difference, relative = row["difference"], row["relative"]
        cells = [row["removed"], f"{row['full']:.3f}", f"{row['without']:.3f}"]
        cells.append(f"{difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]")
        cells += [f"{relative['mean']:+.0%} [{relative['low']:+.0%}, {relative['high']:+.0%}]", f"{row['paper_relative']:+.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    require("matplotlib", "report").use("Agg")
    plt = require("matplotlib.pyplot", "report")
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.6 * len(rows)), constrained_layout=True)
    y = np.arange(len(rows))[::-1]
    ours = [row["relative"] for row in rows]
    errors = [[r["mean"] - r["low"] for r in ours], [r["high"] - r["mean"] for r in ours]]
    axis.barh(y + 0.18, [r["mean"] for r in ours], 0.34, xerr=errors, capsize=3, color="#0072B2", label="here, 95 % interval")
    axis.barh(y - 0.18, [row["paper_relative"] for row in rows], 0.34, color="#BBBBBB", label="paper, validation reward")
    axis.set_yticks(y, [f"no {row['removed']}" for row in rows])
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel="relative change")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="best", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=HERE_RUN)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--smoke", action="store_true", help="seconds: a tiny model that learns nothing, one seed")
    args = parser.parse_args(argv)
    seeds = args.seeds[:1] if args.smoke else args.seeds
    variants = {policy.split(":")[0] for name in args.rows for policy in policies_of(name)}
    right: dict[str, list[list[float]]] = {}
    for seed in seeds:
        full = RunDirectory(args.out / f"seed{seed}" / "full", config_of("full", seed, args.smoke))
        for variant in sorted(variants, key=["full", *ROWS, "rounds"].index):  # the full system first, whose SFT others copy
            run = RunDirectory(args.out / f"seed{seed}" / variant, config_of(variant, seed, args.smoke))
            for policy, values in train(run, variant, full, metrics.progress_factory(enabled=not args.smoke)).items():
                right.setdefault(f"{variant}:{policy}", []).append(values)
    folders = [folder for seed in seeds for folder in (args.out / f"seed{seed}").iterdir()]
    spent = sum(sum(RunDirectory(folder, world()).cpu_seconds().values()) for folder in folders)  # other rows' as well
    into = args.out if args.smoke else HERE
    rows = [compare(name, right, world().eval.bootstrap) for name in args.rows]
    rows = with_earlier(rows, seeds, into / "result.json")
    write_json(into / "result.json", {"seeds": list(seeds), "cpu_seconds": round(spent, 1), "rows": rows})
    (into / "table.md").write_text(table(rows))
    draw(rows, into / "figure.png")
    print(table(rows))


if __name__ == "__main__":
    main()
