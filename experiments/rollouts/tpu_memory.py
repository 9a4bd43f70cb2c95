"""Compiles the engine's programs for TPUs, without one, at the size of Qwen3-4B: memory, copies of the cache, collectives.

The compiler that comes with `pip install "jax[tpu]"` runs on any x86-64 machine: no weights are made, nothing is executed.
Prints a line a program and writes tpu_memory.json. --layout compiles one layout of your own instead and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}  # before jax: it looks for no TPU

import jax

from cacherl_jax import mesh as meshes
from cacherl_jax import sizes
from cacherl_jax.config import MeshConfig, RolloutConfig
from cacherl_jax.plan import hlo
from cacherl_jax.plan.measure import devices
from cacherl_jax.plan.programs import engine_programs
from cacherl_jax.plan.topology import parse

GIB = 2**30
# topology, data, tp, rows a device (of tp devices together), context. A chip of v5e has 15.75 GiB, one of v6e 31.25.
LAYOUTS = [
    ("v5e:1x1", 1, 1, 8, 4096),
    ("v5e:2x4", 4, 2, 16, 8192),
    ("v5e:2x4", 1, 8, 80, 8192),
    ("v6e:2x4", 8, 1, 16, 8192),
]
PROGRAMS = ["init", "prefill 1024", "prefill 128", "prefill 16", "copy", "decode"]
LOOPS = {"decode": ["dispatch", "step", "layer"], "prefill": ["dispatch", "layer"]}  # how often, by depth of loops


def per(program: str, loops: Sequence[int | None]) -> str:
    """The innermost loop around a collective, by its meaning."""
    names = LOOPS.get(program.split()[0], ["dispatch"])
    return names[min(len(loops), len(names) - 1)]


def measure(topology: str, data: int, tp: int, rows: int, context: int, layers: int, name: str) -> dict[str, Any]:
    mesh = meshes.make_mesh(MeshConfig(data=data, tp=tp), devices(parse(topology))[: data * tp])
    model = replace(sizes.QWEN3_4B_2507, num_layers=layers, dtype="bfloat16")
    config = RolloutConfig(rows=rows, context=context, decode_steps=16)
    out = {"topology": topology, "data": data, "tp": tp, "rows": rows, "context": context, "layers": layers, "program": name}
    program, arguments = engine_programs(model, config, mesh)[name]
    try:
        compiled = program.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        return out | {"error": str(error).splitlines()[0][:300]}
    memory, text = compiled.memory_analysis(), compiled.as_text()
    half = 2 * layers * rows * 8 // tp * context * 128  # bytes of the keys of all rows of a chip
    copied = sum(hlo.size(line.split(" copy(")[0].split(" = ")[1]) == half for line in text.splitlines() if " copy(" in line)
    gib = {
        "arguments": memory.argument_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "cache": 2 * half,
    }
    gib = {key: round(value / GIB, 3) for key, value in gib.items()}
    found = hlo.collectives(text)
    sent = [{"op": c.op, "bytes": c.bytes, "per": per(name, c.loops), "of": c.of, "count": c.count} for c in found]
    return out | gib | {"cache_copies": copied, "collectives": sent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", help="TOPOLOGY,DATA,TP,ROWS,CONTEXT, such as v5e:2x4,4,2,16,8192")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--programs", nargs="+", default=PROGRAMS)
    args = parser.parse_args()
    layouts = LAYOUTS
    if args.layout:
        topology, *numbers = args.layout.split(",")
        data, tp, rows, context = map(int, numbers)
        layouts = [(topology, data, tp, rows, context)]
    results = []
    for layout in layouts:
        for name in args.programs:
            results.append(measure(*layout, args.layers, name))
            print({key: value for key, value in results[-1].items() if key != "collectives"}, flush=True)
    if args.layout:
        print(json.dumps(results, indent=1))
        return
    versions = {name: version(name) for name in ("jax", "jaxlib", "libtpu")}
    out = {"versions": versions, "unit": "GiB a chip", "programs": results}
    Path(__file__).with_suffix(".json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
