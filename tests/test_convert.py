"""`cacherl convert`, both ways: what transformers wrote comes back bit for bit, and what is wrong leaves nothing behind."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cacherl_jax import checkpoint, cli, model_folder
from cacherl_jax.config import ModelConfig, OptimizerConfig, YarnConfig
from cacherl_jax.model import hf, qwen3
from cacherl_jax.text.tokenizer import train_tokenizer
from cacherl_jax.train.optimizer import make_optimizer
from cacherl_jax.train.step import TrainState

SIZES = {"vocab_size": 300, "hidden_size": 32, "head_dim": 12, "intermediate_size": 40}
CONFIG = ModelConfig(**SIZES, num_layers=2, num_heads=4, num_kv_heads=2, rope_theta=5e6, rms_norm_eps=1e-5, initializer_range=0.3)
FIELDS = SIZES | {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rope_theta": 5000000, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
    "initializer_range": 0.3, "max_position_embeddings": 262144, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip
CARRIED = {
    "tokenizer_config.json": b'{"tokenizer_class":  "Qwen2Tokenizer"}', "chat_template.jinja": b"{{ messages }}\r\n",
    "generation_config.json": b'{ "eos_token_id": [2, 0] }', "merges.txt": b"a b\n", "LICENSE": b"Apache",
}  # fmt: skip
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def convert(capsys, *args):
    """(exit status, result, standard error) of the command."""
    status = cli.main(["convert", "--json", *map(str, args)])
    out, err = capsys.readouterr()
    return status, json.loads(out or "null"), err


def weights(seed=0):
    """Under Hugging Face's names, tied."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=place.shape).astype(np.float32) for name, place in hf.places(CONFIG).items()}


