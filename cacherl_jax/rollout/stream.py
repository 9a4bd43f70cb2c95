"""Trajectories on disk as their episodes end, so that a run that was killed goes on without repeating what it finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cacherl_jax.trajectory import Trajectory


def read_stream(path: Path) -> dict[tuple[str, int], Trajectory]:
    """The episodes that a stream holds, by (task id, sample), in the order in which they ended; none where there is no file.

    A last line that a crash cut is left out. Raises ValueError naming file and line for one that is no trajectory, or that
    repeats an episode.
    """
    episodes: dict[tuple[str, int], Trajectory] = {}
    *whole, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(whole, 1):
        try:
            trajectory = Trajectory.from_json(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}:{number} is no trajectory ({type(error).__name__}: {error}); remove the line") from error
        episode = trajectory.task_id, trajectory.sample
        if episode in episodes:
            raise ValueError(f"{path}:{number} repeats sample {episode[1]} of task {episode[0]}; two runs wrote to one file?")
        episodes[episode] = trajectory
    return episodes


class TrajectoryStream:
    """A file of JSON Lines that grows by one line an episode; call it with a trajectory. What it holds stays, but for a last
    line that a crash cut. Each line reaches the operating system before the call returns: it survives the process."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)

    def __call__(self, trajectory: Trajectory) -> None:
        # In ASCII: JSON can spell halves of surrogate pairs, UTF-8 cannot.
        self._file.write(json.dumps(trajectory.to_json()).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TrajectoryStream:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
