"""Runs that train adapters: what a stage leaves, what the next one starts from, and what PEFT gets."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_stages import arguments

from cacherl_jax import adapter_folder, checkpoint, cli, mesh, metrics
from cacherl_jax.config import Config, LoraConfig, ModelConfig, OptimizerConfig, SftConfig
from cacherl_jax.data.pipeline import Row
from cacherl_jax.model import lora, qwen3
from cacherl_jax.train import sft

CHANGES = {
    "data.train_tasks": 10, "data.validation_tasks": 2, "data.test_tasks": 2, "sft.steps": 2, "grpo.steps": 2,
    "sft.lora.rank": 4, "sft.lora.alpha": 8.0, "grpo.lora.rank": 2, "grpo.lora.matrices": ["query", "down"],
    "grpo.validate_every": 9, "grpo.optimizer.warmup_steps": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """record, think, sft and grpo, both of the last with an adapter."""
    out = tmp_path_factory.mktemp("runs") / "adapters"
    for verb in ("record", "think", "sft", "grpo"):
        assert cli.main(arguments(verb, out, **CHANGES)) == 0
    return out


def merged_by_numpy(base, factors, scale):
    tree = jax.tree.map(np.array, base)
    for name, parts in factors.items():
        for i in range(len(tree["layers"][name])):
            a, b = np.asarray(parts["a"][i], np.float64), np.asarray(parts["b"][i], np.float64)
            tree["layers"][name][i] += scale * np.tensordot(a, b, 1)
    return tree


def test_a_stage_leaves_the_merged_model_and_the_next_one_starts_from_it(run):
    described = {stage: json.loads((run / stage / "adapter.json").read_text()) for stage in ("sft", "grpo")}
    model = Config.from_json({"model": described["sft"]["model"]}).model
    devices = mesh.make_mesh(Config().mesh)
    base = qwen3.to_dict(qwen3.init(model, jax.random.key(0), devices))
    for stage, scale in (("sft", 8 / 4), ("grpo", 32 / 2)):
        config = Config.from_json({"grpo": {"lora": described[stage]["lora"]}}).grpo.lora
        adapter = checkpoint.restore_model(run / stage / "adapter", adapter_folder.abstract_adapter(model, config, devices))
        assert max(np.abs(parts["b"]).max() for parts in lora.to_dict(adapter).values()) > 0
        expected = merged_by_numpy(base, lora.to_dict(adapter), scale)
        left = checkpoint.restore_model(run / stage / "checkpoints", checkpoint.abstract_model(model, devices))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), qwen3.to_dict(left), expected)
        base = qwen3.to_dict(left)
    assert described["sft"]["base"] == 0 and Path(described["grpo"]["base"]) == (run / "sft").resolve()
    assert described["grpo"]["lora"]["matrices"] == ["query", "down"]


def test_in_grpo_the_reference_is_the_policy_without_its_adapter(run):
    first, second = (row for row in metrics.read_metrics(run / "grpo" / "metrics.jsonl") if "loss" in row)
    assert first["kl"] == 0
    for row in (first, second):  # the engine plays with merged weights, the trainer with both apart
        assert 0 < row["sampler_gap"]["max"] < 1e-5


def test_the_adapter_is_exported_for_peft_with_the_kl_of_merging_it(run, tmp_path, capsys):
    for stage, name, more in (("sft", "exact", ()), ("grpo", "half", ("--dtype", "bfloat16"))):
        words = ["convert", "--from", str(run / stage), "--to-hf", str(tmp_path / name), "--adapter", "--json", *more]
        assert cli.main(words) == 0
    measured = {name: json.loads((tmp_path / name / "merge.json").read_text()) for name in ("exact", "half")}
    assert measured["exact"]["kl_mean"] < 1e-12 < measured["half"]["kl_mean"] < measured["half"]["kl_max"] < 0.1
    assert measured["exact"]["tokens"] == sum(map(len, json.loads((run / "sft" / "adapter.json").read_text())["rows"]))
    config = json.loads((tmp_path / "half" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "down_proj"] and (config["r"], config["lora_alpha"]) == (2, 32.0)
    assert config["base_model_name_or_path"] == str((run / "sft").resolve())
    tensors = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (2, 48)
    capsys.readouterr()
    assert cli.main(["convert", "--from", str(run / "think"), "--to-hf", str(tmp_path / "none"), "--adapter"]) == 2
    assert cli.main(["convert", "--from-hf", str(run), "--to", str(tmp_path / "none"), "--adapter"]) == 2
    assert "--adapter goes with --from" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_merging_kl_is_that_of_the_two_distributions():
    model = ModelConfig(vocab_size=40, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), qwen3.init(model, jax.random.key(0)))
    adapter = jax.tree.map(lambda x: x + 0.1, lora.init(model, LoraConfig(rank=2), jax.random.key(1)))
    rows = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3]]
    exact = merged_by_numpy(jax.tree.map(np.float32, qwen3.to_dict(half)), lora.to_dict(adapter), 16)
    rounded = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16), np.float32), exact)
    kl = []
    for row in rows:
        logprobs = []
        for tree in (exact, rounded):
            whole = qwen3.from_dict(model, jax.tree.map(jnp.asarray, tree))
            hidden_BTD = qwen3.forward(whole, jnp.array([row]), jnp.ones((1, len(row)), jnp.int32))
            logits_TV = np.asarray(qwen3.logits(whole, hidden_BTD)[0], np.float64)
            logprobs.append(logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True)))
        kl += (np.exp(logprobs[0]) * (logprobs[0] - logprobs[1])).sum(-1).tolist()
    found = adapter_folder.merging_kl(lora.attach(half, adapter), rows, mesh.one_device())
    assert found["tokens"] == 10 and min(kl) > 0
    assert found["kl_mean"] == pytest.approx(np.mean(kl), rel=5e-2) and found["kl_max"] == pytest.approx(max(kl), rel=5e-2)


RNG = np.random.default_rng(0)
ROWS = [Row(RNG.integers(0, 64, 40).astype(np.int32), RNG.random(40) < 0.6) for _ in range(8)]
MODEL = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48)
CONFIG = Config(
    model=MODEL,
    sft=SftConfig(
        steps=4, tokens_per_batch=256, checkpoint_every=1, lora=LoraConfig(rank=4, matrices=("query", "down")),
        optimizer=OptimizerConfig(name="adamw", moments="bfloat16", learning_rate=0.01, warmup_steps=0),
    ),
)  # fmt: skip


class Stop(Exception):
    pass


def test_an_adapters_training_goes_on_from_its_checkpoint(tmp_path):
    quiet = metrics.progress_factory(enabled=False)

    def stopping(**arguments):
        bar = quiet(**arguments)
        done = iter(range(2))

        def update(n=1):
            if next(done, None) is None:
                raise Stop

        bar.update = update
        return bar

    straight = sft.train(CONFIG, ROWS, tmp_path / "a", progress=quiet)
    with pytest.raises(Stop):
        sft.train(CONFIG, ROWS, tmp_path / "b", progress=stopping)
    assert not (tmp_path / "b" / "checkpoints").exists()
    resumed = sft.train(CONFIG, ROWS, tmp_path / "b", progress=quiet)
    jax.tree.map(np.testing.assert_array_equal, qwen3.to_dict(straight), qwen3.to_dict(resumed))
    assert straight.adapter is None


def test_eight_devices_train_an_adapter_as_one_does():
    program = f"""
        import jax, numpy as np
        import jax.numpy as jnp
        from jax.sharding import PartitionSpec as P
        from cacherl_jax import adapter_folder, checkpoint, mesh
        from cacherl_jax.config import *
        from cacherl_jax.data.pipeline import Row, collate
        from cacherl_jax.model import lora, qwen3
        from cacherl_jax.train import step as steps
        from cacherl_jax.train.optimizer import make_optimizer
        MODEL = {MODEL!r}
        LORA = LoraConfig(rank=4, matrices=("query", "down"))
        rng = np.random.default_rng(0)
        batch = collate([Row(rng.integers(0, 64, 64).astype(np.int32), rng.random(64) < 0.6) for _ in range(8)], 64, 8)

        def trained(axes, devices, name):
            place = mesh.make_mesh(axes, devices)
            base = qwen3.init(MODEL, jax.random.key(0), place)
            adapter = lora.init(MODEL, LORA, jax.random.key(1), place)
            tx = make_optimizer(OptimizerConfig(name=name, learning_rate=1e-2, warmup_steps=0), 5)
            like = checkpoint.abstract_state(adapter_folder.abstract_adapter(MODEL, LORA, place), tx, place)
            state, update = checkpoint.new_state(adapter, tx, place), steps.make_update(tx, like)
            execution, losses = qwen3.Execution(place), []
            for _ in range(2):
                gradients, values, _ = steps.sft_gradients(
                    state.model, base, mesh.place(batch, place), jnp.float32(1), execution=execution
                )
                state, _ = update(state, gradients)
                losses.append(float(values["loss"]))
                for x in (state.model, gradients):
                    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
                        if leaf.ndim == 3:
                            found = leaf.sharding.shard_shape(leaf.shape)
                            assert found == expected(axes, jax.tree_util.keystr(path), leaf.shape), path
                for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(like)):
                    assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.shape, a.sharding)
                if name == "adamw":  # moments lie as their factors
                    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim > 1]
                    for x, moment in zip(2 * jax.tree.leaves(state.model), moments, strict=True):
                        assert x.sharding.is_equivalent_to(moment.sharding, x.ndim)
            merged = lora.merge(lora.attach(base, state.model))
            where = qwen3.shardings(MODEL, place)
            jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or 1 / 0, merged, where)
            return losses, jax.tree.map(np.asarray, qwen3.to_dict(merged))

        def expected(axes, path, shape):
            # [L, D, R] and [L, F, R] of query and down, [L, R, D] of down: D over fsdp, F over tp
            L, x, y = shape
            if ".down" in path:
                return (L, x // axes.tp, y) if ".a" in path else (L, x, y // axes.fsdp)
            return (L, x // axes.fsdp, y) if ".a" in path else (L, x, y // axes.tp)

        for name in ("adamw", "adafactor"):
            losses, merged = trained(MeshConfig(data=2, fsdp=2, tp=2), None, name)
            losses_1, merged_1 = trained(MeshConfig(), jax.devices()[:1], name)
            np.testing.assert_allclose(losses, losses_1, atol=2e-5)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), merged, merged_1)
            assert losses[-1] < losses[0]
    """
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Involuntary full rematerialization" not in done.stderr
