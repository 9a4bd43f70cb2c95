"""From token sequences to batches of a few fixed shapes, in an order that depends on (seed, epoch) alone.

Rows are sorted into length buckets and padded to the bucket's length; a batch holds `tokens_per_batch` tokens, so that
short rows come many at a time. Every batch of every step can be named without having made the earlier ones: resuming
needs the step number and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cacherl_jax.types import Batch


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence. tokens_T int32; mask_T bool, True where the token carries loss. The rest is GRPO's, see Batch."""

    tokens_T: np.ndarray
    mask_T: np.ndarray
    advantage: float = 0.0
    behavior_logprobs_T: np.ndarray | None = None
    ref_logprobs_T: np.ndarray | None = None
    old_logprobs_T: np.ndarray | None = None


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


def collate(rows: Sequence[Row], length: int, count: int) -> Batch:
    """`rows` padded to [count, length]; rows beyond len(rows) and tokens beyond a row have segment id 0 and mask 0."""

    def padded(values: Sequence[np.ndarray | None], dtype: type) -> np.ndarray:
        out_BT = np.zeros((count, length), dtype)
        for b, value_T in enumerate(values):
            if value_T is not None:
                out_BT[b, : len(value_T)] = value_T
        return out_BT

    old = [r.old_logprobs_T for r in rows]
    return Batch(
        tokens_BT=padded([r.tokens_T for r in rows], np.int32),
        loss_mask_BT=padded([r.mask_T for r in rows], np.float32),
        segment_ids_BT=padded([np.ones(len(r.tokens_T)) for r in rows], np.int32),
        advantages_BT=padded([np.full(len(r.tokens_T), r.advantage) for r in rows], np.float32),
        behavior_logprobs_BT=padded([r.behavior_logprobs_T for r in rows], np.float32),
        ref_logprobs_BT=padded([r.ref_logprobs_T for r in rows], np.float32),
        old_logprobs_BT=None if any(old_T is None for old_T in old) else padded(old, np.float32),
    )


def rows_per_batch(length: int, tokens_per_batch: int, ways: int) -> int:
    """Rows of a batch whose rows have `length` tokens: about `tokens_per_batch` tokens, a multiple of the `ways` in which
    the mesh splits rows."""
    return max(1, tokens_per_batch // (length * ways)) * ways


def bucketed(rows: Sequence[Row], buckets: Sequence[int], tokens_per_batch: int, ways: int) -> list[tuple[Batch, list[int]]]:
    """All rows once, in order, as batches of the bucket shapes: (batch, indices of its rows)."""
    index_N = assign_buckets(np.array([len(r.tokens_T) for r in rows], int), buckets)
    out = []
    for bucket, length in enumerate(buckets):
        members = np.flatnonzero(index_N == bucket).tolist()
        count = rows_per_batch(length, tokens_per_batch, ways)
        for start in range(0, len(members), count):
            chosen = members[start : start + count]
            out.append((collate([rows[i] for i in chosen], length, count), chosen))
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
