"""Batches: every row once an epoch, fixed shapes, addressed by step."""

import numpy as np
import pytest

from cacherl_jax.data.pipeline import EpochBatches, Row, assign_buckets, bucket_lengths, bucketed


def rows_of(lengths):
    return [Row(np.full(n, i + 1, np.int32), np.ones(n, bool), advantage=float(i)) for i, n in enumerate(lengths)]


def test_an_epoch_holds_every_row_once_and_epochs_differ_in_order():
    rows = rows_of([3, 70, 100, 200, 64, 65, 129] * 9)
    batches = EpochBatches(rows, tokens_per_batch=512, seed=1)
    epochs = []
    for epoch in range(2):
        order = []
        for i in range(batches.batches_per_epoch):
            batch = batches.batch(epoch * batches.batches_per_epoch + i)
            for tokens_T, segments_T in zip(batch.tokens_BT, batch.segment_ids_BT, strict=True):
                if segments_T.any():
                    assert set(tokens_T[segments_T == 1]) == {tokens_T[0]} and not tokens_T[segments_T == 0].any()
                    assert (segments_T == 1).sum() == len(rows[tokens_T[0] - 1].tokens_T)
                    order.append(int(tokens_T[0]))
        epochs.append(order)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(1, len(rows) + 1))
    assert epochs[0] != epochs[1]


def test_a_batch_is_named_by_its_step_alone():
    rows = rows_of(range(10, 150))
    one, other = (EpochBatches(rows, tokens_per_batch=512, seed=3) for _ in range(2))
    for step in (0, 1, 50):
        one.batch(step)
    np.testing.assert_array_equal(one.batch(77).tokens_BT, other.batch(77).tokens_BT)


def test_shapes_are_few_and_a_row_too_long_is_refused():
    rows = rows_of(range(1, 384))
    shapes = {batch.tokens_BT.shape for batch, _ in bucketed(rows, bucket_lengths(384), 1024, 1)}
    assert shapes == {(1024 // length, length) for length in (64, 96, 128, 192, 256, 384)}
    split = {batch.tokens_BT.shape for batch, _ in bucketed(rows, bucket_lengths(384), 1024, 4)}
    assert split == {(16, 64), (8, 96), (8, 128), (4, 192), (4, 256), (4, 384)}  # rows divide over 4 ways, and none is left out
    with pytest.raises(ValueError, match="400 tokens exceeds the largest bucket, 384"):
        assign_buckets(np.array([400]), bucket_lengths(384))
