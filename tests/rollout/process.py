"""One process of a rollout over several, for test_lockstep.py: process.py ADDRESS COUNT ID TP OUT."""

import json
import sys
from pathlib import Path

import jax
import test_runner as small

from cacherl_jax.config import MeshConfig
from cacherl_jax.mesh import make_mesh, rollout_mesh
from cacherl_jax.model import qwen3
from cacherl_jax.rollout import runner
from cacherl_jax.rollout.engine import Engine
from cacherl_jax.verbs.rollout import summary


def main(address: str, count: str, index: str, tp: str, out: str) -> None:
    if int(count) > 1:
        jax.distributed.initialize(address, int(count), int(index))
    mesh = rollout_mesh(make_mesh(MeshConfig(fsdp=jax.device_count())), int(tp))
    engine = Engine(small.MODEL, small.CONFIG, small.STOPS, mesh)
    model = engine.place(qwen3.init(small.MODEL, jax.random.key(0), make_mesh(MeshConfig(fsdp=jax.device_count()))))
    own = []
    tools = small.Slow(int(index), 0.02)  # every process at its own pace
    trajectories = runner.run(
        engine, model, small.Scripted(), small.SPECS, small.CALLING, tools, small.CONFIG, 0, on_done=own.append
    )
    order = [[t.task_id, t.sample] for t in trajectories] == [[task.id, sample] for task, sample in small.CALLING]
    found = {"devices": jax.device_count(), "rows": engine.rows, "own": len(own), "in_order": order}
    Path(out).write_text(json.dumps(found | summary(trajectories) | {"compilations": engine.compilations()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
