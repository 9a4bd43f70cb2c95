"""`cacherl plan`: what a step of a run needs on a TPU slice, from the TPU's compiler, on a machine without one.

The step is compiled in a process of its own that sees no accelerator, so that a run on this machine keeps its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from cacherl_jax.config import Config, ConfigError
from cacherl_jax.plan.topology import GIB, parse
from cacherl_jax.versions import require

STEPS = ("sft", "grpo", "prefill", "decode")
# Set before jax is imported. The last two: beside a run that holds the library's lock; seconds are those of a compilation.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "0",
}


class CompilerError(RuntimeError):
    """The compiler's process died for another reason than memory on the chip."""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--topology", required=True, metavar="NAME", help="the slice, such as v5e:2x4, or v5e:4x4@2 for two of them")
    verb.add_argument("--step", choices=STEPS, default="sft", help="what is compiled (default sft)")


def plan(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """The figures, see plan/measure.py. Raises ConfigError for what cannot be planned, MissingExtra without the compiler."""
    topology = parse(args.topology)
    if topology.slices == 1 and config.mesh.slices > 1:
        topology = replace(topology, slices=config.mesh.slices)
    if topology.slices != config.mesh.slices:
        raise ConfigError(f"--topology {topology.name} has {topology.slices} slices, mesh.slices={config.mesh.slices}")
    if not config.model.vocab_size:  # a trained tokenizer's may be smaller
        config = replace(config, model=replace(config.model, vocab_size=config.tokenizer.vocab_size))
    if importlib.util.find_spec("libtpu") is None:
        require("libtpu", "tpu")
    job = {"config": config.to_json(), "topology": topology.name, "step": args.step}
    result = run(job)
    if "refused" in result:
        raise ConfigError(result["refused"])
    return result


def run(job: dict[str, Any]) -> dict[str, Any]:
    """What plan/measure.py says of a job. Raises CompilerError with the end of its messages when it dies."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "cacherl_jax.plan.measure"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
    )
    if done.returncode:
        raise CompilerError(f"the compiler ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def readable(result: dict[str, Any]) -> dict[str, Any]:
    """The same for a reader: GiB and TFLOP in place of bytes and FLOPs, and the largest collectives alone."""
    out: dict[str, Any] = {}
    for name, value in result.items():
        if name.endswith("_bytes"):
            out[name.removesuffix("_bytes") + " GiB"] = None if value is None else round(value / GIB, 2)
        elif name == "model_flops":
            out["model TFLOP"] = value / 1e12
        elif name == "peaks":
            out["peaks GiB"] = {program: round(peak / GIB, 2) for program, peak in value.items()}
        elif name == "collectives":
            out[name] = [c | {"loops": "x".join("?" if n is None else str(n) for n in c["loops"]) or "-"} for c in value[:12]]
        else:
            out[name] = readable(value) if isinstance(value, dict) else value
    return out
