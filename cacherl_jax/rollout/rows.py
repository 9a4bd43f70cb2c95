"""Which episode lies in which row, and what of it the engine has read.

A row's cache keeps what it was given until the row is refilled, so that the prompt of a group is read once: the others copy
it, or take over a row that still begins with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cacherl_jax.rollout.agent_loop import Episode
from cacherl_jax.rollout.engine import Engine, Opening, Plan, Read
from cacherl_jax.rollout.sampling import turn_key
from cacherl_jax.types import ToolSession


@dataclass
class Row:
    """An episode in a row. `length` tokens are in the cache and `pending` comes next; `inject` is to be read before the
    next turn; `ids`, `logprobs`, `behavior` are the turn sampled so far, which may take `left` more in dispatches to come."""

    index: int
    episode: Episode
    session: ToolSession
    fresh: bool = True
    length: int = 0
    pending: int = 0
    inject: list[int] | None = None
    calling: bool = False
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    behavior: list[float] = field(default_factory=list)
    left: int = 0
    since: float = 0.0  # when the turn was opened, or its calls were made
    seconds: list[tuple[float, float]] = field(default_factory=list)  # a turn: sampling it, waiting for its tools


class Rows:
    """The rows of one process, at most `slots` of them in use."""

    def __init__(self, engine: Engine, slots: int, seed: int) -> None:
        self.used: dict[int, Row] = {}
        self._engine, self._slots, self._seed = engine, slots, seed
        self._begins: dict[int, tuple[int, ...]] = {}  # row -> ids that its cache begins with

    @property
    def free(self) -> bool:
        return len(self.used) < self._slots

    def put(self, row: Row, ids: list[int]) -> None:
        """Places a new episode that begins with `ids`: where these are read already, near to where they are, or anywhere."""
        row.inject, begins = ids, tuple(ids)
        per_shard = self._engine.rows_per_shard
        known = [at for at, held in self._begins.items() if held == begins]
        near = {at // per_shard for at in known}
        free = (at for at in range(self._engine.rows) if at not in self.used)
        at = min(free, key=lambda at: (at not in known, at // per_shard not in near, at))
        self.used[at] = row
        if at not in known:
            self._begins.pop(at, None)

    def open_turns(self) -> tuple[Plan, dict[int, Opening]]:
        """Takes every row's injection: what is to be read and copied for them, and the turns that then open."""
        reads: list[Read] = []
        copies: list[tuple[int, int]] = []
        openings: dict[int, Opening] = {}
        copied: dict[int, tuple[int, ...]] = {}  # not to be copied from in the same round
        for at, row in self.used.items():
            if row.inject is None:
                continue
            ids = row.inject if row.fresh else [row.pending, *row.inject]
            if not row.fresh:
                reads.append(Read(at, row.length, ids[:-1]))
            elif at not in self._begins:
                begins = tuple(ids)
                donor = self._donor(at, begins)
                if donor is None:
                    reads.append(Read(at, 0, ids[:-1]))
                    self._begins[at] = begins
                else:
                    copies.append((donor, at))
                    copied[at] = begins
            row.length, row.pending = row.length + len(ids) - 1, ids[-1]
            row.inject, row.fresh, row.left = None, False, row.episode.budget
            row.ids, row.logprobs, row.behavior = [], [], []
            key_2 = turn_key(self._seed, row.episode.task.id, row.episode.sample, row.episode.turn)
            openings[at] = Opening(row.length, row.pending, row.left, row.episode.minimum, key_2)
        self._begins |= copied
        return self._engine.plan(reads, copies), openings

    def _donor(self, at: int, begins: tuple[int, ...]) -> int | None:
        shard = at // self._engine.rows_per_shard
        same = (d for d, held in self._begins.items() if held == begins and d // self._engine.rows_per_shard == shard)
        return min(same, default=None)


def shared_slots(total: int, rows: int, process: int, processes: int) -> int:
    """Rows that this process may use, of `total` over all (0: no limit). Raises ValueError where one would have none."""
    if not total:
        return rows
    if total < processes:
        raise ValueError(f"{total} slots for {processes} processes: each needs one at least")
    return min(rows, total // processes + (process < total % processes))
