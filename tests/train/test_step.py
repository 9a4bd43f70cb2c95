"""A training step: split or whole, on one device or eight, interrupted or not, the same numbers."""

import dataclasses
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacherl_jax import metrics
from cacherl_jax.config import Config, ConfigError, GrpoConfig, MeshConfig, ModelConfig, OptimizerConfig, SftConfig
from cacherl_jax.data.pipeline import Row, bucketed, collate
from cacherl_jax.mesh import make_mesh
from cacherl_jax.model import qwen3
from cacherl_jax.train import sft
from cacherl_jax.train import step as steps
from cacherl_jax.train.optimizer import make_optimizer

MODEL = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48)
RNG = np.random.default_rng(0)
ROWS = [
    Row(RNG.integers(0, 64, n).astype(np.int32), RNG.random(n) < 0.6, float(RNG.normal()), -RNG.random(n), -RNG.random(n))
    for n in (5, 60, 64, 70, 90, 100, 128, 128)
]


@pytest.fixture(scope="module")
def model():
    return qwen3.init(MODEL, jax.random.key(0))


def on_device(batches):
    return [jax.tree.map(jnp.asarray, batch) for batch in batches]


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_accumulated_gradients_equal_those_of_one_batch(model, kind):
    def gradients_of(m, frozen, batch, share):
        if kind == "sft":
            return steps.sft_gradients(m, frozen, batch, share)
        return steps.grpo_gradients(m, frozen, batch, share, grpo=GrpoConfig(kl_coef=0.1))

    *whole, _ = steps.accumulate(gradients_of, model, None, on_device([collate(ROWS, 128, 8)]))
    parts = on_device([batch for batch, _ in bucketed(ROWS, (64, 96, 128), 256, 1)])
    assert len(parts) > 3
    *split, logprobs = steps.accumulate(gradients_of, model, None, parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-4), whole, split)
    for logprobs_BT, batch in zip(logprobs, parts, strict=True):
        np.testing.assert_allclose(logprobs_BT, steps.score(model, batch), atol=1e-5)
    with pytest.raises(ValueError, match="no token"):
        steps.accumulate(gradients_of, model, None, [dataclasses.replace(parts[0], loss_mask_BT=0 * parts[0].loss_mask_BT)])


def test_score_is_the_logprob_that_training_sees(model):
    (batch,) = on_device([collate(ROWS[:2], 64, 2)])
    logprobs_BT = steps.score(model, batch)
    hidden_BTD = qwen3.forward(model, batch.tokens_BT, batch.segment_ids_BT)
    all_BTV = jax.nn.log_softmax(qwen3.logits(model, hidden_BTD))
    for b, t in ((0, 4), (1, 1), (1, 59)):
        assert logprobs_BT[b, t] == pytest.approx(float(all_BTV[b, t - 1, batch.tokens_BT[b, t]]), abs=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizers_reduce_the_loss_and_treat_matrices_as_such(model, name):
    tx = make_optimizer(OptimizerConfig(name=name, learning_rate=0.01, adam_learning_rate=3e-3, warmup_steps=2), 30)
    state, update = steps.TrainState.create(qwen3.copy(model), tx), steps.make_update(tx)
    batches = on_device([collate(ROWS, 128, 8)])
    losses = []
    for _ in range(30):
        gradients, values, _ = steps.accumulate(steps.sft_gradients, state.model, None, batches)
        state, _ = update(state, gradients)
        losses.append(float(values["loss"]))
    assert losses[-1] < 0.7 * losses[0] and int(state.step) == 30


def test_muon_orthogonalises_each_layers_matrix(model):
    tx = make_optimizer(OptimizerConfig(learning_rate=1.0, warmup_steps=0, schedule="constant", clip_norm=1e9), 5)
    gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), model)
    updates, _ = tx.update(gradients, tx.init(model), model)
    moved = qwen3.to_dict(updates)["layers"]
    for name, rows in (("gate_DF", 32), ("query_DA", 32), ("output_AD", 32)):
        for layer in np.asarray(moved[name]):
            matrix = layer.reshape(rows, -1)
            values = np.linalg.svd(matrix, compute_uv=False)
            # Newton-Schulz brings singular values near 1; only the very smallest of a square matrix lag behind.
            assert ((values > 0.6) & (values < 1.4)).mean() > 0.9, name
    norm = np.asarray(moved["attention_norm_D"])
    np.testing.assert_allclose(np.abs(norm), np.abs(norm).mean(), rtol=1e-2)  # by Adam: all steps alike, at its own rate
    assert 2e-3 < np.abs(norm).mean() < 6e-3


