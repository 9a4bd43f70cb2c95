"""Which tasks a step plays, and how many more until enough groups teach something.

Tasks come in one endless order, epochs of permutations, and a run's position in it is how many it has taken. A group whose
episodes all have advantage 0 says nothing: with `grpo.extra_rounds` it is dropped, and the next tasks in the order are
played in its place. Source: dynamic sampling of DAPO, arXiv 2503.14476, section 3.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cacherl_jax import processes
from cacherl_jax.config import GrpoConfig
from cacherl_jax.train import stops
from cacherl_jax.train.scoring import Scored, joined
from cacherl_jax.trajectory import Trajectory
from cacherl_jax.types import Task


def tasks_at(tasks: Sequence[Task], position: int, count: int, seed: int) -> list[Task]:
    """`count` tasks from a position in the order on: epochs of permutations of all tasks, so that resuming needs the position
    alone."""
    chosen: list[Task] = []
    while len(chosen) < count:
        epoch, index = divmod(position + len(chosen), len(tasks))
        order = np.random.default_rng((seed, epoch)).permutation(len(tasks))
        chosen += [tasks[i] for i in order[index : index + count - len(chosen)]]
    return chosen


def episodes_of(tasks: Sequence[Task], group: int) -> list[tuple[Task, int]]:
    """`group` episodes a task, one task after the other. A task that comes twice, at the turn of an epoch, gets further
    samples: an episode is named by task and sample, and its draws follow from them."""
    begun: Counter[str] = Counter()
    episodes = []
    for task in tasks:
        episodes += [(task, begun[task.id] + i) for i in range(group)]
        begun[task.id] += group
    return episodes


@dataclass(frozen=True, eq=False)
class Played:
    """A step's groups, all that were played. trained_N: whether an episode of `scored` goes into the update; groups: kept
    and dropped; rounds: with the first."""

    scored: Scored
    trained_N: np.ndarray
    kept: int
    dropped: int
    rounds: int

    @property
    def tasks(self) -> int:
        """How far the step went on in the order of tasks."""
        return self.kept + self.dropped

    def metrics(self) -> dict[str, Any]:
        return {"groups": {"played": self.tasks, "dropped": self.dropped, "rounds": self.rounds}}


def play_groups(
    tasks: Sequence[Task],
    position: int,
    seed: int,
    grpo: GrpoConfig,
    play: Callable[[Sequence[tuple[Task, int]]], Sequence[Trajectory]],
    score: Callable[[Sequence[Task], Sequence[Trajectory]], Scored],
) -> Played:
    """Plays tasks from `position` on until `grpo.prompts` groups are useful, in at most `grpo.extra_rounds` rounds after the
    first, each of as many tasks as are missing. Without extra rounds every group is kept.

    Every round's episodes are named as if all had been asked for at once, so that rounds change no draw. A group is scored
    once: a judge is paid, and asked again it might find a dropped group useful. Of several processes all find the same groups
    useful.
    """
    chosen: list[Task] = []
    trajectories: list[Trajectory] = []
    scored: list[Scored] = []
    useful: list[int] = []  # of each group, 1 where it goes into the update
    while True:
        more = tasks_at(tasks, position + len(chosen), grpo.prompts - sum(useful), seed)
        chosen += more
        played = play(episodes_of(chosen, grpo.group)[len(trajectories) :])
        trajectories += played
        scored.append(score(more, played))
        teaches_N = stops.carries_loss(played, grpo.stops) & (np.asarray(scored[-1].advantage_N) != 0)
        teaches = teaches_N.reshape(-1, grpo.group).any(axis=1).tolist()
        useful += processes.agree(teaches) if grpo.extra_rounds else [1] * len(more)
        kept = sum(useful)
        if kept == grpo.prompts or len(scored) > grpo.extra_rounds:
            trained_N = stops.carries_loss(trajectories, grpo.stops) & np.repeat(np.array(useful, bool), grpo.group)
            return Played(joined(scored), trained_N, kept, len(chosen) - kept, len(scored))
