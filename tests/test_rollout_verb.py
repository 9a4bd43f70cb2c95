"""`cacherl rollout`: what it prints, what it leaves in its folder, and that a run which was stopped goes on."""

import json

import pytest

from cacherl_jax import cli, rollout_verb
from cacherl_jax.rollout.stream import read_stream

SMALL = {
    "data.train_tasks": 6, "data.validation_tasks": 2, "data.test_tasks": 2, "model.hidden_size": 32, "model.num_layers": 2,
    "model.num_heads": 2, "model.num_kv_heads": 1, "model.head_dim": 16, "model.intermediate_size": 48, "rollout.rows": 8,
    "rollout.max_turn_tokens": 24, "rollout.max_sampled_tokens": 60,
}  # fmt: skip
SETS = [f"--set={name}={value}" for name, value in SMALL.items()]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("rollout")
    assert cli.main(["record", "--out", str(out), *SETS]) == 0
    return out / "record"


@pytest.fixture
def rollout(recorded, capsys):
    def run(out, *args, tasks=recorded / "tasks.train.jsonl"):
        inputs = ["--store", str(recorded / "training.sqlite"), "--tasks", str(tasks)]
        status = cli.main(["rollout", "--out", str(out), "--json", *SETS, *inputs, *args])
        captured = capsys.readouterr()
        return status, json.loads(captured.out) if status == 0 else captured.err

    return run


def test_slots_and_a_fork_at_turn_0_leave_the_tokens_as_they_were(rollout, tmp_path):
    status, whole = rollout(tmp_path / "a", "--samples", "2")
    assert status == 0 and whole["episodes"] == sum(whole["stop_reasons"].values()) == 12
    assert {"tokens_sha256", "compilations", "tiers"} <= whole.keys()
    stored = tmp_path / "a" / "rollouts" / "trajectories.jsonl"
    assert len(read_stream(stored)) == 12
    assert rollout(tmp_path / "b", "--samples", "2", "--slots", "1")[1]["tokens_sha256"] == whole["tokens_sha256"]
    forked = rollout(tmp_path / "c", "--samples", "2", "--replay", str(stored), "--turns", "0")[1]
    assert forked["trajectories_sha256"] == whole["trajectories_sha256"]
    assert rollout(tmp_path / "d", "--samples", "2", "--seed", "1")[1]["tokens_sha256"] != whole["tokens_sha256"]


def test_a_run_stopped_before_its_result_plays_nothing_again(rollout, tmp_path, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    folder = tmp_path / "rollouts"
    with monkeypatch.context() as patch:
        patch.setattr(rollout_verb, "summary", stopped)
        assert rollout(tmp_path)[0] == 130
    whole = (folder / "trajectories.jsonl").read_text()
    (folder / "trajectories.jsonl.partial").write_text("".join(whole.splitlines(keepends=True)[:2]))  # as a kill leaves it
    status, result = rollout(tmp_path)
    assert status == 0 and result["episodes"] == 6 and result["compilations"] == 0
    assert (folder / "trajectories.jsonl").read_text() == whole
    assert sorted(path.name for path in folder.iterdir()) == ["done.json", "settings.json", "trajectories.jsonl"]


def test_wrong_input_is_refused_before_a_folder_is_made(rollout, recorded, tmp_path):
    odd = tmp_path / "odd.jsonl"
    odd.write_text((recorded / "tasks.train.jsonl").read_text().replace('"get_order"', '"teleport"'))
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{}\n")
    for args, tasks, message in (
        ([], odd, "lists tool 'teleport', which"),
        ([], broken, "broken.jsonl:1 is no task: KeyError('id')"),
        (["--replay", str(tmp_path / "absent.jsonl")], None, "absent.jsonl does not exist"),
        (["--replay", str(broken)], None, "broken.jsonl:1 is no trajectory"),
        (["--replay", str(broken), "--turns", "-1"], None, "--turns -1: expected 0 or more"),
        (["--turns", "1"], None, "no file was given"),
        (["--samples", "0"], None, "--samples 0: expected 1 or more"),
    ):
        status, err = rollout(tmp_path / "out", *args, **({"tasks": tasks} if tasks else {}))
        assert status == 2 and message in err and not (tmp_path / "out").exists()
