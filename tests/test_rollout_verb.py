"""`cacherl rollout` as a user runs it: the same digests whatever the slots, after an interruption, and from stored episodes."""

import json
import signal

import pytest
from test_stages import SMALL, cacherl

from cacherl_jax import cli
from cacherl_jax.rollout import stream
from cacherl_jax.verbs import rollout as rollout_verb


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder with the stores and tasks of a small world."""
    out = tmp_path_factory.mktemp("recorded")
    sets = [f"--set={name}={json.dumps(value)}" for name, value in SMALL.items()]
    assert cli.main(["record", "--out", str(out), "--json", *sets]) == 0
    return out / "record"


@pytest.fixture
def rollout(recorded, capsys):
    def run(out, *more, status=0, **changes):
        sets = [f"--set={name}={json.dumps(value)}" for name, value in (SMALL | changes).items()]
        files = ["--store", str(recorded / "training.sqlite"), "--tasks", str(recorded / "tasks.validation.jsonl")]
        found, printed, err = cacherl(capsys, "rollout", "--out", str(out), "--json", *files, *sets, *more)
        assert found == status, err
        return json.loads(printed) if status == 0 else err

    return run


def test_digests_counts_and_files(rollout, tmp_path):
    whole = rollout(tmp_path / "a", "--samples", "3", "--seed", "5")
    assert whole["episodes"] == 12 and sum(whole["stop_reasons"].values()) == 12 and whole["compilations"] >= 2
    assert sum(whole["tiers"].values()) > 0 and len(whole["tokens_sha256"]) == 64
    stored = stream.read_stream(tmp_path / "a" / "rollouts" / "trajectories.jsonl")
    assert [sample for _, sample in stored] == [0, 1, 2] * 4 and all(len(t.seconds) == t.turns for t in stored.values())
    again = rollout(tmp_path / "b", "--samples", "3", "--seed", "5", "--slots", "2")
    assert {k: v for k, v in again.items() if k != "compilations"} == {k: v for k, v in whole.items() if k != "compilations"}
    assert rollout(tmp_path / "c", "--samples", "3", "--seed", "6")["tokens_sha256"] != whole["tokens_sha256"]


def test_ctrl_c_then_the_same_command(rollout, tmp_path, monkeypatch):
    whole = rollout(tmp_path / "whole", "--samples", "3")
    original = stream.TrajectoryStream.__call__

    def pressed(self, trajectory):
        original(self, trajectory)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr(stream.TrajectoryStream, "__call__", pressed)
        try:
            err = rollout(tmp_path / "again", "--samples", "3", "--slots", "2", status=130)
        finally:
            signal.signal(signal.SIGINT, before)
    assert "the same command goes on" in err
    kept = (tmp_path / "again" / "rollouts" / "streamed.0.jsonl").read_text().splitlines()
    assert 1 <= len(kept) < 12
    assert rollout(tmp_path / "again", "--samples", "3")["trajectories_sha256"] == whole["trajectories_sha256"]
    lines = (tmp_path / "again" / "rollouts" / "trajectories.jsonl").read_text().splitlines()
    assert set(kept) <= set(lines)  # times included: they were not played again
    assert "made with other settings" in rollout(tmp_path / "again", "--samples", "3", "--seed", "9", status=2)


def test_stored_episodes_go_on_from_a_turn(rollout, tmp_path):
    first = rollout(tmp_path / "a", "--samples", "2")
    path = tmp_path / "a" / "rollouts" / "trajectories.jsonl"
    same = rollout(tmp_path / "same", "--samples", "2", "--replay", str(path))
    assert same["trajectories_sha256"] == first["trajectories_sha256"]
    forked = rollout(tmp_path / "forked", "--samples", "2", "--replay", str(path), "--turns", "1", "--seed", "8")
    assert forked["tokens_sha256"] != first["tokens_sha256"]
    stored = stream.read_stream(path)
    for episode, t in stream.read_stream(tmp_path / "forked" / "rollouts" / "trajectories.jsonl").items():
        sampled = next(s for s in stored[episode].segments if s.source == "sampled")
        assert t.tokens_T[: sampled.stop].tolist() == stored[episode].tokens_T[: sampled.stop].tolist()
        assert t.info["replay"]["of"] == stored[episode].digest() and t.info["replay"]["turns"] == 1
    assert "no entry 00" in rollout(tmp_path / "without", "--without", "00", status=1)


def test_a_run_stopped_before_its_result_plays_nothing_again(rollout, tmp_path, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    folder = tmp_path / "rollouts"
    with monkeypatch.context() as patch:
        patch.setattr(rollout_verb, "summary", stopped)
        rollout(tmp_path, status=130)
    whole = (folder / "trajectories.jsonl").read_text()
    (folder / "trajectories.jsonl.partial").write_text("".join(whole.splitlines(keepends=True)[:2]))  # as a kill leaves it
    result = rollout(tmp_path)
    assert result["episodes"] == 4 and result["compilations"] == 0
    assert (folder / "trajectories.jsonl").read_text() == whole
    assert sorted(path.name for path in folder.iterdir()) == ["done.json", "settings.json", "trajectories.jsonl"]


def test_wrong_input_is_refused_before_a_folder_is_made(rollout, recorded, tmp_path):
    odd = tmp_path / "odd.jsonl"
    odd.write_text((recorded / "tasks.train.jsonl").read_text().replace('"get_order"', '"teleport"'))
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{}\n")
    for args, message in (
        (["--tasks", str(odd)], "lists tool 'teleport', which"),
        (["--tasks", str(broken)], "broken.jsonl:1 is no task: KeyError('id')"),
        (["--replay", str(tmp_path / "absent.jsonl")], "absent.jsonl does not exist"),
        (["--replay", str(broken)], "broken.jsonl:1 is no trajectory"),
        (["--replay", str(broken), "--turns", "-1"], "--turns -1: expected 0 or more"),
        (["--turns", "1"], "no file was given"),
        (["--samples", "0"], "--samples 0: expected 1 or more"),
        (["--set", "tokenizer.vocab_size=300"], "tokenizer.vocab_size"),
    ):
        assert message in rollout(tmp_path / "out", *args, status=2)
        assert not (tmp_path / "out").exists()
