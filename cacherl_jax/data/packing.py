"""Several sequences in each row of a batch, so that all rows have one length and little of it is padding.

A sequence is a segment: it reads no other, its positions start at 0, and nothing predicts its first token. Which lengths
share a row follows from the lengths alone, so that every epoch has as many batches; which sequences of equal length stand
there, and the order of the rows, follow from (seed, epoch).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from cacherl_jax.data.pipeline import Packs, Row, collate_packs, rows_per_batch
from cacherl_jax.types import Batch


def pack(lengths_N: np.ndarray, length: int) -> Packs:
    """The indices of `lengths_N` in packs of at most `length` tokens together.

    Best fit decreasing: from the longest on, each goes into the fullest pack that still holds it. Source: Johnson et al.
    1974, "Worst-case performance bounds for simple one-dimensional packing algorithms": at most 11/9 of the fewest packs, and
    4 more. Raises ValueError if one is longer than `length`.
    """
    if len(lengths_N) and lengths_N.max() > length:
        raise ValueError(f"a sequence of {lengths_N.max()} tokens does not fit into rows of packed_length={length}")
    packs: Packs = []
    room: list[tuple[int, int]] = []  # tokens left in a pack, its index; sorted
    for i in np.argsort(-lengths_N, kind="stable").tolist():
        size = int(lengths_N[i])
        place = bisect.bisect_left(room, (size, 0))
        if place < len(room):
            left, index = room.pop(place)
            packs[index].append(i)
        else:
            left, index = length, len(packs)
            packs.append([i])
        bisect.insort(room, (left - size, index))
    return packs


def packed(rows: Sequence[Row], length: int, tokens_per_batch: int, ways: int) -> list[tuple[Batch, Packs]]:
    """All rows once as batches of one shape, their rows packed to `length`: (batch, which row lies where)."""
    packs = pack(np.array([len(r.tokens_T) for r in rows], int), length)
    count = rows_per_batch(length, tokens_per_batch, ways)
    groups = [packs[i : i + count] for i in range(0, len(packs), count)]
    return [(collate_packs(rows, group, length, count), group) for group in groups]


class PackedBatches:
    """The batches of a run over `rows` packed to `length`, addressed by step as EpochBatches are."""

    def __init__(self, rows: Sequence[Row], length: int, *, tokens_per_batch: int, seed: int, ways: int = 1) -> None:
        if not rows:
            raise ValueError("no rows to train on: every transcript was filtered out or the file is empty")
        self._rows, self._length, self._seed = rows, length, seed
        self.lengths = (length,)
        self._lengths_N = np.array([len(r.tokens_T) for r in rows], int)
        self._count = rows_per_batch(length, tokens_per_batch, ways)
        self._packs = pack(-np.sort(-self._lengths_N), length)  # of ranks: 0 is the longest row
        self.batches_per_epoch = -(-len(self._packs) // self._count)
        self._epoch, self._plan = -1, self._packs

    def _plan_of(self, epoch: int) -> Packs:
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            order_N = rng.permutation(len(self._rows))
            ranked_N = order_N[np.argsort(-self._lengths_N[order_N], kind="stable")]  # equal lengths change places
            packs = [ranked_N[ranks].tolist() for ranks in self._packs]
            self._epoch, self._plan = epoch, [packs[i] for i in rng.permutation(len(packs))]
        return self._plan

    def batch(self, step: int) -> Batch:
        epoch, position = divmod(step, self.batches_per_epoch)
        packs = self._plan_of(epoch)[position * self._count : (position + 1) * self._count]
        return collate_packs(self._rows, packs, self._length, self._count)
