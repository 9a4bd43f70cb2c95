"""`cacherl rollout` as a user runs it: the same digests whatever the slots, after an interruption, and from stored episodes."""

import json
import signal

import pytest
from test_stages import SMALL, cacherl

from cacherl_jax import cli
from cacherl_jax.rollout import stream


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


def test_what_cannot_be_played_is_refused_with_its_name(rollout, recorded, tmp_path, capsys):
    broken = tmp_path / "tasks.jsonl"
    broken.write_text('{"id": "t"}\n')
    arguments = ["rollout", "--out", str(tmp_path / "o"), "--store", str(recorded / "training.sqlite")]
    assert cacherl(capsys, *arguments, "--tasks", str(broken))[::2] == (
        2, f"cacherl: --tasks {broken}:1 is no task: KeyError('family')\n",
    )  # fmt: skip
    assert "--samples 0: expected 1 or more" in rollout(tmp_path / "o", "--samples", "0", status=2)
    assert "--turns" in rollout(tmp_path / "o", "--turns", "1", status=2)
    assert "tokenizer.vocab_size" in rollout(tmp_path / "o", status=2, **{"tokenizer.vocab_size": 300})
    assert not (tmp_path / "o").exists()
