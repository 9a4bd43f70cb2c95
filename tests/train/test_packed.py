"""Rows packed with several sequences train as the sequences do each in a row of its own."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacherl_jax import metrics
from cacherl_jax.config import Config, GrpoConfig, ModelConfig, OptimizerConfig, SftConfig
from cacherl_jax.data.packing import packed
from cacherl_jax.data.pipeline import Row, collate, taken_apart
from cacherl_jax.model import qwen3
from cacherl_jax.train import sft
from cacherl_jax.train import step as steps

MODEL = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48)
RNG = np.random.default_rng(0)
ROWS = [
    Row(
        RNG.integers(0, 64, n).astype(np.int32), RNG.random(n) < 0.6, float(RNG.normal()), -RNG.random(n), -RNG.random(n),
        -3 - RNG.random(n),
    )
    for n in (5, 60, 64, 70, 33, 90, 100, 17, 128)
]  # fmt: skip
KINDS = {
    "sft": steps.sft_gradients,
    "grpo": partial(steps.grpo_gradients, grpo=GrpoConfig(kl_coef=0.1, ratio="sequence", importance="sequence")),
}


@pytest.fixture(scope="module")
def model():
    return qwen3.init(MODEL, jax.random.key(0))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_separate(model, kind):
    """Loss, every metric and every gradient of an update, and each sequence's logprobs. Of the separate sequences all are in
    one batch, so that accumulation over packed ones is held against the whole at once."""
    first_predicts = [dataclasses.replace(row, mask_T=row.mask_T | (np.arange(len(row.mask_T)) == 0)) for row in ROWS]
    separate = [(collate(first_predicts, 128, len(ROWS)), [[i] for i in range(len(ROWS))])]
    together = packed(first_predicts, 128, 256, 1)
    assert len(together) == 3 and any(len(pack) > 2 for _, packs in together for pack in packs)
    found = []
    for batches in (separate, together):
        on_device = [jax.tree.map(jnp.asarray, batch) for batch, _ in batches]
        gradients, metrics, logprobs = steps.accumulate(KINDS[kind], model, None, on_device)
        by_row = taken_apart(ROWS, [(np.asarray(x), packs) for x, (_, packs) in zip(logprobs, batches, strict=True)])
        found.append((gradients, metrics, by_row))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-4), *found)
    assert all(x_T[0] == 0 and x_T[1:].all() for x_T in found[0][2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_segments_first_token_has_exactly_no_gradient(model, kind):
    rows = [dataclasses.replace(row, mask_T=np.arange(len(row.mask_T)) == 0) for row in ROWS[:3]]
    ((batch, packs),) = packed(rows, 192, 192, 1)
    assert packs == [[2, 1, 0]] and batch.loss_mask_BT.sum() == 3
    batch = jax.tree.map(jnp.asarray, batch)
    gradients, metrics, logprobs_BT = KINDS[kind](model, None, batch, jnp.float32(1))
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradients)) and metrics["loss"] == 0
    assert not logprobs_BT[batch.loss_mask_BT > 0].any()
    with pytest.raises(ValueError, match="no token"):
        steps.accumulate(KINDS[kind], model, None, [batch])


def test_accumulation_holds_one_sum_beside_the_gradients_being_made(model):
    batch, alive = jax.tree.map(jnp.asarray, collate(ROWS[1:2], 64, 1)), []

    def gradients_of(*arguments):
        alive.append(sum(x.nbytes for x in jax.live_arrays() if x.shape == model.embed_VD.shape))
        return steps.sft_gradients(*arguments)

    steps.accumulate(gradients_of, model, None, [batch] * 4)
    assert alive[0] + model.embed_VD.nbytes == alive[1] == alive[2] == alive[3]


@pytest.mark.parametrize(("packed_length", "programs"), [(0, 3), (192, 1)])
def test_a_run_over_ragged_lengths_compiles_a_program_a_bucket_or_one_where_it_packs(tmp_path, packed_length, programs):
    """Lengths of 2 to 128: buckets of 64, 96 and 128."""
    compiled = []

    def listen(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration" and "sft_gradients" in about["fun_name"]:
            compiled.append(about["fun_name"])

    config = Config(
        model=dataclasses.replace(MODEL, num_layers=1, vocab_size=65),  # no other test has compiled for it
        sft=SftConfig(steps=24, tokens_per_batch=256, packed_length=packed_length, optimizer=OptimizerConfig(name="adamw")),
    )
    rng = np.random.default_rng(1)
    rows = [Row(rng.integers(0, 65, n).astype(np.int32), np.ones(n, bool)) for n in rng.integers(2, 129, 60)]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        sft.train(config, rows, tmp_path / "sft", progress=metrics.progress_factory(enabled=False))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == programs
    filled = [row["filled"] for row in metrics.read_metrics(tmp_path / "sft/metrics.jsonl")]
    assert (min(filled) > 0.85) if packed_length else (max(filled) < 0.85)