def write(folder: Path, fields=FIELDS, tensors=None) -> Path:
    """A checkpoint in two shards with an index, by numpy and safetensors alone."""
    folder.mkdir()
    tensors = weights() if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(fields, indent=3))
    for name, content in CARRIED.items():
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text("of the original, not of what is trained from it")
    weight_map = {}
    for i, shard in enumerate(SHARDS):
        part = {name: w for name, w in tensors.items() if ("layers.1" in name) == i}
        save_file(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read(folder: Path) -> dict[str, np.ndarray]:
    return {name: w for path in folder.glob("*.safetensors") for name, w in load_file(path).items()}


def restore(folder: Path) -> qwen3.Qwen3:
    return checkpoint.restore_model(folder / "checkpoints", qwen3.init(model_folder.model_config(folder), jax.random.key(9)))


def test_there_and_back_is_the_same_bit_for_bit(tmp_path, capsys):
    source = write(tmp_path / "hf")
    status, result, err = convert(capsys, "--from-hf", source, "--to", tmp_path / "new" / "ours")
    assert (status, err) == (0, "")
    assert result["parameters"] == sum(w.size for w in weights().values()) and "config.json" in result["carried"]
    assert convert(capsys, "--from", tmp_path / "new" / "ours", "--to-hf", tmp_path / "back")[0] == 0
    assert {p.name for p in (tmp_path / "back").iterdir()} == {*CARRIED, "config.json", "model.safetensors"}
    for name in (*CARRIED, "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path / "back"), weights())
    assert not list(tmp_path.rglob("*.partial"))
    # What a later run starts from is the same model.
    tree = qwen3.to_dict(restore(tmp_path / "new" / "ours"))
    jax.tree.map(np.testing.assert_array_equal, tree, hf.from_hf(CONFIG, weights()))


def test_dtype_converts_on_the_way_in_and_out_and_config_json_follows(tmp_path, capsys):
    source = write(tmp_path / "hf")
    convert(capsys, "--from-hf", source, "--to", tmp_path / "ours", "--dtype", "bfloat16")
    assert {x.dtype for x in jax.tree.leaves(restore(tmp_path / "ours"))} == {jnp.dtype("bfloat16")}
    convert(capsys, "--from", tmp_path / "ours", "--to-hf", tmp_path / "bf16")
    convert(capsys, "--from", tmp_path / "ours", "--to-hf", tmp_path / "fp32", "--dtype", "float32")
    rounded = {name: w.astype(jnp.bfloat16) for name, w in weights().items()}
    for target, dtype in (("bf16", "bfloat16"), ("fp32", "float32")):
        tensors = read(tmp_path / target)
        assert {str(w.dtype) for w in tensors.values()} == {dtype}
        for name, w in rounded.items():
            np.testing.assert_array_equal(tensors[name].astype(np.float32), w.astype(np.float32), err_msg=name)
        assert json.loads((tmp_path / target / "config.json").read_text()) == FIELDS | {"torch_dtype": dtype}


def load_in_transformers(folder):
    """The model, if nothing was warned of, missing, surplus or misshapen."""
    import transformers

    warned, handler = [], logging.Handler(logging.WARNING)
    handler.emit = warned.append
    transformers.utils.logging.add_handler(handler)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    transformers.utils.logging.remove_handler(handler)
    assert not warned and not any(info.values()), (warned, info)
    return loaded


PLAIN = {"rope_type": "default", "rope_theta": 5e6}
YARN = {"rope_type": "yarn", "rope_theta": 5e6, "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0}


@pytest.mark.parametrize(
    ("tied", "dtype", "shard", "rope"),
    [(True, "bfloat16", "5GB", PLAIN), (False, "float32", "20KB", YARN)],
    ids=["tied-bf16-plain", "untied-fp32-sharded-yarn"],
)
def test_transformers_loads_what_comes_back_without_a_warning_and_computes_the_same(tmp_path, capsys, tied, dtype, shard, rope):
    torch = pytest.importorskip("torch", reason="a checkpoint by transformers needs torch: pip install torch==2.13.0")
    import transformers

    torch.manual_seed(0)
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **SIZES, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
            initializer_range=0.3, rope_parameters=rope, max_position_embeddings=256, eos_token_id=2,
        )
    ).to(getattr(torch, dtype))  # fmt: skip
    theirs.save_pretrained(tmp_path / "hf", max_shard_size=shard)
    assert (tmp_path / "hf" / INDEX).exists() == (not tied)
    convert(capsys, "--from-hf", tmp_path / "hf", "--to", tmp_path / "ours")
    convert(capsys, "--from", tmp_path / "ours", "--to-hf", tmp_path / "back")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    loaded = load_in_transformers(tmp_path / "back")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    before, after = theirs.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    tokens = np.random.default_rng(1).integers(0, 300, (2, 17))
    with torch.no_grad():
        expected, logits = (model(torch.tensor(tokens)).logits for model in (theirs, loaded))
    assert torch.equal(logits, expected)
    if dtype == "float32":
        ours = restore(tmp_path / "ours")
        hidden = qwen3.forward(ours, jnp.asarray(tokens), jnp.ones(tokens.shape, jnp.int32))
        np.testing.assert_allclose(qwen3.logits(ours, hidden), expected.numpy(), atol=2e-4, rtol=2e-4)


def test_transformers_loads_a_model_of_ours_in_another_dtype_and_with_yarn_without_a_warning(tmp_path, capsys):
    """No config.json came with it: each field is ours."""
    torch = pytest.importorskip("torch", reason="reading by transformers needs torch: pip install torch==2.13.0")
    yarn = YarnConfig(factor=4.0, original_max_position_embeddings=64, attention_factor=1.3, truncate=False)
    config = dataclasses.replace(CONFIG, vocab_size=265, tie_word_embeddings=False, yarn=yarn)
    model_folder.write(tmp_path / "ours", model := qwen3.init(config, jax.random.key(4)))
    train_tokenizer(["some text to learn from"], [], 265).save(tmp_path / "ours" / "tokenizer")
    convert(capsys, "--from", tmp_path / "ours", "--to-hf", tmp_path / "hf", "--dtype", "bfloat16")
    loaded = load_in_transformers(tmp_path / "hf")
    tree = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), qwen3.to_dict(model))
    rounded, tokens = qwen3.from_dict(config, tree), np.random.default_rng(1).integers(0, 265, (2, 17))
    assert loaded.dtype == torch.bfloat16
    with torch.no_grad():
        expected = loaded.float()(torch.tensor(tokens)).logits.numpy()
    hidden = qwen3.forward(rounded, jnp.asarray(tokens), jnp.ones(tokens.shape, jnp.int32))
    np.testing.assert_allclose(qwen3.logits(rounded, hidden), expected, atol=2e-4, rtol=2e-4)


