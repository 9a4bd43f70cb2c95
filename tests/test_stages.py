"""A whole run, small: by the command line, from the cache, through interruptions and wrong input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from cacherl_jax import cli
from cacherl_jax.cache.store import Recording, SQLiteStore
from cacherl_jax.types import ToolResult

SMALL = {
    "data.train_tasks": 30, "data.validation_tasks": 4, "data.test_tasks": 12, "tokenizer.vocab_size": 680,
    "model.hidden_size": 32, "model.num_layers": 2, "model.num_heads": 2, "model.num_kv_heads": 1, "model.head_dim": 16,
    "model.intermediate_size": 48, "sft.steps": 6, "sft.checkpoint_every": 2, "grpo.steps": 3, "grpo.prompts": 2,
    "grpo.group": 3, "grpo.checkpoint_every": 1, "grpo.validate_every": 2, "rollout.rows": 8, "rollout.max_turn_tokens": 24,
    "rollout.max_sampled_tokens": 60,
}  # fmt: skip


def arguments(verb, out, **changes):
    sets = [f"--set={name}={json.dumps(value)}" for name, value in (SMALL | changes).items()]
    return [verb, "--out", str(out), "--json", *sets]


def cacherl(capsys, *args):
    status = cli.main(args)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert cli.main(arguments("demo", out)) == 0
    return out


def losses(out: Path):
    return [json.loads(line) for stage in ("sft", "grpo") for line in (out / stage / "metrics.jsonl").read_text().splitlines()]


def test_summary_figure_table_and_page(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert {"cpu_seconds", "tasks", "seed", "cache", "sft", "expert_sft", "grpo", "gain", "tiers"} <= summary.keys()
    assert summary["tasks"] == 12 and summary["seed"] == 0 and summary["grpo"]["live_calls"] == 0
    assert len(summary["cache"]["snapshot"]) == 64 and summary["cpu_seconds"] > 0
    assert {"process_accuracy", "process_accuracy_cached"} <= summary["grpo"].keys()
    assert {"mean", "low", "high"} <= summary["gain"].keys() and {"calls", "rollouts"} == summary["tiers"].keys()
    assert summary["coverage"]["train"]["exact"] == summary["coverage"]["test"]["exact"] == 1.0
    assert (finished / "report" / "training.png").read_bytes().startswith(b"\x89PNG")
    page = (finished / "report" / "trajectories.html").read_text()
    assert page.count("<article>") == 10 and 'class="sampled"' in page and "http" not in page
    assert "process accuracy" in (finished / "report" / "table.md").read_text()


def test_a_finished_run_is_not_run_again(finished, capsys):
    before = (finished / "grpo" / "metrics.jsonl").stat().st_mtime_ns
    status, out, _ = cacherl(capsys, *arguments("demo", finished))
    assert status == 0 and json.loads(out)["name"] == "demo"
    assert (finished / "grpo" / "metrics.jsonl").stat().st_mtime_ns == before


def test_training_never_opens_the_evaluation_store_nor_a_live_tool(tmp_path, capsys):
    """With the evaluation store destroyed, everything up to evaluation runs; evaluation says what is wrong."""
    for verb in ("record", "think"):
        assert cacherl(capsys, *arguments(verb, tmp_path))[0] == 0
    store = tmp_path / "record" / "evaluation.sqlite"
    store.write_bytes(b"not a store")
    for verb in ("sft", "grpo"):
        status, out, err = cacherl(capsys, *arguments(verb, tmp_path))
        assert status == 0, err
    assert json.loads(out)["live_calls"] == 0
    status, out, err = cacherl(capsys, *arguments("eval", tmp_path))
    assert status == 1 and "evaluation.sqlite" in err and out == ""


def test_other_settings_in_the_same_folder_are_refused(finished, capsys):
    status, out, err = cacherl(capsys, *arguments("demo", finished, **{"sft.steps": 7}))
    assert status == 2 and "sft.steps: 6 then, 7 now" in err and out == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["grpo", "--set", "grpo.stepz=1"], "no field 'stepz'"),
        (["grpo", "--config", "absent.py"], "absent.py does not exist"),
        (["grpo"], "stage 'sft' has not finished"),
        (["record", "--set", 'data.demonstrators=["sage"]'], "data.demonstrators.0 = 'sage': Input should be 'expert', 'stopper'"),
        (["record", "--set", "data.source=sgd", "--set", "data.path=/nowhere"], "/nowhere/train holds no schema.json"),
    ],
)
def test_wrong_usage_is_explained(tmp_path, capsys, args, message):
    status, out, err = cacherl(capsys, *args, "--out", str(tmp_path), "--json")
    assert status == 2 and message in err and out == ""


def test_an_interrupted_stage_refuses_other_settings_and_keeps_what_it_ran_with(tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cacherl_jax.stages.write_transcripts", interrupted)
        assert cacherl(capsys, *arguments("record", tmp_path))[0] == 130
    before = (tmp_path / "run.json").read_text()
    status, _, err = cacherl(capsys, *arguments("record", tmp_path, seed=1))
    assert status == 2 and "seed: 0 then, 1 now" in err and (tmp_path / "run.json").read_text() == before
    assert cacherl(capsys, *arguments("record", tmp_path))[0] == 0


def test_a_store_that_changed_after_recording_is_not_trained_on(tmp_path, capsys):
    for verb in ("record", "think", "sft"):
        assert cacherl(capsys, *arguments(verb, tmp_path))[0] == 0
    with SQLiteStore(tmp_path / "record" / "training.sqlite", mode="rw") as store:
        store.add(Recording(b"k", "get_order", "{}", "", ToolResult("planted")))
    status, _, err = cacherl(capsys, *arguments("grpo", tmp_path))
    assert status == 1 and "training.sqlite has changed since it was recorded" in err


def test_a_run_on_eight_devices(tmp_path):
    """data 2 x fsdp 2 x tp 2, from recording to the report, on simulated devices."""
    sets = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tp": 2, "model.num_kv_heads": 2, "sft.steps": 2, "grpo.steps": 1}
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "cacherl_jax.cli", *arguments("demo", tmp_path, **sets)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["grpo"]["live_calls"] == 0
    assert "Involuntary full rematerialization" not in done.stderr


def test_a_broken_line_in_the_recordings_is_counted_and_named(tmp_path, capsys):
    assert cacherl(capsys, *arguments("record", tmp_path))[0] == 0
    path = tmp_path / "record" / "transcripts.jsonl"
    lines = path.read_text().splitlines()
    lines[4] = lines[4][:50]
    path.write_text("\n".join(lines))
    status, out, _ = cacherl(capsys, *arguments("think", tmp_path))
    (problem,) = json.loads(out)["unreadable"]
    assert status == 0 and "transcripts.jsonl:5:" in problem and json.loads(out)["transcripts"] == len(lines) - 1


def test_killed_and_interrupted_runs_end_as_uninterrupted_ones(finished, tmp_path):
    """kill -9 in sft, Ctrl-C in grpo; then the same command once more gives the same losses, tokens and figures."""
    # A child of tests that run in the background would ignore Ctrl-C.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from cacherl_jax.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, *arguments("demo", tmp_path)]
    programs = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }

    def stop_when(path, lines, how):
        child = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | programs
        )
        while child.poll() is None:
            if path.is_file() and len(path.read_text().splitlines()) >= lines:
                child.send_signal(how)
                break
            time.sleep(0.02)
        _, err = child.communicate()
        return child.returncode, err

    assert stop_when(tmp_path / "sft" / "checkpoints" / "2" / "_CHECKPOINT_METADATA", 1, signal.SIGKILL)[0] == -signal.SIGKILL
    status, err = stop_when(tmp_path / "grpo" / "metrics.jsonl", 2, signal.SIGINT)
    assert status == 130 and "the same command goes on" in err
    assert cli.main(arguments("demo", tmp_path)) == 0
    assert losses(tmp_path) == losses(finished)
    for name in ("sft.live.jsonl", "grpo.live.jsonl", "grpo.cached.jsonl"):
        assert (tmp_path / "eval" / name).read_bytes() == (finished / "eval" / name).read_bytes()
    kept, other = (json.loads((p / "summary.json").read_text()) for p in (finished, tmp_path))
    assert {k: v for k, v in kept.items() if "cpu" not in k} == {k: v for k, v in other.items() if "cpu" not in k}
