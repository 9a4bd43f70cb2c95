"""Several processes, one program: each has rows, tools and episodes of its own, and all run the same dispatches.

A collective waits until every process has joined it, so that a process with nothing to read must still take part. Before a
round the processes agree on how many dispatches of each kind it has; those with fewer fill up with empty ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from cacherl_jax import processes
from cacherl_jax.trajectory import Trajectory


def mine(count: int) -> list[int]:
    """Which of `count` episodes this process plays: every n-th, so that groups are shared out evenly."""
    return list(range(jax.process_index(), count, jax.process_count()))


def gather(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """The trajectories of all processes, on each of them, in the order of `mine`'s numbers."""
    if jax.process_count() == 1:
        return list(trajectories)
    parts = [[Trajectory.from_json(row) for row in rows] for rows in processes.gather([t.to_json() for t in trajectories])]
    total = sum(map(len, parts))
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]