def test_a_head_stored_beside_the_embedding_it_is_tied_to_must_repeat_it(tmp_path, capsys):
    tensors = weights()
    source = write(tmp_path / "both", tensors=tensors | {hf.HEAD: tensors[hf.EMBEDDING].copy()})
    convert(capsys, "--from-hf", source, "--to", tmp_path / "ours")
    convert(capsys, "--from", tmp_path / "ours", "--to-hf", tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path / "back"), tensors)
    source = write(tmp_path / "other", tensors=tensors | {hf.HEAD: -tensors[hf.EMBEDDING]})
    status, _, err = convert(capsys, "--from-hf", source, "--to", tmp_path / "none")
    assert status == 2 and "tensor 'lm_head.weight' differs from 'model.embed_tokens.weight'" in err


def rewrite(shard, change):
    """A fault: the shard's tensors after `change`."""

    def fault(folder):
        tensors = load_file(folder / shard)
        change(tensors)
        save_file(tensors, folder / shard)

    return fault


def index(change):
    """A fault: the index after `change` of its weight_map."""

    def fault(folder):
        data = json.loads((folder / INDEX).read_text())
        change(data["weight_map"])
        (folder / INDEX).write_text(json.dumps(data))

    return fault


def cut(shard, size):
    def fault(folder):
        (folder / shard).write_bytes((folder / shard).read_bytes()[:size])

    return fault


def both(*faults):
    return lambda folder: [fault(folder) for fault in faults]


