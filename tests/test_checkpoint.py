"""Checkpoints are written while training goes on, kept by age and by metric, and read onto other meshes."""

import os
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cacherl_jax import checkpoint
from cacherl_jax.config import ModelConfig
from cacherl_jax.mesh import one_device
from cacherl_jax.model import qwen3
from cacherl_jax.train import step as steps

MODEL = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def training():
    """A state, and an update of it that donates the old one and adds one to every weight."""
    tx = optax.sgd(1.0)
    update = steps.make_update(tx)
    state = checkpoint.new_state(qwen3.init(MODEL, jax.random.key(0)), tx, one_device())
    return state, lambda state: update(state, jax.tree.map(lambda x: -jnp.ones_like(x), state.model))[0]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, training, monkeypatch):
    """The write waits until the updates are made; what it writes is the state as it was at the save."""
    state, update = training
    updated, committed = threading.Event(), []
    original = checkpoint.ocp.CheckpointManager._finalize

    def late(self, step, removed):
        assert updated.wait(60)
        original(self, step, removed)
        committed.append(step)

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "_finalize", late)
    expected = jax.tree.map(np.array, qwen3.to_dict(state.model))
    with checkpoint.Checkpoints(tmp_path) as saved:
        saved.save(1, state)
        for _ in range(3):
            state = jax.block_until_ready(update(state))
        assert committed == []
        updated.set()
        saved.save(1, state)  # once is enough
    assert committed == [1]
    like = checkpoint.abstract_model(MODEL, one_device())
    equal(qwen3.to_dict(checkpoint.restore_model(tmp_path, like)), expected)


def test_the_newest_and_the_best_are_kept(tmp_path, training):
    state, _ = training
    with checkpoint.Checkpoints(tmp_path, latest=2, best=1) as saved:
        for step, metric in enumerate([0.1, 0.9, None, 0.5, 0.3, 0.2], 1):
            saved.save(step, state, metric)
    assert kept(tmp_path) == [2, 5, 6]  # and not the best alone: the newest is what a run goes on from
    with checkpoint.Checkpoints(tmp_path, latest=2, best=1) as saved:  # metrics are read back
        saved.save(7, state, 0.4)
    assert kept(tmp_path) == [2, 6, 7]


def kept(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def test_what_went_wrong_behind_the_loop_is_raised(tmp_path, training, monkeypatch):
    state, _ = training

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "_finalize", full)
    with pytest.raises(OSError, match="disk full"):
        save_once(tmp_path, state)


def save_once(folder, state):
    with checkpoint.Checkpoints(folder) as saved:
        saved.save(1, state)


def test_a_killed_writer_leaves_nothing_that_stays(tmp_path, training):
    state, _ = training
    with checkpoint.Checkpoints(tmp_path) as saved:
        assert saved.restore(state) is None
        saved.save(3, state)
    (tmp_path / "7.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
    like = checkpoint.abstract_model(MODEL, one_device())
    equal(qwen3.to_dict(checkpoint.restore_model(tmp_path, like)), qwen3.to_dict(state.model))
    with checkpoint.Checkpoints(tmp_path) as saved:
        step, restored = saved.restore(state)
        assert kept(tmp_path) == [step] == [3]
    equal(jax.tree.leaves(restored), jax.tree.leaves(state))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.restore_model(tmp_path / "elsewhere", like)


def test_eight_devices_write_what_others_read(tmp_path):
    """Written by data 2 x fsdp 2 x tp 2, read whole by fsdp 8 in bfloat16, and layer by layer without a device."""
    program = """
        import sys
        from pathlib import Path
        import jax, numpy as np
        from cacherl_jax import checkpoint, mesh, model_folder
        from cacherl_jax.config import MeshConfig, ModelConfig, OptimizerConfig
        from cacherl_jax.model import qwen3
        from cacherl_jax.train import step as steps
        from cacherl_jax.train.optimizer import make_optimizer
        import dataclasses

        folder = Path(sys.argv[1])
        config = ModelConfig(vocab_size=64, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48)
        devices = mesh.make_mesh(MeshConfig(data=2, fsdp=2, tp=2))
        other = mesh.make_mesh(MeshConfig(fsdp=8))
        for name in ("adamw", "muon"):
            def same(a, b):
                assert a.sharding.is_equivalent_to(b.sharding, a.ndim), f"{a.sharding} {b}"

            tx = make_optimizer(OptimizerConfig(name=name), 10)
            state = checkpoint.new_state(qwen3.init(config, jax.random.key(0), devices), tx, devices)
            update = steps.make_update(tx)
            state, _ = update(state, jax.tree.map(lambda x: 0.01 * x, state.model))
            with checkpoint.Checkpoints(folder / name / "checkpoints") as saved:
                saved.save(1, state)
                # The optimizer leaves its own state where the abstract one says.
                like = checkpoint.abstract_state(checkpoint.abstract_model(config, devices), tx, devices)
                jax.tree.map(same, state, like)
                like = checkpoint.abstract_state(checkpoint.abstract_model(config, other), tx, other)
                step, there = saved.restore(like)
            jax.tree.map(np.testing.assert_array_equal, *(jax.tree.map(np.asarray, x) for x in (there, state)))
            jax.tree.map(same, there, like)
            assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(there.opt_state))
        half = dataclasses.replace(config, dtype="bfloat16")
        model = checkpoint.restore_model(folder / "adamw" / "checkpoints", checkpoint.abstract_model(half, other))
        assert {str(x.dtype) for x in jax.tree.leaves(model)} == {"bfloat16"}
        stored = model_folder._opened(folder / "muon", "layers.up_DF")
        assert stored.chunk_layout.read_chunk.shape[0] == 1
        read = model_folder.reader(folder / "muon", config)
        np.testing.assert_array_equal(read("up_DF", 1), np.asarray(qwen3.to_dict(state.model)["layers"]["up_DF"])[1])
    """
    environment = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-3000:]
