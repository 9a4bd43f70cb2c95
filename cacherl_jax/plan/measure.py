"""Compiles a step for a TPU slice and says what it needs; run as a program of its own, with the job on standard input.

The environment decides before jax is imported that no accelerator of this machine is touched: verbs/plan.py sets it.
"""

from __future__ import annotations

import json
import re
import sys
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from cacherl_jax import mesh as meshes
from cacherl_jax.config import Config, ConfigError
from cacherl_jax.plan import changes, flops, hlo, programs
from cacherl_jax.plan.topology import GIB, Topology, parse

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def devices(topology: Topology) -> list[Any]:
    """The chips of a slice, as the compiler describes them."""
    several = {"num_slices": topology.slices} if topology.slices > 1 else {}
    found = topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{topology.kind}:{topology.size}",
        chips_per_host_bounds=topology.host,
        **several,
    )
    return list(found.devices)


def mesh_of(config: Config, topology: Topology) -> Mesh:
    """The run's mesh on the slice. Raises ConfigError when it has another number of chips."""
    try:
        return meshes.make_mesh(config.mesh, devices(topology))
    except ConfigError as error:
        raise ConfigError(f"{error} in {topology.name}; for example --set mesh.fsdp=N") from error


def compile_step(config: Config, topology: Topology, step: str) -> dict[str, Any]:
    """The figures of one step, bytes a chip. Where the compiler runs out of memory its own figure is the peak.

    trainer_bytes: what a GRPO run holds beside the engine, and `fits` does not count: an engine may well run alone.
    """
    limit = int(topology.chip.hbm_gib * GIB)
    mesh = mesh_of(config, topology)
    parts, arguments, work = programs.programs(config, step, mesh)
    seconds, measured, found = 0.0, [], []
    for program in parts:
        began = time.perf_counter()
        try:
            compiled = program.lower(*program.arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            needed = _needed(str(error), programs.bytes_of(program.arguments))
            if needed is None:
                raise
            measured.append({"program": program.name, "peak": needed + program.resident, "temporaries": None})
        else:
            memory = compiled.memory_analysis()
            made = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            peak = memory.peak_memory_in_bytes + program.resident
            measured.append({"program": program.name, "peak": peak, "temporaries": made})
            if program.trains:
                found += [{"program": program.name, **c} for c in hlo.to_json(hlo.collectives(compiled.as_text()))]
        seconds += time.perf_counter() - began
    worst = max(measured, key=lambda m: m["peak"])
    work_flops = model_flops(config, step, work)
    return {
        "topology": topology.name,
        "step": step,
        "rows": work.rows,
        "length": work.length,
        "batches": work.batches,
        "fits": all(m["temporaries"] is not None for m in measured) and worst["peak"] <= limit,
        "arguments_bytes": arguments,
        "temporaries_bytes": worst["temporaries"],
        "peak_bytes": worst["peak"],
        "limit_bytes": limit,
        "peak_of": worst["program"],
        "peaks": {m["program"]: m["peak"] for m in measured},
        "model_flops": work_flops,
        "flops_seconds": work_flops / topology.chips / topology.chip.flops,
        "hbm_seconds": hbm_traffic(config, parts, work) / topology.chip.hbm_bytes,
        "collectives_seconds": sum(c["bytes"] * c["times"] for c in found) / topology.chip.ici_bytes,
        "compile_seconds": round(seconds, 1),
        "collectives": found,
    }


def _needed(message: str, arguments: int) -> int | None:
    """What the compiler says that a program needs; None if its message is about something else. It names either all that
    is used in HBM, or temporaries alone when these are more than the chip has."""
    if match := re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message):
        return int(float(match[1]) * UNITS[match[2]])
    if match := re.search(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)", message):
        return int(float(match[1]) * UNITS[match[2]]) + arguments
    return None


def model_flops(config: Config, step: str, work: programs.Work) -> int:
    """Of one batch's gradients, or of one dispatch, on all chips; a cache counts as full."""
    c, r = config.model, config.rollout
    if step == "decode":
        return r.decode_steps * flops.decode(c, work.rows, r.context)
    if step == "prefill":
        return flops.prefill(c, work.rows, work.length, max(0, r.context - work.length))
    return flops.gradients(c, work.rows, work.length, (config.sft if step == "sft" else config.grpo).lora)


def hbm_traffic(config: Config, parts: list[programs.Program], work: programs.Work) -> float:
    """Bytes that a chip moves at least for the batch, or the dispatch: a program reads its arguments, the engine's decode
    once a token; the update, which several batches share, writes the state again."""
    times = {"decode": config.rollout.decode_steps, "update": 2 / work.batches}
    return sum(programs.bytes_of(p.arguments) * times.get(p.name, 1) for p in parts if p.trains)


def plan(config: Config, topology: Topology, step: str) -> dict[str, Any]:
    """`compile_step`, and where that does not fit, the most promising single change, compiled too."""
    result = compile_step(config, topology, step)
    if result["fits"]:
        return result
    chosen = changes.most_promising(
        config, topology, step, result["peak_bytes"], lambda c, t: programs.programs(c, step, mesh_of(c, t))
    )
    if chosen is None:
        return result | {"change": None}
    changed = compile_step(chosen.config, chosen.topology, step)
    kept = ("fits", "topology", "arguments_bytes", "temporaries_bytes", "peak_bytes", "limit_bytes", "compile_seconds")
    return result | {"change": {"what": chosen.what, **{key: changed[key] for key in kept}}}


def main() -> None:
    job = json.load(sys.stdin)
    try:
        out = plan(Config.from_json(job["config"]), parse(job["topology"]), job["step"])
    except ConfigError as error:
        out = {"refused": str(error)}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
