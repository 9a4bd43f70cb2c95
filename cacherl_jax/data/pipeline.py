"""From token sequences to batches of a few fixed shapes, in an order that depends on (seed, epoch) alone.

Rows are sorted into length buckets and padded to the bucket's length; packing.py puts several into one row of a batch
instead. A batch holds `tokens_per_batch` tokens, so that short rows come many at a time. Every batch of every step can be
named without having made the earlier ones: resuming needs the step number and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cacherl_jax.types import Batch


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence. tokens_T int32; mask_T bool, True where the token carries loss. The rest is GRPO's, see Batch; loss_weight
    is that of all its tokens that carry loss."""

    tokens_T: np.ndarray
    mask_T: np.ndarray
    advantage: float = 0.0
    behavior_logprobs_T: np.ndarray | None = None
    ref_logprobs_T: np.ndarray | None = None
    old_logprobs_T: np.ndarray | None = None
    loss_weight: float = 1.0


def bucket_lengths(longest: int, shortest: int = 64) -> tuple[int, ...]:
    """Powers of two and their one-and-a-halves, from `shortest` until one holds `longest` tokens: 64, 96, 128, 192, ..."""
    lengths = [shortest]
    while lengths[-1] < longest:
        top = lengths[-1]
        lengths.append(top * 3 // 2 if top & (top - 1) == 0 else top * 4 // 3)
    return tuple(lengths)


def assign_buckets(lengths_N: np.ndarray, buckets: Sequence[int]) -> np.ndarray:
    """The index of the smallest bucket that holds each length. Raises ValueError if one fits none."""
    index_N = np.searchsorted(np.asarray(buckets), lengths_N, side="left")
    if len(lengths_N) and int(index_N.max()) >= len(buckets):
        raise ValueError(f"a row of {int(lengths_N.max())} tokens exceeds the largest bucket, {buckets[-1]}")
    return index_N


Packs = list[list[int]]  # of each row of a batch, the indices of the sequences in it, one behind the other


def collate(rows: Sequence[Row], length: int, count: int) -> Batch:
    """`rows` padded to [count, length]; rows beyond len(rows) and tokens beyond a row have segment id 0 and mask 0."""
    return collate_packs(rows, [[i] for i in range(len(rows))], length, count)


def collate_packs(rows: Sequence[Row], packs: Packs, length: int, count: int) -> Batch:
    """As `collate`, with several of `rows` in each row of the batch: segments 1, 2, ... in the order of its pack."""

    def filled(dtype: type, values_of: Callable[[Row, int], np.ndarray | float | None]) -> np.ndarray:
        out_BT = np.zeros((count, length), dtype)
        for b, pack in enumerate(packs):
            start = 0
            for segment, i in enumerate(pack, 1):
                stop = start + len(rows[i].tokens_T)
                values = values_of(rows[i], segment)
                if values is not None:
                    out_BT[b, start:stop] = values
                start = stop
        return out_BT

    scored = all(rows[i].old_logprobs_T is not None for pack in packs for i in pack)
    return Batch(
        tokens_BT=filled(np.int32, lambda row, _: row.tokens_T),
        loss_mask_BT=filled(np.float32, lambda row, _: row.mask_T * np.float32(row.loss_weight)),
        segment_ids_BT=filled(np.int32, lambda _, segment: segment),
        advantages_BT=filled(np.float32, lambda row, _: row.advantage),
        behavior_logprobs_BT=filled(np.float32, lambda row, _: row.behavior_logprobs_T),
        ref_logprobs_BT=filled(np.float32, lambda row, _: row.ref_logprobs_T),
        old_logprobs_BT=filled(np.float32, lambda row, _: row.old_logprobs_T) if scored else None,
    )


def taken_apart(rows: Sequence[Row], batches: Iterable[tuple[np.ndarray, Packs]]) -> list[np.ndarray]:
    """The values of each of `rows`, [T], from arrays [B, T] that lie as the batches of all of them do."""
    out: dict[int, np.ndarray] = {}
    for values_BT, packs in batches:
        for values_T, pack in zip(values_BT, packs, strict=False):  # the batch may have empty rows below
            stops = np.cumsum([len(rows[i].tokens_T) for i in pack])
            out |= dict(zip(pack, np.split(values_T[: stops[-1]], stops[:-1]), strict=True))
    return [out[i] for i in range(len(rows))]


def rows_per_batch(length: int, tokens_per_batch: int, ways: int) -> int:
    """Rows of a batch whose rows have `length` tokens: about `tokens_per_batch` tokens, a multiple of the `ways` in which
    the mesh splits rows."""
    return max(1, tokens_per_batch // (length * ways)) * ways


def bucketed(rows: Sequence[Row], buckets: Sequence[int], tokens_per_batch: int, ways: int) -> list[tuple[Batch, Packs]]:
    """All rows once, in order, as batches of the bucket shapes: (batch, which row lies where)."""
    index_N = assign_buckets(np.array([len(r.tokens_T) for r in rows], int), buckets)
    out = []
    for bucket, length in enumerate(buckets):
        members = np.flatnonzero(index_N == bucket).tolist()
        count = rows_per_batch(length, tokens_per_batch, ways)
        for start in range(0, len(members), count):
            packs = [[i] for i in members[start : start + count]]
            out.append((collate_packs(rows, packs, length, count), packs))
    return out


class EpochBatches:
    """The batches of a run over `rows`, addressed by step. Epochs differ in order; the number of batches does not."""

    def __init__(self, rows: Sequence[Row], *, tokens_per_batch: int, seed: int, ways: int = 1) -> None:
        if not rows:
            raise ValueError("no rows to train on: every transcript was filtered out or the file is empty")
        self._rows, self._seed = rows, seed
        lengths_N = np.array([len(r.tokens_T) for r in rows], int)
        self._buckets = bucket_lengths(int(lengths_N.max()))
        self._index_N = assign_buckets(lengths_N, self._buckets)
        self._counts = [rows_per_batch(length, tokens_per_batch, ways) for length in self._buckets]
        members = np.bincount(self._index_N, minlength=len(self._buckets))
        self.lengths = tuple(length for length, m in zip(self._buckets, members, strict=True) if m)  # of the batches' rows
        self.batches_per_epoch = int(sum(-(-m // c) for m, c in zip(members, self._counts, strict=True)))
        self._epoch, self._plan = -1, []

    def _plan_of(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            order_N = rng.permutation(len(self._rows))
            plan = []
            for bucket, count in enumerate(self._counts):
                members = order_N[self._index_N[order_N] == bucket]
                plan += [(bucket, members[i : i + count]) for i in range(0, len(members), count)]
            self._epoch, self._plan = epoch, [plan[i] for i in rng.permutation(len(plan))]
        return self._plan

    def batch(self, step: int) -> Batch:
        epoch, position = divmod(step, self.batches_per_epoch)
        bucket, chosen = self._plan_of(epoch)[position]
        return collate([self._rows[i] for i in chosen], self._buckets[bucket], self._counts[bucket])