NORM, UP = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"
FAULTS = {
    "missing": (both(rewrite(SHARDS[1], lambda t: t.pop(UP)), index(lambda m: m.pop(UP))), [f"tensor {UP!r} is missing"]),
    "surplus": (
        both(rewrite(SHARDS[1], lambda t: t.update(extra=t[NORM])), index(lambda m: m.update(extra=SHARDS[1]))),
        ["tensor 'extra' of", "is surplus"],
    ),
    "misshapen": (
        rewrite(SHARDS[1], lambda t: t.update({UP: t[UP].T.copy()})),
        [f"tensor {UP!r} of", "has shape (32, 40), expected (40, 32)"],
    ),
    "integers": (rewrite(SHARDS[1], lambda t: t.update({UP: t[UP].astype(np.int8)})), [f"tensor {UP!r} of", "dtype I8"]),
    "half a shard": (cut(SHARDS[1], 9_000), [SHARDS[1], "the file ends before tensor", "download it again"]),
    "half a header": (cut(SHARDS[1], 100), [SHARDS[1], "it is no safetensors file"]),
    "an empty shard": (cut(SHARDS[1], 0), [SHARDS[1], "it is no safetensors file"]),
    "an absent shard": (
        lambda folder: (folder / SHARDS[1]).unlink(),
        [SHARDS[1], "is absent", f"names it for tensor '{NORM[:15]}"],
    ),
    "not in the index": (index(lambda m: m.pop(UP)), [f"tensor {UP!r} is in the file but not in the index"]),
    "not in the file": (rewrite(SHARDS[1], lambda t: t.pop(UP)), [f"tensor {UP!r} is in the index but not in the file"]),
    "outside": (index(lambda m: m.update({UP: "../up.safetensors"})), [f"places tensor {UP!r} outside of the folder"]),
    "no index": (lambda folder: (folder / INDEX).write_text("{"), [INDEX, "is no index of safetensors"]),
    "no weights": (lambda folder: (folder / INDEX).unlink(), ["has neither model.safetensors nor", "but no weights"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json does not exist"]),
    "no JSON": (lambda folder: (folder / "config.json").write_text("<html>"), ["config.json is no JSON"]),
    "another model": (
        lambda folder: (folder / "config.json").write_text(json.dumps(FIELDS | {"model_type": "llama"})),
        ["config.json: model_type is 'llama'; only dense Qwen3"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_checkpoint_is_refused_by_name_and_nothing_is_written(tmp_path, capsys, name):
    fault, messages = FAULTS[name]
    fault(write(tmp_path / "hf"))
    status, _, err = convert(capsys, "--from-hf", tmp_path / "hf", "--to", tmp_path / "ours")
    assert status == 2 and all(message in err for message in messages), err
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_conversion_that_fails_on_the_way_leaves_nothing_and_touches_nothing(tmp_path, capsys, monkeypatch):
    source = write(tmp_path / "hf")
    (tmp_path / "ours.partial").mkdir()  # of one that was killed
    (tmp_path / "ours.partial" / "model.json").write_text("half")

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model_folder, "write", interrupted)
        assert convert(capsys, "--from-hf", source, "--to", tmp_path / "ours")[0] == 130
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes").write_text("mine")
    for way in (("--from-hf", source, "--to"), ("--from", source, "--to-hf")):
        status, _, err = convert(capsys, *way, tmp_path / "taken")
        assert status == 2 and "taken exists already" in err and (tmp_path / "taken" / "notes").read_text() == "mine"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--from-hf", "HERE", "--to-hf", "x"], "--from-hf goes with --to, and --from with --to-hf"),
        (["--from-hf", "./absent/folder", "--to", "x"], "there is no such folder, and it is no id such as"),
        (["--from", "HERE", "--to-hf", "x"], "holds no model: neither model.json nor a stage's settings.json"),
    ],
    ids=["crossed", "absent", "not ours"],
)
def test_wrong_usage_is_explained(tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = convert(capsys, *(str(tmp_path) if arg == "HERE" else arg for arg in args))
    assert status == 2 and message in err and not list(tmp_path.iterdir())


def test_of_a_hub_repository_only_the_needed_files_are_asked_for(tmp_path, capsys, monkeypatch):
    from fnmatch import fnmatch

    import huggingface_hub

    repository, commit = write(tmp_path / "repository"), tmp_path / "cache" / "0f1e2d"
    (repository / "consolidated.safetensors").write_bytes(b"the same weights once more")
    asked = []

    def snapshot_download(repo_id, *, revision=None, allow_patterns):
        asked.append((repo_id, revision))
        commit.mkdir(parents=True, exist_ok=True)
        for path in repository.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(path, commit / path.name)
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert convert(capsys, "--from-hf", "Qwen/Qwen3-4B-Thinking-2507", "--to", tmp_path / "ours")[0] == 0
    assert asked == [("Qwen/Qwen3-4B-Thinking-2507", None), ("Qwen/Qwen3-4B-Thinking-2507", "0f1e2d")]
    assert {p.name for p in commit.iterdir()} == {*CARRIED, *SHARDS, INDEX, "config.json"}

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot find the requested files\nin the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    status, _, err = convert(capsys, "--from-hf", "Qwen/Absent", "--to", tmp_path / "none")
    assert status == 2 and "--from-hf Qwen/Absent: there is no such folder, and the Hub cannot give it: Cannot find" in err


def test_a_finished_stage_is_exported_with_its_tokenizer(tmp_path, capsys):
    tok = train_tokenizer(["some text to learn from"], [], 265)
    tok.save(tmp_path / "think" / "tokenizer")
    stage, config = tmp_path / "sft", ModelConfig(num_layers=2, hidden_size=32, vocab_size=tok.vocab_size)
    model = qwen3.init(config, jax.random.key(3))
    with checkpoint.Checkpoints(stage / "checkpoints", latest=1) as saved:
        saved.save(7, TrainState.create(model, make_optimizer(OptimizerConfig(), 10)))
    settings = {"model": dataclasses.asdict(config) | {"vocab_size": 0}}  # a run takes it from the tokenizer
    (stage / "settings.json").write_text(json.dumps(settings))
    status, _, err = convert(capsys, "--from", stage, "--to-hf", tmp_path / "hf")
    assert status == 2 and "sft is a stage that has not finished" in err
    (stage / "done.json").write_text("{}")
    assert convert(capsys, "--from", stage, "--to-hf", tmp_path / "hf")[0] == 0
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path / "hf"), hf.to_hf(config, qwen3.to_dict(model)))
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == tok.im_end
