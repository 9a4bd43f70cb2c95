"""CPU time to compile the SFT step of Qwen3-4B, all 36 layers, for 8 simulated CPU devices (data 1, fsdp 4, tp 2).

Command:  python experiments/perf/compile_time.py      (about a minute of CPU time; prints the figures as JSON)

Nothing is allocated and nothing runs: the weights, the optimizer's state and the batch of 8 x 4,096 tokens are shapes with
shardings. A step is two programs, gradients and update. Runs after the first show the spread: each compiles anew.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from cacherl_jax import checkpoint, mesh
from cacherl_jax.config import MemoryConfig, MeshConfig, OptimizerConfig
from cacherl_jax.model.qwen3 import Execution
from cacherl_jax.sizes import QWEN3_4B
from cacherl_jax.train import step as steps
from cacherl_jax.train.optimizer import make_optimizer
from cacherl_jax.types import Batch

MEMORY = MemoryConfig(compute="bfloat16", remat="full")
ROWS, LENGTH, RUNS = 8, 4096, 3


def compile_once() -> dict[str, float]:
    """CPU seconds of tracing and compiling, by program."""
    jax.clear_caches()
    devices = mesh.make_mesh(MeshConfig(fsdp=4, tp=2))
    tx = make_optimizer(OptimizerConfig(name="adamw"), 1000)
    state = checkpoint.abstract_state(checkpoint.abstract_model(QWEN3_4B, devices), tx, devices)

    def rows(dtype: type) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((ROWS, LENGTH), dtype, sharding=NamedSharding(devices, mesh.TOKENS_BT))

    batch = Batch(*(rows(dtype) for dtype in (jnp.int32, jnp.float32, jnp.int32, *[jnp.float32] * 3)))
    seconds = {}
    began = time.process_time()
    lowered = steps.sft_gradients.lower(state.model, None, batch, jnp.float32(1), execution=Execution(devices, MEMORY))
    seconds["gradients, traced"] = time.process_time() - began
    lowered.compile()
    seconds["gradients, compiled"] = time.process_time() - began - seconds["gradients, traced"]
    began = time.process_time()
    lowered = steps.make_update(tx).lower(state, state.model)
    seconds["update, traced"] = time.process_time() - began
    lowered.compile()
    seconds["update, compiled"] = time.process_time() - began - seconds["update, traced"]
    return {name: round(value, 2) for name, value in (seconds | {"all": sum(seconds.values())}).items()}


def main() -> None:
    runs = []
    for _ in range(RUNS):
        runs.append(compile_once())
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    everything = sorted(run["all"] for run in runs)
    spread = {"median": everything[len(runs) // 2], "least": everything[0], "most": everything[-1]}
    print(json.dumps({"cpu_seconds": spread, "runs": runs}))


if __name__ == "__main__":
    main()
