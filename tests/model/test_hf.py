"""Checkpoints of Hugging Face: config.json and weights, read onto shards. tests/test_convert.py has the command."""

import dataclasses
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_parity import CASES, GOLDEN, weights_of
from test_qwen3 import ODD, tokens_of

from cacherl_jax.config import ConfigError, ModelConfig, YarnConfig
from cacherl_jax.mesh import one_device
from cacherl_jax.model import hf, hf_config, hf_files, qwen3

# As transformers 4 wrote it; every number off its default.
FIELDS = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 20, "hidden_act": "silu", "hidden_size": 48, "initializer_range": 0.15,
    "intermediate_size": 56, "max_position_embeddings": 224, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 6, "num_hidden_layers": 3, "num_key_value_heads": 3, "rms_norm_eps": 0.003, "rope_scaling": {
        "rope_type": "yarn", "factor": 3.5, "original_max_position_embeddings": 64, "beta_fast": 6, "beta_slow": 0.5,
        "mscale": 1.3, "mscale_all_dim": 0.7, "truncate": False,
    },
    "rope_theta": 5003, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "float32",
    "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 97,
}  # fmt: skip
YARN = FIELDS["rope_scaling"]
READ = dataclasses.replace(ODD, embedding_range=0.15)  # Hugging Face has one range for both


# ---- config.json -----------------------------------------------------------------------------------------------------


def test_both_spellings_of_a_config_are_read_and_kept():
    without = {k: v for k, v in FIELDS.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new = without | {
        "rope_parameters": FIELDS["rope_scaling"] | {"rope_theta": 5003.0}, "dtype": "float32",
        "layer_types": ["full_attention"] * 3,
    }  # fmt: skip
    for fields in (FIELDS, new):
        assert hf_config.from_hf_config(fields) == READ
        assert hf_config.to_hf_config(READ, fields) == fields
    assert hf_config.from_hf_config(hf_config.to_hf_config(READ)) == READ
    other = dataclasses.replace(READ, rope_theta=7e4, num_layers=2, dtype="bfloat16", tie_word_embeddings=True, head_dim=8)
    for fields in (FIELDS, new):
        written = hf_config.to_hf_config(other, fields)
        assert hf_config.from_hf_config(written) == other and written.keys() == fields.keys()
    assert hf_config.from_hf_config(FIELDS, "bfloat16") == dataclasses.replace(READ, dtype="bfloat16")


def test_yarn_is_read_as_transformers_means_it_and_written_where_it_stands():
    def yarn(**changes):
        return hf_config.from_hf_config(FIELDS | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}} | changes).yarn

    assert yarn() == yarn(rope_scaling={"type": "yarn", "factor": 4, "beta_fast": None, "beta_slow": 0, "attention_factor": None})
    assert yarn() == YarnConfig(factor=4.0, original_max_position_embeddings=224)  # by default the longest context
    assert yarn(rope_scaling=None) == yarn(rope_scaling={"rope_type": "yarn", "factor": 1.0}) == YarnConfig()
    plain = FIELDS | {"rope_scaling": None, "max_position_embeddings": 32768}
    new = {k: v for k, v in plain.items() if k not in ("rope_theta", "rope_scaling")}
    new |= {"rope_parameters": {"rope_theta": 5003, "rope_type": "default"}}
    off = dataclasses.replace(READ, yarn=YarnConfig())
    longer = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    on = dataclasses.replace(READ, yarn=YarnConfig(factor=4.0))
    for fields, expected in (
        (plain, plain | {"rope_scaling": longer, "max_position_embeddings": 131072}),
        (new, new | {"rope_parameters": longer | {"rope_theta": 5003}, "max_position_embeddings": 131072}),
    ):
        assert hf_config.to_hf_config(on, fields) == expected and hf_config.from_hf_config(expected) == on
        back = hf_config.to_hf_config(off, expected)
        assert hf_config.from_hf_config(back) == off and back["max_position_embeddings"] == 32768
    assert hf_config.from_hf_config(hf_config.to_hf_config(on)) == on
    idle = dataclasses.replace(READ, yarn=YarnConfig(beta_fast=8.0))  # factor 1: nothing else is read
    assert hf_config.to_hf_config(idle, plain) == plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'; only dense Qwen3"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures is ['Qwen3ForSequenceClassification']"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is implemented"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types of layer 1 is 'sliding_attention'"),
        ({"rope_scaling": YARN | {"rope_type": "llama3"}}, "rope_scaling.rope_type is 'llama3'; one of 'default', 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling.type is 'linear'"),
        ({"rope_scaling": YARN | {"type": "default"}}, "rope_scaling.type is 'default'"),
        ({"rope_scaling": YARN | {"finetuned": True}}, "rope_scaling.finetuned is True; this scaling of RoPE is not"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "rope_scaling.partial_rotary_factor is 0.5; only 1.0"),
        ({"rope_scaling": YARN | {"factor": None}}, "rope_scaling.factor is missing; YaRN needs it"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "field 'rope_scaling': model.yarn.factor = '4'"),
        ({"rope_scaling": YARN | {"beta_fast": 0.25}}, "model.yarn.beta_fast=0.25 is below model.yarn.beta_slow=0.5"),
        ({"rope_scaling": YARN | {"mscale": None}}, "model.yarn.mscale=0.0 and model.yarn.mscale_all_dim=0.7"),
        ({"rope_scaling": YARN | {"truncate": None}}, "model.yarn.truncate = None"),  # absent means true there, None false
        ({"rope_scaling": YARN | {"factor": 1.0, "attention_factor": 1.5}}, "rope_scaling.attention_factor is 1.5 and factor 1"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "and rope_parameters.rope_theta 10000.0"),
        ({"rope_parameters": {"rope_theta": 5003, "factor": 2.0}}, "rope_parameters.factor is 2.0; this scaling of RoPE is not"),
        ({"rope_parameters": {"rope_theta": 5003, "rope_type": "default"}}, "they must agree"),
        ({"rope_theta": None}, "field 'rope_theta' is missing"),
        ({"head_dim": ...}, "field 'head_dim' is missing"),
        ({"head_dim": "20"}, "field 'head_dim': model.head_dim = '20'"),
        ({"num_key_value_heads": 4}, "num_heads=6 is not a multiple of model.num_kv_heads=4"),
        ({"logit_scale": 2.0}, "field 'logit_scale' is not known"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"torch_dtype": "float16"}, "dtype is 'float16'; name the one to convert to with --dtype"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_of_another_model_is_refused_naming_the_field(changes, message):
    with pytest.raises(ConfigError) as refused:
        hf_config.from_hf_config({k: v for k, v in (FIELDS | changes).items() if v is not ...})
    assert message in str(refused.value)


