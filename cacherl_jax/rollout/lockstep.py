"""Several processes, one program: each has rows, tools and episodes of its own, and all run the same dispatches.

A collective waits until every process has joined it, so that a process with nothing to read must still take part. Before a
round the processes agree on how many dispatches of each kind it has; those with fewer fill up with empty ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from cacherl_jax.trajectory import Trajectory


def agree(numbers: Sequence[int]) -> list[int]:
    """The largest of each number over all processes. Every process calls this the same number of times."""
    if jax.process_count() == 1:
        return list(numbers)
    return np.asarray(multihost_utils.process_allgather(np.asarray(numbers, np.int32))).max(axis=0).tolist()


def mine(count: int) -> list[int]:
    """Which of `count` episodes this process plays: every n-th, so that groups are shared out evenly."""
    return list(range(jax.process_index(), count, jax.process_count()))


def gather(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """The trajectories of all processes, on each of them, in the order of `mine`'s numbers."""
    if jax.process_count() == 1:
        return list(trajectories)
    text = np.frombuffer(json.dumps([t.to_json() for t in trajectories]).encode(), np.uint8)
    (longest,) = agree([len(text)])
    sent = np.frombuffer(text.tobytes().ljust(longest), np.uint8)
    parts = [[Trajectory.from_json(row) for row in json.loads(part.tobytes())] for part in multihost_utils.process_allgather(sent)]
    total = sum(map(len, parts))
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]
