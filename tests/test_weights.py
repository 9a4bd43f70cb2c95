"""A run that starts from converted weights: they are what is trained, and their tokenizer and files come back with it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_stages import SMALL, arguments, cacherl

from cacherl_jax import checkpoint, cli, model_folder
from cacherl_jax.config import ModelConfig
from cacherl_jax.mesh import one_device
from cacherl_jax.model import qwen3

# Nothing is learnt at these rates: what SFT leaves is what it began with.
STILL = {
    "sft.steps": 1, "sft.optimizer.learning_rate": 0, "sft.optimizer.adam_learning_rate": 0, "data.demonstrators": ["expert"],
    "sft.tokens_per_batch": 256,
}  # fmt: skip
FIELDS = {name.removeprefix("model."): value for name, value in SMALL.items() if name.startswith("model.")}
MODEL = ModelConfig(**FIELDS, vocab_size=700, dtype="bfloat16", rope_theta=5e6)  # more rows than the tokenizer has tokens


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "recorded"
    for verb in ("record", "think"):
        assert cli.main(arguments(verb, out, **STILL)) == 0
    return out


@pytest.fixture
def given(recorded, tmp_path):
    """As `cacherl convert` writes it."""
    folder = tmp_path / "given"
    model_folder.write(folder, qwen3.init(MODEL, jax.random.key(5)))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_bytes((recorded / "think" / "tokenizer" / "tokenizer.json").read_bytes())
    (folder / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_sft_starts_from_the_weights_and_their_tokenizer_comes_along(given, tmp_path, capsys, monkeypatch):
    made = []
    original = qwen3.init

    def init(*args):
        model = original(*args)
        made.append(all(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(model)))  # shapes alone
        return model

    monkeypatch.setattr(qwen3, "init", init)
    out, changes = tmp_path / "run", STILL | {"weights": str(given), "model.rope_theta": 5e6}
    for verb in ("record", "think", "sft"):
        status, _, err = cacherl(capsys, *arguments(verb, out, **changes))
        assert status == 0, err
    assert made and all(made), "weights were made to be thrown away"
    config = dataclasses.replace(MODEL, dtype="float32")
    trained = checkpoint.restore_model(out / "sft" / "checkpoints", checkpoint.abstract_model(config, one_device()))
    expected = jax.tree.map(lambda x: x.astype(jnp.float32), qwen3.to_dict(original(MODEL, jax.random.key(5))))
    jax.tree.map(np.testing.assert_array_equal, qwen3.to_dict(trained), expected)
    status, _, err = cacherl(capsys, "convert", "--json", "--from", str(out / "sft"), "--to-hf", str(tmp_path / "hf"))
    assert status == 0, err
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 700


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.num_layers": 3}, "model.num_layers=3, there 2; model.rope_theta=10000.0, there 5000000.0"),
        ({"model.rope_theta": 5e6, "model.vocab_size": 680}, "model.vocab_size=680, there 700"),
        ({"weights": "."}, "weights='.' is no folder made by `cacherl convert`"),
    ],
)
def test_a_configuration_of_another_model_is_refused(given, tmp_path, capsys, changes, message):
    status, out, err = cacherl(capsys, *arguments("sft", tmp_path / "run", **({"weights": str(given)} | changes)))
    assert (status, out) == (2, "") and message in err and not (tmp_path / "run").exists()
