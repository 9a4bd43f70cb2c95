"""Model FLOPs against XLA's own count of an unrolled program, and against the arithmetic of Qwen3-4B."""

import math

import jax
import jax.numpy as jnp
import pytest

from cacherl_jax import sizes
from cacherl_jax.config import LoraConfig, ModelConfig
from cacherl_jax.model import qwen3
from cacherl_jax.plan import flops

# Narrow where work is that the formula leaves out (norms, RoPE, softmax), wide in what it counts.
MODEL = ModelConfig(
    vocab_size=3000, hidden_size=512, num_layers=2, num_heads=6, num_kv_heads=3, head_dim=64, intermediate_size=1300
)
B, T = 2, 64


def counted(function, *arguments) -> float:
    """FLOPs by XLA, which counts a loop's body once: `function` must be unrolled."""
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def unrolled(model, tokens_BT, shift_11D=0.0):
    """The matrix products of a forward pass, written out here: every layer, attention over the whole square, the vocabulary."""
    x_BTD = model.embed_VD[...][tokens_BT] + shift_11D
    for i in range(MODEL.num_layers):
        w = jax.tree.map(lambda x, i=i: x[i], model.layers)
        q, k, v = ((x_BTD @ m[...]).reshape(B, T, -1, MODEL.head_dim) for m in (w.query_DA, w.key_DC, w.value_DC))
        k, v = (jnp.repeat(x, MODEL.num_heads // MODEL.num_kv_heads, axis=2) for x in (k, v))
        o = jnp.einsum("bnts,bsnh->btnh", jnp.einsum("btnh,bsnh->bnts", q, k), v)
        x_BTD = x_BTD + o.reshape(B, T, -1) @ w.output_AD[...]
        x_BTD = x_BTD + ((x_BTD @ w.gate_DF[...]) * (x_BTD @ w.up_DF[...])) @ w.down_FD[...]
    return x_BTD @ model.embed_VD[...].T


@pytest.fixture(scope="module")
def arguments():
    return qwen3.init(MODEL, jax.random.key(0)), jnp.zeros((B, T), jnp.int32)


def whole_square(parts: dict[str, int]) -> float:
    """What the program above does: attention over T * T pairs in place of T * (T + 1) / 2."""
    return parts["matrices"] + parts["vocabulary"] + parts["attention"] * 2 * T / (T + 1)


def test_a_forward_pass_has_the_flops_that_xla_counts_unrolled(arguments):
    assert counted(unrolled, *arguments) == pytest.approx(whole_square(flops.forward(MODEL, B, T)), rel=0.01)


def test_gradients_of_all_weights_have_three_times_as_many(arguments):
    def loss(model, tokens_BT):
        return (unrolled(model, tokens_BT) ** 2).sum()

    expected = 3 * whole_square(flops.forward(MODEL, B, T))
    assert counted(jax.grad(loss), *arguments) == pytest.approx(expected, rel=0.02)
    assert flops.gradients(MODEL, B, T) == 3 * sum(flops.forward(MODEL, B, T).values())


def test_a_frozen_base_needs_no_gradient_of_its_weights(arguments):
    """The gradient of what goes into the first layer needs those of all activations, and of no weight."""
    model, tokens_BT = arguments

    def loss(shift_11D, model, tokens_BT):
        return (unrolled(model, tokens_BT, shift_11D) ** 2).sum()

    f = flops.forward(MODEL, B, T)
    adapter = LoraConfig(rank=8, matrices=("query", "down"))
    parameters = 8 * (512 + 6 * 64) + 8 * (1300 + 512)  # of a layer's factors
    own = 3 * 2 * B * T * MODEL.num_layers * parameters
    base = flops.gradients(MODEL, B, T, adapter) - own
    expected = base - 3 * f["attention"] + 3 * f["attention"] * 2 * T / (T + 1)
    assert counted(jax.grad(loss), jnp.zeros((1, 1, MODEL.hidden_size)), model, tokens_BT) == pytest.approx(expected, rel=0.02)


def test_the_figures_of_qwen3_4b():
    """Per token 2 x parameters forward, 6 x with gradients; 8k of causal attention add 4 x 36 x 4,096 x 4,096.5."""
    parameters = 36 * (100_930_816 - 2 * 2560 - 2 * 128) + 151_936 * 2560  # without the scales of norms
    attention = 4 * 36 * 32 * 128 * 8193 // 2
    assert flops.gradients(sizes.QWEN3_4B, 8, 8192) == 3 * 8 * 8192 * (2 * parameters + attention)
    assert flops.decode(sizes.QWEN3_4B, 64, 1024) == 64 * (2 * parameters + 4 * 36 * 32 * 128 * 1024)


def test_a_prefill_reads_what_is_before_it():
    whole = flops.prefill(MODEL, 1, 96, 0)
    assert whole == flops.prefill(MODEL, 1, 32, 0) + flops.prefill(MODEL, 1, 64, 32)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (sizes.QWEN3_0_6B, 596_049_920),
        (sizes.QWEN3_1_7B, 1_720_574_976),
        (sizes.QWEN3_4B, 4_022_468_096),
        (sizes.QWEN3_4B_2507, 4_022_468_096),
        (sizes.QWEN3_8B, 8_190_735_360),
        (sizes.QWEN3_14B, 14_768_307_200),
        (sizes.QWEN3_32B, 32_762_123_264),
    ],
    ids=["0.6B", "1.7B", "4B", "4B-2507", "8B", "14B", "32B"],
)
def test_the_sizes_of_the_family_have_the_published_numbers_of_parameters(model, parameters):
    def count(tree) -> int:
        return sum(count(w) if isinstance(w, dict) else math.prod(w.shape) for w in tree.values())

    assert count(qwen3.table(model)) == parameters
    assert model.rope_theta == (5e6 if model is sizes.QWEN3_4B_2507 else 1e6)
