"""Trajectories on disk: what a killed run finished is read back, and nothing else."""

import dataclasses
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from cacherl_jax.rollout.stream import TrajectoryStream, read_stream
from cacherl_jax.trajectory import StopReason, Trajectory


def trajectory(task_id="t", sample=0, answer="né \ud83d\u2028"):
    ids_T, logprobs_T = np.arange(5, dtype=np.int32), np.linspace(-1, 0, 5, dtype=np.float32)
    made = Trajectory(task_id, sample, ids_T, ids_T > 2, logprobs_T, 2 * logprobs_T, (), (), answer, StopReason.ANSWER, 1)
    return dataclasses.replace(made, seconds=((0.5, 0.25),))


def test_what_was_streamed_is_read_back(tmp_path):
    path = tmp_path / "new" / "rollouts.jsonl"
    assert read_stream(path) == {}
    made = [trajectory("b", 1), trajectory("a", 0), trajectory("b", 0)]
    with TrajectoryStream(path) as stream:
        for t in made:
            stream(t)
            assert read_stream(path)[t.task_id, t.sample].digest() == t.digest()  # at once, not when the file is closed
    with TrajectoryStream(path) as stream:
        stream(trajectory("c"))
    found = read_stream(path)
    assert list(found) == [("b", 1), ("a", 0), ("b", 0), ("c", 0)]
    assert [found[t.task_id, t.sample].to_json() for t in made] == [t.to_json() for t in made]


def test_a_last_line_that_a_crash_cut_is_dropped(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    with TrajectoryStream(path) as stream:
        stream(trajectory(sample=0))
        one = path.stat().st_size
        stream(trajectory(sample=1))
    whole = path.read_bytes()
    for size in (one, one + 1, len(whole) - 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert list(read_stream(path)) == [("t", 0)]
        with TrajectoryStream(path) as stream:
            stream(trajectory(sample=1))
        assert path.read_bytes() == whole  # as if it had not been killed


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (b'{"task_id": "t", "sam', "JSONDecodeError"),
        (b'{"task_id": "t"}', "KeyError: 'sample'"),
        (b"[]", "TypeError"),
        (b"", "JSONDecodeError"),
        (b"\xff", "UnicodeDecodeError"),
    ],
)
def test_a_line_broken_in_the_middle_is_named(tmp_path, broken, problem):
    path = tmp_path / "rollouts.jsonl"
    with TrajectoryStream(path) as stream:
        stream(trajectory(sample=0))
        stream(trajectory(sample=1))
    first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([first, broken, second, b""]))
    with pytest.raises(ValueError, match=rf"rollouts.jsonl:2 is no trajectory \({problem}"):
        read_stream(path)
    path.write_bytes(b"\n".join([first, second, first, b""]))
    with pytest.raises(ValueError, match=r"rollouts.jsonl:3 repeats sample 0 of task t"):
        read_stream(path)


def test_a_killed_process_loses_no_finished_episode(tmp_path):
    program = """
        import os, sys
        sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        from test_stream import TrajectoryStream, trajectory
        stream = TrajectoryStream(Path(sys.argv[2]))
        for sample in range(3):
            stream(trajectory(sample=sample))
        os.kill(os.getpid(), 9)
    """
    path = tmp_path / "rollouts.jsonl"
    command = [sys.executable, "-c", textwrap.dedent(program), os.path.dirname(__file__), str(path)]
    assert subprocess.run(command, timeout=120).returncode == -9
    assert list(read_stream(path)) == [("t", 0), ("t", 1), ("t", 2)]
