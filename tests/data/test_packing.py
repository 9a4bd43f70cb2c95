"""Packing: every row once an epoch in rows of one length, little padding, addressed by step, taken apart again."""

import numpy as np
import pytest

from cacherl_jax.data.packing import PackedBatches, pack, packed
from cacherl_jax.data.pipeline import Row, taken_apart


def rows_of(lengths):
    return [Row(np.full(n, i + 1, np.int32), np.arange(n) % 2 == 0, advantage=float(i)) for i, n in enumerate(lengths)]


LENGTHS = np.random.default_rng(0).integers(5, 80, 200)


def test_packs_hold_everything_once_within_the_length_and_nearly_as_few_as_can_be():
    packs = pack(LENGTHS, 128)
    assert sorted(i for p in packs for i in p) == list(range(200))
    assert max(sum(LENGTHS[i] for i in p) for p in packs) <= 128
    fewest = -(-LENGTHS.sum() // 128)
    assert fewest <= len(packs) <= 1.05 * fewest
    assert pack(np.array([4, 5, 3, 6, 2]), 10) == [[3, 0], [1, 2, 4]]  # best fit, by hand
    with pytest.raises(ValueError, match="129 tokens does not fit into rows of packed_length=128"):
        pack(np.array([3, 129]), 128)


def test_an_epoch_holds_every_row_once_in_segments_and_epochs_differ():
    rows = rows_of(LENGTHS)
    batches = PackedBatches(rows, 128, tokens_per_batch=512, seed=1, ways=2)
    epochs, tokens = [], 0
    for epoch in range(2):
        order = []
        for i in range(batches.batches_per_epoch):
            batch = batches.batch(epoch * batches.batches_per_epoch + i)
            assert batch.tokens_BT.shape == (4, 128)
            tokens += batch.tokens_BT.size
            for b in range(4):
                for segment in range(1, batch.segment_ids_BT[b].max() + 1):
                    (at_N,) = np.nonzero(batch.segment_ids_BT[b] == segment)
                    index = batch.tokens_BT[b, at_N[0]] - 1
                    row = rows[index]
                    assert np.array_equal(at_N, at_N[0] + np.arange(len(row.tokens_T)))
                    np.testing.assert_array_equal(batch.tokens_BT[b, at_N], row.tokens_T)
                    np.testing.assert_array_equal(batch.loss_mask_BT[b, at_N], row.mask_T)
                    assert (batch.advantages_BT[b, at_N] == row.advantage).all()
                    order.append(index)
                assert not batch.loss_mask_BT[b, batch.segment_ids_BT[b] == 0].any()
        assert sorted(order) == list(range(200))
        epochs.append(order)
    assert epochs[0] != epochs[1]
    assert 2 * LENGTHS.sum() / tokens > 0.95  # the rest is padding


def test_a_batch_is_named_by_its_step_alone():
    one, other, reseeded = (PackedBatches(rows_of(LENGTHS), 128, tokens_per_batch=512, seed=s) for s in (3, 3, 4))
    for step in (0, 1, 50):
        one.batch(step)
    np.testing.assert_array_equal(one.batch(77).tokens_BT, other.batch(77).tokens_BT)
    assert not np.array_equal(one.batch(77).tokens_BT, reseeded.batch(77).tokens_BT)


def test_what_is_computed_of_packed_rows_comes_back_by_row():
    rows = rows_of(LENGTHS)
    batches = packed(rows, 128, 512, 2)
    assert {batch.tokens_BT.shape for batch, _ in batches} == {(4, 128)}
    found = taken_apart(rows, [(batch.tokens_BT, packs) for batch, packs in batches])
    for row, tokens_T in zip(rows, found, strict=True):
        np.testing.assert_array_equal(tokens_T, row.tokens_T)
