"""The model against transformers' Qwen3ForCausalLM in torch: logits, gradients, bfloat16, RoPE. Where torch is absent, against
the golden file, which holds what transformers gave: `python tests/model/test_parity.py` writes it anew."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_qwen3 import ODD, tokens_of

from cacherl_jax.config import YarnConfig
from cacherl_jax.model import hf, qwen3, rope

CASES = {"untied-yarn": ODD, "tied-plain": dataclasses.replace(ODD, tie_word_embeddings=True, yarn=YarnConfig())}
GOLDEN = Path(__file__).parent.parent / "testdata" / "qwen3_golden.npz"


def weights_of(config):
    """Random weights under Hugging Face's names, norms included, in config.dtype: the same wherever they are made."""
    rng = np.random.default_rng(5)
    shapes = {name: place.shape for name, place in sorted(hf.places(config).items())}
    return {n: (rng.normal(size=s) * 0.2 + (len(s) == 1)).astype(np.float32).astype(config.dtype) for n, s in shapes.items()}


def outcome(config):
    """Our logits, loss and gradients by Hugging Face's names, for the weights of `weights_of`."""
    tokens_BT = tokens_of((2, 19))

    def loss_fn(model):
        logits_BTV = qwen3.logits(model, qwen3.forward(model, tokens_BT, jnp.ones_like(tokens_BT)))
        logprobs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
        return -jnp.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], axis=-1).mean(), logits_BTV

    ours = qwen3.from_dict(config, jax.tree.map(jnp.asarray, hf.from_hf(config, weights_of(config))))
    (loss, logits_BTV), gradients = jax.value_and_grad(loss_fn, has_aux=True)(ours)
    gradients = {name: g.astype(np.float32) for name, g in hf.to_hf(config, qwen3.to_dict(gradients)).items()}
    return np.asarray(logits_BTV), float(loss), gradients


def transformers_config(config):
    """The same model as transformers describes it, not by hf_config.py."""
    import transformers

    rope_parameters = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.yarn.factor != 1:
        rope_parameters |= {"rope_type": "yarn"} | {n: v for n, v in dataclasses.asdict(config.yarn).items() if v is not None}
    return transformers.Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=int(config.yarn.original_max_position_embeddings * config.yarn.factor),
        rope_parameters=rope_parameters,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=config.initializer_range,
        attn_implementation="eager",
    )


def transformers_outcome(config, dtype="float32"):
    """As `outcome` by transformers, which computes in `dtype`."""
    import torch
    import transformers

    theirs = transformers.Qwen3ForCausalLM(transformers_config(config)).to(getattr(torch, dtype))
    parameters = dict(theirs.named_parameters())
    given = weights_of(config)
    assert given.keys() == parameters.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(given[name].astype(np.float32)))
    tokens_BT = torch.tensor(np.asarray(tokens_of((2, 19)))).long()
    out = theirs(tokens_BT, labels=tokens_BT)
    out.loss.backward()
    gradients = {name: p.grad.float().numpy() for name, p in parameters.items()}
    return out.logits.detach().float().numpy(), out.loss.item(), gradients


