"""Adapters: beside the weights, merged into them, and in PEFT's layout, the same function."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from cacherl_jax.config import ConfigError, LoraConfig, ModelConfig
from cacherl_jax.model import hf, lora, qwen3
from cacherl_jax.model.hf_config import to_hf_config

MODEL = ModelConfig(vocab_size=64, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=48)
CONFIG = LoraConfig(rank=4, alpha=6.0)
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(0, 64, (2, 24)), jnp.int32)
SEGMENTS = jnp.ones_like(TOKENS).at[0, 20:].set(0)


@pytest.fixture(scope="module")
def base():
    return qwen3.init(MODEL, jax.random.key(0))


def trained(config=CONFIG):
    """An adapter whose B is no longer zero."""
    adapter = lora.init(MODEL, config, jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapter)


def numpy_merged(base, adapter):
    """The base's nested dict with W + alpha / rank * A B, by NumPy in float64."""
    tree = jax.tree.map(np.asarray, qwen3.to_dict(base))
    for name, factors in lora.to_dict(adapter).items():
        a, b = (np.asarray(factors[part], np.float64) for part in "ab")
        for i, w in enumerate(tree["layers"][name].copy()):
            product = a[i].reshape(-1, a.shape[-1]) @ b[i].reshape(b.shape[1], -1)
            tree["layers"][name] = tree["layers"][name].copy()
            tree["layers"][name][i] = w + adapter.config.alpha / adapter.config.rank * product.reshape(w.shape)
    return tree


@pytest.mark.parametrize("matrices", [CONFIG.matrices, ("key", "output", "down")])
def test_forward_prefill_and_decode_equal_those_of_the_merged_model(base, matrices):
    adapter = trained(dataclasses.replace(CONFIG, matrices=matrices))
    both = lora.attach(base, adapter)
    merged = qwen3.from_dict(MODEL, numpy_merged(base, adapter))
    hidden = qwen3.forward(both, TOKENS, SEGMENTS)
    kept = np.asarray(SEGMENTS)[..., None]
    np.testing.assert_allclose(hidden * kept, qwen3.forward(merged, TOKENS, SEGMENTS) * kept, atol=2e-5)
    assert np.abs(hidden - qwen3.forward(base, TOKENS, SEGMENTS)).max() > 0.1

    def extended(model):
        cache = qwen3.init_cache(MODEL, 2, 32)
        start, count = jnp.zeros(2, jnp.int32), jnp.full(2, 23, jnp.int32)
        first, cache = qwen3.extend(model, cache, TOKENS[:, :23], start, count)
        return first, qwen3.extend(model, cache, TOKENS[:, 23:], count, jnp.ones(2, jnp.int32))[0]

    for one, other in zip(extended(both), extended(merged), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    ours = lora.merge(both)
    assert ours.adapter is None
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), qwen3.to_dict(ours), qwen3.to_dict(merged))


def test_a_new_adapter_changes_nothing(base):
    both = lora.attach(base, lora.init(MODEL, CONFIG, jax.random.key(1)))
    np.testing.assert_allclose(qwen3.forward(both, TOKENS, SEGMENTS), qwen3.forward(base, TOKENS, SEGMENTS), atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, qwen3.to_dict(lora.merge(both)), qwen3.to_dict(base))
    assert jax.tree.structure(lora.detach(both)) == jax.tree.structure(base)
    # As in PEFT: A within the bound of Kaiming's uniform, filling it; seeds of their own.
    factors = lora.to_dict(both.adapter)
    for name, fan_in in (("query_DA", 32), ("output_AD", 24), ("down_FD", 48)):
        largest = np.abs(factors[name]["a"]).max()
        assert 0.95 * fan_in**-0.5 < largest <= fan_in**-0.5, name
    assert not np.array_equal(factors["gate_DF"]["a"], factors["up_DF"]["a"])


def test_gradients_follow_the_chain_rule_of_the_merged_weights(base):
    adapter = trained()

    def loss(model):
        hidden_BTD = qwen3.forward(model, TOKENS, SEGMENTS)
        return jnp.sin(qwen3.logits(model, hidden_BTD)).mean() * 100

    gradients = lora.to_dict(jax.grad(lambda adapter: loss(lora.attach(base, adapter)))(adapter))
    of_weights = qwen3.to_dict(jax.grad(loss)(qwen3.from_dict(MODEL, numpy_merged(base, adapter))))["layers"]
    assert gradients.keys() == set(lora.WEIGHTS.values())
    for name, factors in lora.to_dict(adapter).items():
        for i, dw in enumerate(np.asarray(of_weights[name], np.float64)):
            a, b = np.asarray(factors["a"][i]).reshape(-1, 4), np.asarray(factors["b"][i]).reshape(4, -1)
            dw = dw.reshape(a.shape[0], b.shape[1])
            found = {part: np.asarray(gradients[name][part][i]) for part in "ab"}
            np.testing.assert_allclose(found["a"].reshape(a.shape), 6 / 4 * dw @ b.T, atol=2e-5, rtol=1e-3, err_msg=name)
            np.testing.assert_allclose(found["b"].reshape(b.shape), 6 / 4 * a.T @ dw, atol=2e-5, rtol=1e-3, err_msg=name)