def test_meshes_and_batches_that_do_not_divide_are_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"data=3 x fsdp=1 x seq=1 x tp=1 = 3 devices, but there are 1"):
        make_mesh(MeshConfig(data=3))
    program = """
        from cacherl_jax.config import ConfigError
        long = make_mesh(MeshConfig(fsdp=2, seq=4))
        for shape, mesh_, message in (
            ((6, 2), mesh, "6 rows does not divide over data x fsdp = 4"),
            ((2, 66), long, "rows of 66 tokens do not divide over seq = 4 devices"),
        ):
            try:
                place(np.zeros(shape), mesh_)
            except ConfigError as error:
                assert message in str(error), error
            else:
                raise SystemExit("accepted")
        try:
            qwen3.init(dataclasses.replace(MODEL, intermediate_size=49), jax.random.key(0), mesh)
        except ConfigError as error:
            assert "ffn of size 49 does not divide over mesh axis tp=2" in str(error), error
    """
    run_on_eight_devices(program)


def run_on_eight_devices(program):
    header = f"""
        import dataclasses, jax, numpy as np
        import jax.numpy as jnp
        from cacherl_jax.config import *
        from cacherl_jax.mesh import make_mesh, place
        from cacherl_jax.model import qwen3
        assert jax.device_count() == 8
        MODEL = {MODEL!r}
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tp=2))
    """
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    text = textwrap.dedent(header) + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Involuntary full rematerialization" not in done.stderr
    return done.stdout


def test_eight_devices_equal_one_with_parameters_sharded_at_birth():
    out = run_on_eight_devices("""
        from functools import partial
        from cacherl_jax.train import step as steps
        from cacherl_jax.train.optimizer import make_optimizer
        from cacherl_jax.data.pipeline import Row, collate
        jax.config.update("jax_disable_most_optimizations", True)  # programs run once: compiling is what costs
        rng = np.random.default_rng(0)
        rows = [Row(rng.integers(0, 64, 64).astype(np.int32), rng.random(64) < 0.6) for _ in range(8)]
        batch = collate(rows, 64, 8)

        def losses(devices, axes, memory=MemoryConfig()):
            mesh = make_mesh(axes, devices)
            model = qwen3.init(MODEL, jax.random.key(0), mesh)
            tx = make_optimizer(OptimizerConfig(name="adamw", learning_rate=1e-2, warmup_steps=1), 5)
            state, update = steps.TrainState.create(model, tx), steps.make_update(tx)
            gradients_of = partial(steps.sft_gradients, execution=qwen3.Execution(mesh, memory))
            out = []
            for _ in range(3):
                gradients, values, _ = steps.accumulate(gradients_of, state.model, None, [place(batch, mesh)])
                gate = gradients.layers.gate_DF[...]
                assert gate.sharding.is_equivalent_to(state.model.layers.gate_DF[...].sharding, gate.ndim), gate.sharding
                state, norm = update(state, gradients)
                out += [float(values["loss"]), float(norm)]
            return out, state.model

        one, _ = losses(jax.devices()[:1], MeshConfig())
        eight, model = losses(jax.devices(), MeshConfig(data=2, fsdp=2, tp=2))
        np.testing.assert_allclose(one, eight, rtol=2e-5)
        gate = model.layers.gate_DF[...]
        assert gate.sharding.shard_shape(gate.shape) == (2, 16, 24), gate.sharding
        assert model.embed_VD[...].sharding.shard_shape((64, 32)) == (32, 16)
        for remat in ("dots", "full"):  # with tokens of a row on two devices, and logits of a few tokens at a time
            eight, model = losses(jax.devices(), MeshConfig(fsdp=2, seq=2, tp=2), MemoryConfig(remat=remat, logit_chunk=24))
            np.testing.assert_allclose(one, eight, rtol=2e-5)
            assert model.layers.gate_DF[...].sharding.shard_shape(gate.shape) == (2, 8, 24)
        print("same")
    """)
    assert "same" in out


CONFIG = Config(
    model=MODEL,
    sft=SftConfig(steps=8, tokens_per_batch=256, checkpoint_every=3, optimizer=OptimizerConfig(warmup_steps=2)),
)


class Stop(Exception):
    pass


def interrupted_after(step):
    """A progress bar that fails when `step` updates are done, as a killed process would."""

    class Bar:
        def __init__(self, *, total, desc, initial=0):
            self.done = initial

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, n=1):
            self.done += n
            if self.done == step:
                raise Stop

        def set_postfix(self, **values):
            pass

    return Bar


@pytest.mark.parametrize("stop", [2, 5])
def test_interrupted_training_ends_as_uninterrupted_training(tmp_path, stop):
    quiet = metrics.progress_factory(enabled=False)
    straight = sft.train(CONFIG, ROWS, tmp_path / "a/sft", progress=quiet)
    with pytest.raises(Stop):
        sft.train(CONFIG, ROWS, tmp_path / "b/sft", progress=interrupted_after(stop))
    resumed = sft.train(CONFIG, ROWS, tmp_path / "b/sft", progress=quiet)
    jax.tree.map(np.testing.assert_array_equal, qwen3.to_dict(straight), qwen3.to_dict(resumed))
    assert without_times(tmp_path / "a/sft/metrics.jsonl") == without_times(tmp_path / "b/sft/metrics.jsonl")


def without_times(path):
    return [{k: v for k, v in row.items() if k != "rate"} for row in metrics.read_metrics(path)]