TORCH = {"reason": "parity with transformers needs torch: pip install torch==2.13.0"}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case):
    pytest.importorskip("torch", **TORCH)
    logits_BTV, loss, gradients = outcome(CASES[case])
    their_logits_BTV, their_loss, their_gradients = transformers_outcome(CASES[case])
    np.testing.assert_allclose(logits_BTV, their_logits_BTV, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(loss, their_loss, rtol=1e-5)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        np.testing.assert_allclose(gradients[name], gradient, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_those_that_transformers_gave(case):
    """Where torch is absent the golden file keeps the parity; gradients of matrices by their norms."""
    golden = np.load(GOLDEN)
    logits_BTV, loss, gradients = outcome(CASES[case])
    np.testing.assert_allclose(logits_BTV, golden[f"{case}/logits"], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(loss, golden[f"{case}/loss"], rtol=1e-5)
    for name, gradient in gradients.items():
        kept = gradient if gradient.ndim == 1 else np.linalg.norm(gradient)
        np.testing.assert_allclose(kept, golden[f"{case}/{name}"], atol=1e-4, rtol=1e-4, err_msg=name)


BF16 = dataclasses.replace(ODD, dtype="bfloat16")


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


def test_in_bfloat16_logits_and_gradients_are_no_further_off_than_those_of_torch():
    """Of the same weights, rounded to bfloat16, computed by torch in float32."""
    pytest.importorskip("torch", **TORCH)
    logits_BTV, _, gradients = outcome(BF16)
    exact_BTV, _, exact = transformers_outcome(BF16)
    rounded_BTV, _, rounded = transformers_outcome(BF16, "bfloat16")
    assert rms(logits_BTV - exact_BTV) <= rms(rounded_BTV - exact_BTV)
    ours, theirs = (sum(np.square(found[n] - g).sum() for n, g in exact.items()) for found in (gradients, rounded))
    assert ours <= theirs


def test_in_bfloat16_logits_are_no_further_off_than_those_that_torch_gave():
    golden = np.load(GOLDEN)
    assert rms(outcome(BF16)[0] - golden["bfloat16/logits"]) <= golden["bfloat16/error"]


# What decides YaRN's frequencies, each in both of its ways, for heads as small as ODD's and as large as Qwen3's.
QWEN3_128K = dataclasses.replace(ODD, head_dim=128, rope_theta=1e6, yarn=YarnConfig(factor=4.0))
ROPES = {
    "odd": ODD,
    "published": QWEN3_128K,
    "attention factor": dataclasses.replace(QWEN3_128K, yarn=YarnConfig(factor=2.0, attention_factor=1.2, beta_fast=20.0)),
    "no ramp": dataclasses.replace(ODD, yarn=YarnConfig(factor=8.0, original_max_position_embeddings=4)),
    "ramp beyond the last pair": dataclasses.replace(
        ODD, rope_theta=10.0, yarn=YarnConfig(factor=3.0, original_max_position_embeddings=4096, beta_fast=300.0)
    ),
    "plain": dataclasses.replace(QWEN3_128K, yarn=YarnConfig()),
}


def transformers_frequencies(config):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    rotary = Qwen3RotaryEmbedding(transformers_config(config))
    return rotary.inv_freq.numpy(), np.float32(rotary.attention_scaling)


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_those_of_transformers_within_the_last_bit(name):
    golden = np.load(GOLDEN)
    references = [(golden[f"{name}/frequencies"], golden[f"{name}/factor"])]
    if importlib.util.find_spec("torch"):
        references.append(transformers_frequencies(ROPES[name]))
    frequencies_h, factor = rope.frequencies(ROPES[name])
    assert frequencies_h.dtype == np.float32
    for their_frequencies_h, their_factor in references:
        np.testing.assert_array_max_ulp(frequencies_h, their_frequencies_h, maxulp=2)
        np.testing.assert_allclose(factor, their_factor, rtol=1e-7)


def write_golden():
    arrays = {}
    for case, config in CASES.items():
        logits_BTV, loss, gradients = transformers_outcome(config)
        arrays |= {f"{case}/logits": logits_BTV, f"{case}/loss": np.float32(loss)}
        arrays |= {f"{case}/{name}": g if g.ndim == 1 else np.linalg.norm(g) for name, g in gradients.items()}
    arrays["bfloat16/logits"] = transformers_outcome(BF16)[0]
    arrays["bfloat16/error"] = np.float32(rms(transformers_outcome(BF16, "bfloat16")[0] - arrays["bfloat16/logits"]))
    for name, config in ROPES.items():
        arrays[f"{name}/frequencies"], arrays[f"{name}/factor"] = transformers_frequencies(config)
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    write_golden()