def test_merging_sums_in_float32_rounds_once_and_needs_no_second_stack(base):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    adapter = trained()
    expected = numpy_merged(half, adapter)  # assigned into bfloat16: rounded once
    merged = lora.merge(lora.attach(half, adapter))
    differing = 0
    for name in lora.WEIGHTS.values():
        w, other = (np.asarray(x[name], np.float32) for x in (qwen3.to_dict(merged)["layers"], expected["layers"]))
        np.testing.assert_allclose(w, other, rtol=2**-7)
        differing += (w != other).sum() / w.size
    assert differing < 0.01  # float64 may round the other way, once in a thousand
    w = jnp.zeros((32, 64, 512))
    a, b = jnp.zeros((32, 64, 4)), jnp.zeros((32, 4, 512))
    memory = lora._adding(w.sharding, True).lower(w, a, b, 1.0).compile().memory_analysis()
    assert memory.temp_size_in_bytes < w.nbytes / 4 and memory.alias_size_in_bytes == w.nbytes


def test_what_does_not_fit_is_refused(base):
    adapter = trained()
    tree = lora.to_dict(adapter)
    assert jax.tree.structure(lora.from_dict(MODEL, CONFIG, tree)) == jax.tree.structure(adapter)
    with pytest.raises(ValueError, match=r"missing or surplus \['up_DF.a', 'up_DF.b'\]"):
        lora.from_dict(MODEL, CONFIG, {name: x for name, x in tree.items() if name != "up_DF"})
    with pytest.raises(ValueError, match=r"up_DF.a has shape \(3, 4, 48\), expected \(3, 32, 4\)"):
        lora.from_dict(MODEL, CONFIG, tree | {"up_DF": {"a": tree["up_DF"]["b"], "b": tree["up_DF"]["b"]}})
    with pytest.raises(ValueError, match="already"):
        lora.attach(lora.attach(base, adapter), adapter)
    with pytest.raises(ValueError, match="was made for"):
        lora.attach(qwen3.init(dataclasses.replace(MODEL, num_layers=2), jax.random.key(0)), adapter)
    with pytest.raises(ValueError, match="no adapter"):
        lora.merge(base)
    with pytest.raises(ConfigError, match="rank 0"):
        lora.init(MODEL, LoraConfig(), jax.random.key(0))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about names of transformers
def test_peft_reads_the_exported_layout_as_the_same_model(base, tmp_path):
    adapter = trained(dataclasses.replace(CONFIG, matrices=("query", "output", "gate", "down")))
    config, tensors = lora.peft_config(adapter, "base"), lora.peft_tensors(adapter)
    # PEFT's names and shapes, [rank, in] and [out, rank], written down from its documentation.
    shapes = {
        "self_attn.q_proj": (32, 24), "self_attn.o_proj": (24, 32), "mlp.gate_proj": (32, 48), "mlp.down_proj": (48, 32),
    }  # fmt: skip
    expected = {}
    for i in range(3):
        for module, (inputs, outputs) in shapes.items():
            expected[f"base_model.model.model.layers.{i}.{module}.lora_A.weight"] = (4, inputs)
            expected[f"base_model.model.model.layers.{i}.{module}.lora_B.weight"] = (outputs, 4)
    assert {name: x.shape for name, x in tensors.items()} == expected
    peft = pytest.importorskip("peft")
    import torch
    import transformers

    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    fields = to_hf_config(MODEL) | {"attn_implementation": "eager"}
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**fields)).eval()
    state = {name: torch.from_numpy(x.copy()) for name, x in hf.to_hf(MODEL, qwen3.to_dict(base)).items()}
    theirs.load_state_dict(state, strict=False)
    theirs.tie_weights()
    model = peft.PeftModel.from_pretrained(theirs, tmp_path)
    with torch.no_grad():
        expected_BTV = model(torch.tensor(np.array(TOKENS)).long()).logits.numpy()
    both = lora.attach(base, adapter)
    found_BTV = qwen3.logits(both, qwen3.forward(both, TOKENS, jnp.ones_like(TOKENS)))
    np.testing.assert_allclose(found_BTV, expected_BTV, atol=1e-4)
