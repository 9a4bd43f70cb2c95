"""Optimizers: matrices of stacked layers treated one by one, moments in bfloat16, small states, on adapters too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cacherl_jax.config import ConfigError, LoraConfig, ModelConfig, OptimizerConfig
from cacherl_jax.model import lora, qwen3
from cacherl_jax.train import optimizer
from cacherl_jax.train.optimizer import make_optimizer

MODEL = ModelConfig(vocab_size=96, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=48)
PLAIN = {"warmup_steps": 0, "schedule": "constant", "clip_norm": 1e9}


@pytest.fixture(scope="module")
def model():
    return qwen3.init(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def adapter():
    new = lora.init(MODEL, LoraConfig(rank=4), jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.1, new)


def noise(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(structure, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def run(tx, params, gradients):
    """The updates of each step."""
    state, update, out = tx.init(params), jax.jit(tx.update), []
    for g in gradients:
        updates, state = update(g, state, params)
        out.append(updates)
    return out, state


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_adamw_is_optaxs_and_bfloat16_moments_follow_it_in_half_the_memory():
    weights = {"w": jax.random.normal(jax.random.key(9), (64, 64))}
    fields = {"name": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1, **PLAIN}
    gradients = [noise(weights, i) for i in range(6)]
    expected, _ = run(optax.adamw(1e-2, 0.9, 0.95, weight_decay=0.1), weights, gradients)
    full, state = run(make_optimizer(OptimizerConfig(**fields), 6), weights, gradients)
    for one, other in zip(full, expected, strict=True):
        np.testing.assert_allclose(one["w"], other["w"], atol=1e-7, rtol=1e-5)
    half, small = run(make_optimizer(OptimizerConfig(**fields, moments="bfloat16"), 6), weights, gradients)
    assert nbytes(small) < 0.51 * nbytes(state)
    for one, other in zip(half, expected, strict=True):
        assert np.linalg.norm(one["w"] - other["w"]) < 0.01 * np.linalg.norm(other["w"])
    # Of bfloat16 weights the moments are float32 all the same.
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    assert nbytes(make_optimizer(OptimizerConfig(**fields), 6).init(low)) == nbytes(state)


def test_a_bfloat16_second_moment_falls_as_a_float32_one_does():
    """After large gradients come small ones: each update is below what rounding to the nearest would keep."""
    gradients = [jnp.ones(4096)] * 20 + [jnp.full(4096, 1e-3)] * 400
    moment = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        _, state = run(optimizer._scale_by_adam(0.9, 0.999, jnp.dtype(dtype)), jnp.zeros(4096), gradients)
        assert state.nu.dtype == dtype
        moment[dtype] = float(state.nu.astype(jnp.float32).mean())
    assert moment[jnp.float32] == pytest.approx(0.0198 * 0.999**400, rel=1e-2)
    assert moment[jnp.bfloat16] == pytest.approx(moment[jnp.float32], rel=1e-2)


def factored(g, steps):
    """Adafactor's first updates of one matrix by NumPy, from the paper: arXiv 1804.04235, algorithm 4."""
    rows, columns = np.zeros(g.shape[0]), np.zeros(g.shape[1])
    for t in range(1, steps + 1):
        beta = 1 - t**-0.8
        rows = beta * rows + (1 - beta) * (g**2 + 1e-30).mean(1)
        columns = beta * columns + (1 - beta) * (g**2 + 1e-30).mean(0)
    u = g / np.sqrt(np.outer(rows, columns) / rows.mean())
    return u / max(1.0, np.sqrt((u**2).mean()))


def test_adafactor_factors_and_clips_each_layers_matrix_and_keeps_little(model, adapter):
    tx = make_optimizer(OptimizerConfig(name="adafactor", learning_rate=1.0, **PLAIN), 5)
    gradients = jax.tree.map(lambda x, y: x * jnp.exp(2 * y), noise(model, 0), noise(model, 1))
    (_, updates), state = run(tx, model, [gradients, gradients])
    found, g = qwen3.to_dict(updates), qwen3.to_dict(gradients)
    for name, rows in (("query_DA", 32), ("output_AD", 24), ("down_FD", 48)):
        for layer, update in zip(np.asarray(g["layers"][name], np.float64), found["layers"][name], strict=True):
            expected = -factored(layer.reshape(rows, -1), 2).reshape(layer.shape)
            np.testing.assert_allclose(update, expected, rtol=2e-4, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(found["embed_VD"], -factored(np.asarray(g["embed_VD"], np.float64), 2), rtol=2e-4, atol=1e-6)
    # A row and a column of each matrix, the norms, and a few numbers of one element.
    L, D, H, F, V = 3, 32, 6, 48, 96
    sides = 2 * (D + 4 * H) + 2 * (D + 2 * H) + 3 * (D + F)
    assert nbytes(state) < 4 * (L * (sides + 2 * D + 2 * H) + (V + D) + D) + 4 * 64 + 4 * L * 40
    assert nbytes(tx.init(adapter)) < nbytes(adapter) / 2


def test_muon_orthogonalises_both_factors_of_an_adapter(adapter):
    tx = make_optimizer(OptimizerConfig(learning_rate=1.0, **PLAIN), 5)
    (updates,), _ = run(tx, adapter, [noise(adapter, 0)])
    for name, factors in lora.to_dict(updates).items():
        for part in "ab":
            for layer in np.asarray(factors[part]):
                matrix = layer.reshape(-1, 4) if part == "a" else layer.reshape(4, -1)
                values = np.linalg.svd(matrix / np.sqrt(max(1, matrix.shape[1] / matrix.shape[0])), compute_uv=False)
                assert ((values > 0.6) & (values < 1.4)).all(), (name, part, values)


def test_each_optimizer_learns_an_adapter(model):
    first = lora.init(MODEL, LoraConfig(rank=4, matrices=("value", "down")), jax.random.key(1))
    tokens = jax.random.randint(jax.random.key(2), (4, 16), 0, 96)

    @jax.jit
    @jax.value_and_grad
    def loss(adapter):
        hidden_BTD = qwen3.forward(lora.attach(model, adapter), tokens, jnp.ones_like(tokens))
        logprobs = jax.nn.log_softmax(qwen3.logits(model, hidden_BTD)[:, :-1])
        return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1).mean()

    for name in ("adamw", "adafactor", "muon"):
        tx = make_optimizer(OptimizerConfig(name=name, learning_rate=0.02, warmup_steps=0, schedule="constant"), 20)
        adapter, state, update, losses = first, tx.init(first), jax.jit(tx.update), []
        for _ in range(20):
            value, gradients = loss(adapter)
            updates, state = update(gradients, state, adapter)
            adapter = optax.apply_updates(adapter, updates)
            losses.append(float(value))
        assert losses[-1] < 0.8 * losses[0], (name, losses)


def test_bfloat16_moments_are_adamws():
    with pytest.raises(ConfigError, match=r"moments='bfloat16' is for adamw; optimizer.name is 'muon'"):
        OptimizerConfig(moments="bfloat16")
