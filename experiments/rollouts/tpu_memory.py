"""Compiles the engine's programs for TPUs, without one, at the size of Qwen3-4B: memory, copies of the cache, collectives.

The compiler that comes with `pip install "jax[tpu]"` runs on any x86-64 machine: no weights are made, nothing is executed.
Prints a line a program and writes tpu_memory.json. --layout compiles one layout of your own instead and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}  # before jax: it looks for no TPU

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cacherl_jax import mesh as meshes
from cacherl_jax.config import MeshConfig, ModelConfig, RolloutConfig
from cacherl_jax.model import qwen3
from cacherl_jax.rollout import engine

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
COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
ARRAY = re.compile(r"\b(pred|bf16|f32|s32|u32)\[([\d,]*)\]")
BYTES = {"pred": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4}


def qwen3_4b(layers: int) -> ModelConfig:
    """Qwen3-4B's config.json, with as many layers."""
    return ModelConfig(
        vocab_size=151_936,
        hidden_size=2560,
        num_layers=layers,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=9728,
        rope_theta=5e6,
        dtype="bfloat16",
    )


def programs(model: ModelConfig, config: RolloutConfig, mesh: Mesh) -> dict[str, tuple[Any, tuple]]:
    """Each compiled function of an engine, by name, with the shapes and shardings of its arguments."""
    own = engine.Engine(model, config, (151_645, 151_643), mesh)
    rows, ways = meshes.rows_sharding(mesh), meshes.row_ways(mesh)

    def placed(shardings: Any, shapes: Any) -> Any:
        return jax.tree.map(lambda s, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shardings, shapes)

    def ints(count: int, width: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count * ways, width), jnp.int32, sharding=rows)

    weights = placed(qwen3.shardings(model, mesh), jax.eval_shape(lambda: qwen3.init(model, jax.random.key(0))))
    state = placed(engine._layout(meshes.cache_sharding(mesh), rows), jax.eval_shape(own._init))
    temperature = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P()))
    prefills = {f"prefill {w}": (own._prefill, (weights, state.cache, ints(n, 3 + w))) for w, n in engine.PREFILLS.items()}
    return prefills | {
        "init": (own._init, ()),
        "copy": (own._copy, (state.cache, ints(engine.COPIES, 2))),
        "decode": (own._decode, (weights, state, ints(config.rows, 7), temperature)),
    }


def size(hlo_type: str) -> int:
    """Bytes of an array, or of all of a tuple."""
    return sum(BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in ARRAY.findall(hlo_type))


def collectives(name: str, hlo: str) -> list[dict[str, Any]]:
    """What devices send each other: op, bytes of the result, once per layer, step or dispatch, of which code, how many alike."""
    loops, found = LOOPS.get(name.split()[0], ["dispatch"]), Counter()
    for line in hlo.splitlines():
        if match := COLLECTIVE.search(line):
            path = re.search(r'op_name="([^"]*)"', line)
            source = path[1] if path else ""
            per = loops[min(source.count("while/body"), len(loops) - 1)]
            of = re.sub(r"/(dot_general|gather)$", "", source).rsplit("/", 1)[-1]
            found[match[2], size(match[1]), per, of] += 1
    return [{"op": op, "bytes": n, "per": per, "of": of, "count": count} for (op, n, per, of), count in found.items()]


def measure(topology: str, data: int, tp: int, rows: int, context: int, layers: int, name: str) -> dict[str, Any]:
    chips = [int(n) for n in topology.split(":")[1].split("x")]  # all of one host
    target = topologies.get_topology_desc(platform="tpu", topology_name=topology, chips_per_host_bounds=(*chips, 1))
    devices = target.devices
    mesh = meshes.make_mesh(MeshConfig(data=data, tp=tp), devices[: data * tp])
    model, config = qwen3_4b(layers), RolloutConfig(rows=rows, context=context, decode_steps=16)
    out = {"topology": topology, "data": data, "tp": tp, "rows": rows, "context": context, "layers": layers, "program": name}
    program, arguments = programs(model, config, mesh)[name]
    try:
        compiled = program.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        return out | {"error": str(error).splitlines()[0][:300]}
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    half = 2 * layers * rows * 8 // tp * context * 128  # bytes of the keys of all rows of a chip
    copied = sum(size(line.split(" copy(")[0].split(" = ")[1]) == half for line in hlo.splitlines() if " copy(" in line)
    gib = {
        "arguments": memory.argument_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "cache": 2 * half,
    }
    gib = {key: round(value / GIB, 3) for key, value in gib.items()}
    return out | gib | {"cache_copies": copied, "collectives": collectives(name, hlo)}


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