def test_every_field_of_transformers_config_is_read_refused_or_known_to_decide_nothing():
    transformers = pytest.importorskip("transformers")
    fields = transformers.Qwen3Config(**{k: v for k, v in FIELDS.items() if k != "transformers_version"}).to_dict()
    base = hf_config.from_hf_config(fields, "float32")
    assert base == READ
    for name, value in fields.items():
        if name in hf_config.UNREAD | {*hf_config.DTYPES, "vocab_size"}:
            continue
        other = 2 * value if isinstance(value, int | float) and value and not isinstance(value, bool) else ["other"]
        try:
            changed = hf_config.from_hf_config(fields | {name: not value if isinstance(value, bool) else other}, "float32")
            outcome = "never read" if changed == base else name
        except ConfigError as error:
            outcome = str(error)
        assert name in outcome, f"{name}: {outcome}"


# ---- weights ---------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    """By safetensors itself, tensors dealt out in turn."""
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        part = {name: tensors[name] for name in names[i::shards]}
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (folder / hf_files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load(config: ModelConfig, folder: Path) -> qwen3.Qwen3:
    found = hf_files.headers(folder)
    hf_files.check(found, {name: place.shape for name, place in hf.places(config).items()})
    return hf.load(config, lambda name, index: hf_files.read(found[name], name, index), one_device())


@pytest.mark.parametrize("case", CASES)
def test_weights_from_files_give_the_logits_that_transformers_gave(tmp_path, case):
    config = CASES[case]
    write_shards(tmp_path, weights_of(config), 3)
    model, tokens_BT = load(config, tmp_path), tokens_of((2, 19))
    logits_BTV = qwen3.logits(model, qwen3.forward(model, tokens_BT, jnp.ones_like(tokens_BT)))
    np.testing.assert_allclose(logits_BTV, np.load(GOLDEN)[f"{case}/logits"], atol=1e-4, rtol=1e-4)


def test_the_writer_writes_what_safetensors_reads(tmp_path):
    tensors = {name: w.astype(jnp.bfloat16) for name, w in weights_of(ODD).items()}
    with hf_files.Writer(tmp_path, {n: w.shape for n, w in tensors.items()}, "bfloat16", max_shard_bytes=20_000) as writer:
        for name in sorted(tensors, reverse=True):  # in any order
            writer.write(name, tensors[name])
    index = json.loads((tmp_path / hf_files.INDEX).read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in tensors.values()) and len(shards) > 3
    for shard in shards:
        with safe_open(shard, "np") as file:
            assert file.metadata() == {"format": "pt"}  # transformers before 5 refuses a file without
        for name, w in load_file(shard).items():
            assert index["weight_map"][name] == shard.name
            np.testing.assert_array_equal(w.view(np.uint16), tensors.pop(name).view(np.uint16))
    assert not tensors
    with hf_files.Writer(tmp_path, {"a": (2, 3)}, "float32") as writer:
        writer.write("a", np.ones((2, 3), np.float32))
    assert load_file(tmp_path / hf_files.SINGLE)["a"].tolist() == [[1.0] * 3] * 2


def test_loading_holds_two_tensors_on_the_host_and_never_a_stack(tmp_path):
    config = ModelConfig(
        vocab_size=8, hidden_size=256, num_layers=8, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=4096
    )  # fmt: skip
    write_shards(tmp_path, {n: np.full(p.shape, 1.5, np.float32) for n, p in hf.places(config).items()}, 2)
    load(config, tmp_path)  # what is imported and compiled once is not counted
    largest, stack = 256 * 4096 * 4, 8 * 256 * 4096 * 4
    tracemalloc.start()
    model = load(config, tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert model.layers.gate_DF[...].nbytes == stack
    assert largest < peak < 2 * largest + 3 * 2**20 < stack / 2


EIGHT = """
import collections, sys
import jax, numpy as np
from cacherl_jax.config import ConfigError, MeshConfig, ModelConfig
from cacherl_jax.mesh import make_mesh, one_device
from cacherl_jax.model import hf, qwen3

config = ModelConfig(vocab_size=32, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=24,
                     tie_word_embeddings=False)
rng = np.random.default_rng(0)
tensors = {name: rng.normal(size=place.shape).astype(np.float32) for name, place in hf.places(config).items()}
read = collections.Counter()

def slices(name, index):
    part = tensors[name][index]
    read[name] += part.size
    return part

mesh = make_mesh(MeshConfig(data=2, fsdp=2, tp=2))
model = hf.load(config, slices, mesh)
assert read == {name: w.size for name, w in tensors.items()}, read  # each part once, for however many devices
like = jax.tree.leaves(qwen3.shardings(config, mesh), is_leaf=lambda x: isinstance(x, jax.sharding.Sharding))
for x, sharding in zip(jax.tree.leaves(model), like, strict=True):
    assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding, sharding)
assert model.layers.query_DA[...].addressable_shards[0].data.shape == (3, 8, 12)
jax.tree.map(np.testing.assert_array_equal, qwen3.to_dict(model), hf.from_hf(config, tensors))
read.clear()
try:
    hf.load(config, slices, make_mesh(MeshConfig(tp=8)))
except ConfigError as error:
    assert "num_heads=4 does not divide over mesh axis tp=8" in str(error) and not read, (error, read)
    print("all as expected")
"""


def test_on_eight_devices_arrays_are_born_sharded_and_each_part_is_read_once():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
    }
    done = subprocess.run([sys.executable, "-c", EIGHT], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "all as expected\n", done.stderr[-3000:]


def test_bfloat16_and_float16_tensors_are_converted_exactly(tmp_path):
    weights = {name: w.astype(np.float16) for name, w in weights_of(ODD).items()}
    weights[hf.HEAD] = weights[hf.HEAD].astype(jnp.bfloat16)
    write_shards(tmp_path, weights, 1)
    (tmp_path / hf_files.INDEX).unlink()
    (tmp_path / "model-00001-of-00001.safetensors").rename(tmp_path / hf_files.SINGLE)
    tree = qwen3.to_dict(load(ODD, tmp_path))
    expected = hf.from_hf(ODD, {name: w.astype(np.float32) for name, w in weights.items()})
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(tree))
    jax.tree.map(np.testing.assert_array_equal, tree, expected)
