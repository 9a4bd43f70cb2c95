"""A whole run, small: by the command line, from the cache, through interruptions and wrong input."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from cacherl_jax import checkpoint, cli, processes
from cacherl_jax.cache.store import Recording, SQLiteStore
from cacherl_jax.config import load_config, smoke
from cacherl_jax.reward import monitor
from cacherl_jax.rollout import stream
from cacherl_jax.train import groups, grpo
from cacherl_jax.types import Task, ToolResult

DEMO = load_config(cli.DEFAULT_CONFIG)
SIZES = processes.flat(smoke(DEMO).to_json())
SMALL = {name: SIZES[name] for name, value in processes.flat(DEMO.to_json()).items() if value != SIZES[name]} | {
    "data.train_tasks": 30, "data.validation_tasks": 4, "data.test_tasks": 12, "sft.steps": 6, "grpo.steps": 3,
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


def losses(out: Path, *stages):
    """All metrics but the times."""
    lines = [line for stage in stages or ("sft", "grpo") for line in (out / stage / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "rate")} for line in lines]


def test_every_step_says_what_rewards_are_made_of_and_whether_the_cache_is_exploited(finished):
    rows = [row for row in losses(finished) if row["stage"] == "grpo" and "loss" in row]
    for row in rows:
        assert row["components"].keys() - {"success"} == row["correlations"].keys() and row["warnings"] == []
        assert sum(part["share"] for part in row["by_tier"].values()) == pytest.approx(1.0)
    assert len(monitor.from_rows(rows).first) == SMALL["grpo.steps"]


def test_sampler_and_trainer_agree_at_every_step(finished):
    rows = [row for row in losses(finished) if row["stage"] == "grpo" and "loss" in row]
    assert len(rows) == SMALL["grpo.steps"]
    for row in rows:
        gap = row["sampler_gap"]
        assert 0 < gap["mean"] <= gap["max"] <= 1e-5 and set(gap["by_position"]) <= {"0-63", "64-127", "128-255"}
        assert max(values["max"] for values in gap["by_position"].values()) == gap["max"]
        assert row["importance"] == pytest.approx(1, abs=1e-5) and row["truncated"] == 0


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
    # Where a model is served is no setting, and the run itself has written the configuration.
    moved = ["--set", "reward.judge.base_url=http://elsewhere/v1", "--set", "cache.simulator.timeout=9"]
    kept = cacherl(capsys, "grpo", "--out", str(finished), "--config", str(finished / "run.json"), "--json", *moved)
    assert kept[0] == 0, kept[2]  # by the configuration that the run itself has written
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
        patch.setattr("cacherl_jax.stages.record.write_transcripts", interrupted)
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
    sets = {
        "mesh.data": 2, "mesh.fsdp": 2, "mesh.tp": 2, "model.num_kv_heads": 2, "sft.steps": 2, "grpo.steps": 1,
        "grpo.minibatches": 2, "grpo.ratio": "sequence", "grpo.importance": "sequence", "grpo.aggregation": "sequence_mean",
    }  # fmt: skip
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "cacherl_jax.cli", *arguments("demo", tmp_path, **sets)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["grpo"]["live_calls"] == 0
    (row,) = (row for row in losses(tmp_path) if "sampler_gap" in row)
    assert 0 < row["sampler_gap"]["mean"] <= row["sampler_gap"]["max"] <= 1e-4
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


# A process that sends itself signals at chosen places: no other process has to guess when they are reached.
SIGNALLED = """
import atexit, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a child of tests that run in the background would ignore it
from cacherl_jax import checkpoint, cli
from cacherl_jax.train import grpo

def after_call(number, owner, name, act):
    original, calls = getattr(owner, name), []
    def patched(*args, **kwargs):
        calls.append(name)
        result = original(*args, **kwargs)
        if len(calls) == number:
            act()
        return result
    setattr(owner, name, patched)

