"""CPU time of a training step: ours, Tunix and torch in turn, each a process in an environment of its own.

Command:  python experiments/perf/training.py --tunix PYTHON_OF_TUNIX --torch PYTHON_OF_TORCH      (README.md makes the two)

All sides load one checkpoint with random weights and take the same steps on the same tokens by the same optimizer (AdamW,
clipped by global norm); their losses are compared. Each takes some steps to warm up, then some a round, in changing order;
a figure is the CPU time of the whole process by step, a ratio is taken within a round. Prints medians with the least and
the most over rounds, writes training.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import training_task as task
from rollouts import Side, over, spread
from safetensors.numpy import save_file

from cacherl_jax.config import ModelConfig
from cacherl_jax.model import qwen3
from cacherl_jax.model.hf import to_hf
from cacherl_jax.model.hf_config import to_hf_config

HERE = Path(__file__).parent
COUNT = {"8 x 512, d 256": 1, "8 x 112, d 128": 8, "16 x 224, d 128": 2}  # steps a round


def model_config(name: str) -> ModelConfig:
    sizes = task.MODELS[name]
    return ModelConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        num_layers=sizes["layers"],
        num_heads=sizes["heads"],
        num_kv_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        intermediate_size=sizes["ffn"],
        rope_theta=task.ROPE_THETA,
        rms_norm_eps=task.EPS,
        tie_word_embeddings=bool(sizes["tied"]),
    )


def make_checkpoint(name: str, folder: Path) -> None:
    """config.json and model.safetensors in the form of Hugging Face."""
    folder.mkdir()
    config = model_config(name)
    (folder / "config.json").write_text(json.dumps(to_hf_config(config)))
    tensors = to_hf(config, qwen3.to_dict(qwen3.init(config, jax.random.key(0))))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def measure(sides: list[Side], rounds: int) -> tuple[dict[str, Any], dict[str, dict[str, list[float]]]]:
    """(what the first step cost, CPU milliseconds of a step by work, side and round).

    Raises RuntimeError when losses differ, or a warm program compiles.
    """
    first = {work: {s.name: s.run({"program": work, "count": 1}) for s in sides} for work in COUNT}
    for work, count in COUNT.items():
        check_equal(work, first[work])
        check_equal(work, {s.name: s.run({"program": work, "count": count}) for s in sides})
    taken: dict[str, dict[str, list[float]]] = {work: {s.name: [] for s in sides} for work in COUNT}
    rng = random.Random(0)
    for done in range(rounds):
        print(f"round {done + 1} of {rounds}", file=sys.stderr, flush=True)
        for work, count in COUNT.items():
            answers = {side.name: side.run({"program": work, "count": count}) for side in rng.sample(sides, len(sides))}
            check_equal(work, answers)
            for side, answer in answers.items():
                if answer.get("compilations"):
                    raise RuntimeError(f"{side} compiled again in {work!r}: {answer}")
                taken[work][side].append(answer["cpu"] * 1e3 / count)
    return first, taken


def check_equal(work: str, answers: dict[str, Any]) -> None:
    losses = {side: a["losses"] for side, a in answers.items()}
    if not all(np.allclose(found, losses["ours"], rtol=1e-3) for found in losses.values()):
        raise RuntimeError(f"the sides have different losses in {work!r}: {losses}")


def main() -> None:
    parser = argparse.ArgumentParser(description="The CPU time of a training step beside Tunix and torch.")
    parser.add_argument("--tunix", required=True, help="python of an environment with google-tunix")
    parser.add_argument("--torch", required=True, help="python of an environment with torch and transformers")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for model in task.MODELS:
            make_checkpoint(model, Path(name) / model)
        pythons = {"ours": sys.executable, "tunix": args.tunix, "torch": args.torch}
        sides = [Side(side, python, Path(name), "training") for side, python in pythons.items()]
        try:
            first, taken = measure(sides, args.rounds)
        finally:
            for side in sides:
                side.process.terminate()
    figures = {work: {s: spread(v) for s, v in by_side.items()} for work, by_side in taken.items()}
    ratios = {work: {s: over(v["ours"], v[s]) for s in ("tunix", "torch")} for work, v in taken.items()}
    result = {
        "versions": {s.name: s.versions for s in sides},
        "rounds": args.rounds,
        "cpu_milliseconds": figures,
        "ours_over": ratios,
        "first_step_cpu_seconds": {work: {s: round(a["cpu"], 3) for s, a in by_side.items()} for work, by_side in first.items()},
    }
    print_table(figures, ratios)
    (HERE / "training.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def print_table(figures: dict[str, Any], ratios: dict[str, Any]) -> None:
    """The table of README.md."""

    def cell(f: dict[str, float], digits: int) -> str:
        return f"{f['median']:.{digits}f} ({f['least']:.{digits}f} to {f['most']:.{digits}f})"

    print("\n| CPU ms a step | ours | Tunix | torch | ours / Tunix | ours / torch |\n|---|---|---|---|---|---|")
    for work, by_side in figures.items():
        cells = [cell(by_side[s], 0) for s in ("ours", "tunix", "torch")] + [cell(ratios[work][s], 2) for s in ("tunix", "torch")]
        print(f"| {work} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
