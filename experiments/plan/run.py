"""Compiles every launch configuration's steps, and the rows of a sketch's table of memory, for TPUs, without one.

Each result goes to its own file in experiments/plan/results/ and is not made again; table.md is written from them at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path
from typing import Any

from cacherl_jax import cli

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path(__file__).parent / "results"
GIB = 2**30

LAUNCH = {
    "qwen3_4b_v5e_8": "v5e:2x4",
    "qwen3_4b_v6e_8": "v6e:2x4",
    "qwen3_4b_v5p_8": "v5p:2x2x1",
    "qwen3_0_6b_v5e_1": "v5e:1x1",
    "qwen3_4b_lora_v6e_1": "v6e:1x1",
    "qwen3_4b_paper": "v6e:1x1",
}
STEPS = ("sft", "grpo")


def sketch(topology: str, rows: int, length: int, peak: float, *more: str) -> tuple[str, list[str], float]:
    """(topology, overrides of configs/qwen3_4b_v6e_8.py, the sketch's peak in GiB): SFT of `rows` rows of `length` tokens."""
    packed = [f"{part}.packed_length={length}" for part in ("sft", "grpo")]
    return topology, [f"rollout.context={length}", *packed, f"sft.tokens_per_batch={rows * length}", *more], peak


ADAPTER = ("mesh.fsdp=1", "sft.lora.rank=16", "model.dtype=bfloat16")
SKETCH = {
    "full, 8 x 8,192, v5e": sketch("v5e:2x4", 8, 8192, 11.4),
    "full, 8 x 16,384, v5e": sketch("v5e:2x4", 8, 16384, 14.3),
    "full, 2 x 32,768, seq 4, v5e": sketch("v5e:2x4", 2, 32768, 11.3, "mesh.fsdp=2", "mesh.seq=4"),
    "full, 8 x 32,768, v6e": sketch("v6e:2x4", 8, 32768, 18.6),
    "full, 4 x 32,768, v5p": sketch("v5p:2x2x1", 4, 32768, 27.6, "mesh.fsdp=4"),
    "LoRA 16, 1 x 4,096, v5e": sketch("v5e:1x1", 1, 4096, 9.7, *ADAPTER),
    "LoRA 16, 1 x 16,384, v5e": sketch("v5e:1x1", 1, 16384, 13.8, *ADAPTER),
    "LoRA 16, 1 x 8,192, v6e": sketch("v6e:1x1", 1, 8192, 10.9, *ADAPTER),
}


def planned(name: str, config: str, topology: str, step: str, overrides: list[str]) -> dict[str, Any]:
    """The result of `cacherl plan --json`, from its file if it is there."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        sets = [word for override in overrides for word in ("--set", override)]
        arguments = ["plan", "--config", str(ROOT / "configs" / f"{config}.py"), "--topology", topology, "--step", step, *sets]
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            status = cli.main([*arguments, "--json"])
        if status:
            raise SystemExit(f"{name}: cacherl plan ended with status {status}")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(json.loads(out.getvalue()), indent=1) + "\n")
    result = json.loads(path.read_text())
    print(name, "fits" if result["fits"] else "does not fit", round(result["peak_bytes"] / GIB, 2), flush=True)
    return result


def slug(row: str) -> str:
    return "sketch_" + "".join(c if c.isalnum() else "_" for c in row.replace(",", "")).lower().replace("__", "_")


def gib(n: int | None) -> str:
    return "-" if n is None else f"{n / GIB:.2f}"


def launch_table() -> list[str]:
    lines = ["| config | slice | step | batch | arguments | temporaries | peak | of | limit | fits | TFLOP | s, FLOPs | s, bytes |"]
    lines.append("|---" * 13 + "|")
    for config, topology in LAUNCH.items():
        for step in STEPS:
            path = RESULTS / f"{config}_{step}.json"
            if path.is_file():
                r = json.loads(path.read_text())
                cells = [config, topology, step, f"{r['rows']} x {r['length']:,}", gib(r["arguments_bytes"])]
                cells += [gib(r["temporaries_bytes"]), gib(r["peak_bytes"]), r["peak_of"], gib(r["limit_bytes"])]
                cells.append("yes" if r["fits"] else "no")
                cells += [f"{r['model_flops'] / 1e12:,.1f}", f"{r['flops_seconds']:.3g}", f"{r['hbm_seconds']:.3g}"]
                lines.append("| " + " | ".join(cells) + " |")
    return lines


def sketch_table() -> list[str]:
    lines = ["| row | arguments | temporaries | peak | sketch's peak | ratio |", "|---" * 6 + "|"]
    for row, (_, _, peak) in SKETCH.items():
        path = RESULTS / f"{slug(row)}.json"
        if path.is_file():
            r = json.loads(path.read_text())
            ratio = r["peak_bytes"] / GIB / peak
            cells = [row, gib(r["arguments_bytes"]), gib(r["temporaries_bytes"]), gib(r["peak_bytes"]), str(peak), f"{ratio:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="results whose name has this text")
    args = parser.parse_args()
    jobs = [(slug(row), "qwen3_4b_v6e_8", topology, "sft", sets) for row, (topology, sets, _) in SKETCH.items()]
    jobs += [(f"{config}_{step}", config, topology, step, []) for config, topology in LAUNCH.items() for step in STEPS]
    for job in jobs:
        if args.only in job[0]:
            planned(*job)
            table = [*sketch_table(), "", *launch_table()]
            (Path(__file__).parent / "table.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
