"""`cacherl plan` from the command line to the TPU's compiler, and its choice of the change that helps most."""

import importlib.util
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cacherl_jax import cli
from cacherl_jax.config import Config, LoraConfig, MemoryConfig, MeshConfig, ModelConfig, OptimizerConfig, RolloutConfig, SftConfig
from cacherl_jax.plan import changes
from cacherl_jax.plan.topology import GIB, parse
from cacherl_jax.verbs import plan as plan_verb

ADAMW = OptimizerConfig(name="adamw")
# Two layers whose logits of all tokens at once are more than a chip has: 2,048 tokens x 2,000,000 x 4 bytes.
TOO_LARGE = Config(
    model=ModelConfig(
        vocab_size=2_000_000, hidden_size=256, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=128, intermediate_size=512
    ),
    mesh=MeshConfig(fsdp=8),
    memory=MemoryConfig(compute="bfloat16", remat="full", logit_chunk=1_000_000),
    sft=SftConfig(tokens_per_batch=64 * 256, packed_length=256, optimizer=ADAMW),
)


def planned(config, tmp_path, *arguments):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_json()))
    return cli.main(["plan", "--config", str(path), "--json", *arguments])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU's compiler: pip install libtpu")
def test_a_step_that_does_not_fit_is_planned_with_the_change_that_makes_it_fit(tmp_path, capsys):
    assert planned(TOO_LARGE, tmp_path, "--topology", "v5e:2x4") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["rows"], result["length"], result["fits"], result["temporaries_bytes"]) == (64, 256, False, None)
    assert result["limit_bytes"] == 15.75 * GIB < result["peak_bytes"]
    # Weights and two moments in float32, over eight chips; the batch and the norms' scales, on every chip, are small.
    matrices = 2_000_000 * 256 + 2 * (256 * (4 + 2) * 128 + 3 * 256 * 512)
    assert result["arguments_bytes"] == pytest.approx(3 * 4 * matrices / 8, rel=1e-3)
    tokens = 64 * 256
    assert result["model_flops"] == 3 * (2 * tokens * matrices + 2 * 64 * 4 * 2 * 128 * 256 * 257 // 2)
    assert result["flops_seconds"] == pytest.approx(result["model_flops"] / 8 / 197e12)
    assert result["compile_seconds"] > 0
    change = result["change"]
    assert change["what"] == "--set memory.logit_chunk=1024" and change["fits"]
    assert change["arguments_bytes"] == result["arguments_bytes"]
    assert change["arguments_bytes"] / 3 < change["temporaries_bytes"]  # the gradients are among them
    assert change["peak_bytes"] < change["limit_bytes"]


def test_a_mesh_of_another_size_is_refused_with_both(tmp_path, capsys):
    pytest.importorskip("libtpu", reason="needs the TPU's compiler: pip install libtpu")
    assert planned(replace(TOO_LARGE, mesh=MeshConfig(fsdp=4)), tmp_path, "--topology", "v5e:2x4") == 2
    message = capsys.readouterr().err
    assert "fsdp=4 x seq=1 x tp=1 = 4 devices, but there are 8 in v5e:2x4" in message


def test_without_the_compiler_the_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert planned(TOO_LARGE, tmp_path, "--topology", "v5e:2x4") == 1
    assert "libtpu is not installed: pip install 'cacherl_jax[tpu]'" in capsys.readouterr().err


def test_the_compiler_runs_beside_no_accelerator_of_this_machine(monkeypatch):
    asked = {}

    def run(command, **options):
        asked.update(options["env"])
        return SimpleNamespace(returncode=0, stdout="a warning\n{}\n", stderr="")

    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setattr(plan_verb.subprocess, "run", run)
    assert plan_verb.run({}) == {}
    assert (asked["JAX_PLATFORMS"], asked["TPU_SKIP_MDS_QUERY"]) == ("cpu", "1")


# ---- which change ----------------------------------------------------------------------------------------------------

RUN = Config(
    model=ModelConfig(vocab_size=1000),
    mesh=MeshConfig(fsdp=8),
    memory=MemoryConfig(compute="bfloat16", remat="full", logit_chunk=1024),
    sft=SftConfig(optimizer=ADAMW),
    rollout=RolloutConfig(rows=16),
)


def tried(config, step="sft", topology="v5e:2x4"):
    return [change.what for change in changes.candidates(config, parse(topology), step)]


def test_changes_that_keep_the_result_come_before_those_that_do_not():
    loose = replace(RUN, memory=MemoryConfig())
    assert tried(loose) == [
        "--set memory.logit_chunk=1024",
        "--set memory.remat=full",
        "--set memory.compute=bfloat16",
        "--set mesh.fsdp=4 --set mesh.seq=2",
        "--set mesh.fsdp=2 --set mesh.seq=4",
        "--set mesh.fsdp=1 --set mesh.seq=8",
        "--set sft.optimizer.moments=bfloat16",
        "--topology v5e:4x4 --set mesh.fsdp=16",
        "--set sft.lora.rank=16",
    ]
    settled = replace(RUN, mesh=MeshConfig(), sft=SftConfig(lora=LoraConfig(rank=8)))
    assert tried(settled, topology="v5e:16x16") == ["--set memory.logit_chunk=256"]
    assert tried(RUN, "decode") == ["--set rollout.tp=2", "--set rollout.rows=8", "--topology v5e:4x4 --set mesh.fsdp=16"]


@pytest.mark.parametrize(
    ("arguments_gib", "tokens", "peak_gib", "expected"),
    [
        (2, 1_000_000, 18, "--set mesh.fsdp=4 --set mesh.seq=2"),  # what layers keep
        (14, 1000, 16, "--set sft.optimizer.moments=bfloat16"),  # the state
        (40, 1000, 42, "--topology v5e:4x4 --set mesh.fsdp=16"),  # nothing is enough: the most
    ],
)
def test_the_change_is_the_first_that_should_do(monkeypatch, arguments_gib, tokens, peak_gib, expected):
    """The count knows state and tokens alone: a sequence axis halves the tokens, bfloat16 moments take a third of the state."""

    def count(config, step, arguments, trained, tokens):
        return arguments + tokens * 10_000

    def programs(config, topology):
        state = arguments_gib * GIB * 8 // topology.chips
        state = state * 2 // 3 if config.sft.optimizer.moments == "bfloat16" else state * 9 // 10 if config.sft.lora.rank else state
        rows = tokens * 8 // config.mesh.seq
        part = SimpleNamespace(arguments=({},))
        return [part], state, SimpleNamespace(rows=rows, length=1)

    monkeypatch.setattr(changes, "count", count)
    chosen = changes.most_promising(RUN, parse("v5e:2x4"), "sft", peak_gib * GIB, programs)
    assert chosen is not None and chosen.what == expected