"""
# In sft's second save: the first is whole, the second begun.
KILLED = 'after_call(2, checkpoint.ocp.CheckpointManager, "save", lambda: os.kill(os.getpid(), signal.SIGKILL))'
# In grpo's second step, before its update; then once more while the interpreter takes itself down.
INTERRUPTED = """
after_call(2, grpo.scoring, "write_rollouts", lambda: signal.raise_signal(signal.SIGINT))
atexit.register(signal.raise_signal, signal.SIGINT)
"""


def test_killed_and_interrupted_runs_end_as_uninterrupted_ones(finished, tmp_path):
    """kill -9 in sft, Ctrl-C in grpo; then the same command once more gives the same losses, tokens and figures."""
    programs = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }

    def child(signals):
        command = [sys.executable, "-c", f"{SIGNALLED}{signals}\ncli.command()", *arguments("demo", tmp_path)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | programs)
        return done.returncode, done.stderr

    assert child(KILLED)[0] == -signal.SIGKILL
    status, err = child(INTERRUPTED)
    assert status == 130 and err.endswith("the same command goes on from there.\n") and "Traceback" not in err
    assert saved(tmp_path) == [1]
    assert cli.main(arguments("demo", tmp_path)) == 0
    assert losses(tmp_path) == losses(finished)
    for name in ("sft.live.jsonl", "grpo.live.jsonl", "grpo.cached.jsonl"):
        assert digests(tmp_path / "eval" / name) == digests(finished / "eval" / name)
    kept, other = (json.loads((p / "summary.json").read_text()) for p in (finished, tmp_path))
    assert {k: v for k, v in kept.items() if "cpu" not in k} == {k: v for k, v in other.items() if "cpu" not in k}


def digests(path: Path) -> list[str]:
    return [t.digest() for t in stream.read_stream(path).values()]


def saved(out: Path, stage: str = "grpo") -> list[int]:
    return sorted(int(path.name) for path in (out / stage / "checkpoints").iterdir() if path.name.isdecimal())


def test_ctrl_c_anywhere_in_training_loses_nothing(finished, tmp_path, capsys, monkeypatch):
    """Runs of grpo in one folder, each ended by Ctrl-C at another place: in a call, or on the way out of it."""
    for name in ("run.json", "record", "think", "sft"):
        copy = shutil.copytree if (finished / name).is_dir() else shutil.copy
        copy(finished / name, tmp_path / name)

    def press(times):
        for _ in range(times):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def stopped(owner, name, *, presses, after=False):
        original, calls = getattr(owner, name), []

        def patched(*args, **kwargs):
            calls.append(name)
            if len(calls) == 1 and not after:
                press(presses)
            result = original(*args, **kwargs)
            if len(calls) == 1 and after:
                press(presses)
            return result

        # Python's own handling, also where the tests were started in the background, with Ctrl-C ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, patched)
                status, out, err = cacherl(capsys, *arguments("grpo", tmp_path))
        finally:
            signal.signal(signal.SIGINT, before)
        assert (status, out) == (130, "") and "the same command goes on" in err and calls
        return saved(tmp_path)

    orbax = checkpoint.ocp
    writes = {"owner": orbax.AsyncCheckpointer, "name": "save", "after": True}  # a part of the manager's save
    assert stopped(**writes, presses=1) == [1]
    assert stopped(grpo.runner, "run", presses=1) == [1]
    assert stopped(stream.TrajectoryStream, "__call__", presses=1, after=True) == [1]
    begun = tmp_path / "grpo" / "rollouts" / "00001.streamed.jsonl"
    kept = begun.read_text()  # its episodes are not played again
    assert stopped(stream.TrajectoryStream, "__call__", presses=1, after=True) == [1]
    assert kept and begun.read_text().startswith(kept) and len(begun.read_text()) > len(kept)
    assert stopped(grpo.steps, "accumulate", presses=2) == [1]  # between the old state and the new there is none to save
    assert len(begun.read_text().splitlines()) == SMALL["grpo.prompts"] * SMALL["grpo.group"]  # what was played is still there
    assert stopped(orbax.CheckpointManager, "restore", presses=2) == [1]
    assert stopped(grpo.steps, "accumulate", presses=1) == [2]
    assert stopped(**writes, presses=9) == [3]  # begun, so it is finished
    assert cacherl(capsys, *arguments("grpo", tmp_path))[0] == 0
    assert losses(tmp_path, "grpo") == losses(finished, "grpo")
    rollouts = [f"grpo/rollouts/{step:05d}.jsonl" for step in range(3)]
    assert [digests(tmp_path / name) for name in rollouts] == [digests(finished / name) for name in rollouts]


def test_groups_that_teach_nothing_are_replaced_also_in_a_run_that_was_killed(finished, tmp_path, monkeypatch):
    """Of the tasks in their order some are made to teach: the first step replaces one group, the second finds none and makes
    no update, the third replaces one, and there the second run is killed; what it had played is not played again."""
    tasks = [Task.from_json(json.loads(line)) for line in (finished / "record" / "tasks.train.jsonl").read_text().splitlines()]
    order = [task.id for task in groups.tasks_at(tasks, 0, 10, 0)]
    teaching = {order[position] for position in (0, 2, 7, 9)}
    score, keep, kept = grpo.scoring.score_groups, stream.TrajectoryStream.__call__, []

    def planted(tasks, trajectories, *rest):
        advantage_N = [(i - 1.0) * (task.id in teaching) for task in tasks for i in range(SMALL["grpo.group"])]
        return dataclasses.replace(score(tasks, trajectories, *rest), advantage_N=np.array(advantage_N))

    def killed(self, trajectory):
        kept.append((trajectory.task_id, trajectory.sample))
        if len(kept) == 3 * (3 + 4 + 2) + 2:
            raise RuntimeError("killed")
        keep(self, trajectory)

    def run(name):
        for part in ("run.json", "record", "think", "sft"):
            copy = functools.partial(shutil.copytree, dirs_exist_ok=True) if (finished / part).is_dir() else shutil.copy
            copy(finished / part, tmp_path / name / part)
        assert cli.main(arguments("grpo", tmp_path / name, **{"grpo.extra_rounds": 1, "grpo.validate_every": 9})) == 0
        return losses(tmp_path / name, "grpo"), [digests(tmp_path / name / f"grpo/rollouts/{i:05d}.jsonl") for i in range(3)]

    (tmp_path / "straight").mkdir()
    (tmp_path / "killed").mkdir()
    monkeypatch.setattr(grpo.scoring, "score_groups", planted)
    straight = run("straight")
    made = [row for row in straight[0] if "groups" in row]
    assert [tuple(row["groups"].values()) for row in made] == [(3, 1, 2), (4, 4, 2), (3, 1, 2)]  # played, dropped, rounds
    assert [row["advantage_rms"] > 0 for row in made] == ["loss" in row for row in made] == [True, False, True]
    monkeypatch.setattr(stream.TrajectoryStream, "__call__", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run("killed")
    before = set(kept[:-1])
    assert run("killed") == straight
    again = kept[len(before) + 1 :]
    assert len(again) == 2 and not before & set(again)
