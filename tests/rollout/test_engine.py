"""The engine alone: what it holds equals what the model would, on one device and on many, by few programs."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacherl_jax import mesh as meshes
from cacherl_jax.config import ConfigError, MeshConfig, ModelConfig, RolloutConfig
from cacherl_jax.model import qwen3
from cacherl_jax.rollout import sampling
from cacherl_jax.rollout.engine import Engine, Opening, Read
from cacherl_jax.rollout.sampling import sample

STOPS = (5, 6)
MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=48,
    embedding_range=0.02,
)  # fmt: skip
CONFIG = RolloutConfig(rows=6, context=96, decode_steps=4)
KEY_2 = np.array([7, 9], np.uint32)


@pytest.fixture(scope="module")
def model():
    return qwen3.init(MODEL, jax.random.key(0))


def play(engine, model, reads, copies, openings, dispatches, temperature=1.0):
    """(tokens, logprobs, behavior) of each opened row, after `dispatches` dispatches."""
    model, state = engine.place(model), engine.init()
    state = engine.append(model, state, engine.plan(reads, copies))
    sampled = {row: ([], [], []) for row in openings}
    for i in range(dispatches):
        state, out = engine.decode(model, state, openings if i == 0 else {}, temperature)
        read = engine.read(out)
        for row, parts in sampled.items():
            for part, values in zip(parts, (read.tokens_BN, read.logprobs_BN, read.behavior_BN), strict=True):
                part += values[row, : read.counts_B[row]].tolist()
    return sampled, state


def random_ids(count, seed=0):
    return np.random.default_rng(seed).integers(7, MODEL.vocab_size, count).tolist()


def test_long_reads_come_in_chunks_and_leave_the_cache_of_one_read(model):
    config = RolloutConfig(rows=2, context=1400, decode_steps=1)
    engine = Engine(MODEL, config, STOPS)
    ids = random_ids(1100)
    state = engine.append(engine.place(model), engine.init(), engine.plan([Read(1, 0, ids)], []))
    assert engine.compilations() == 2  # a chunk of 1024 tokens, the other 76 in one of 256
    _, whole = qwen3.extend(model, qwen3.init_cache(MODEL, 1, 1400), jnp.asarray(ids)[None], jnp.array([0]), jnp.array([1100]))
    np.testing.assert_allclose(state.cache.k_LBKSH[:, 1], whole.k_LBKSH[:, 0], atol=1e-5)
    assert not np.asarray(state.cache.k_LBKSH[:, 0]).any()
    with pytest.raises(ValueError, match="row 1: 1300 \\+ 101 tokens exceed the context of 1400"):
        engine.plan([Read(1, 1300, ids[:101])], [])


def test_a_copied_prompt_is_a_read_prompt(model):
    engine, ids = Engine(MODEL, CONFIG, STOPS), random_ids(40)
    turn = Opening(len(ids) - 1, ids[-1], 12, 0, KEY_2)
    read, copied = Read(0, 0, ids[:-1]), [(0, row) for row in range(1, 6)]
    sampled, _ = play(engine, model, [read], copied, dict.fromkeys(range(6), turn), 3)
    apart, _ = play(engine, model, [Read(row, 0, ids[:-1]) for row in range(6)], [], dict.fromkeys(range(6), turn), 3)
    assert sampled == apart and all(sampled[row] == sampled[0] for row in range(6))
    assert len(sampled[0][0]) == 12 or sampled[0][0][-1] in STOPS


def test_turns_keep_their_budget_floor_and_stop_and_both_logprobs(model):
    engine, ids = Engine(MODEL, CONFIG, STOPS), random_ids(20)
    rows = {row: Opening(19, ids[-1], 4 + 7 * row, 9 if row == 5 else 0, np.array([row, 1], np.uint32)) for row in range(6)}
    sampled, state = play(engine, model, [Read(row, 0, ids[:-1]) for row in range(6)], [], rows, 12, temperature=2.0)
    for row, (tokens, logprobs, behavior) in sampled.items():
        stops = [i for i, token in enumerate(tokens) if token in STOPS]
        assert len(tokens) == (stops[0] + 1 if stops else 4 + 7 * row) and all(i >= rows[row].minimum for i in stops)
        held_BT = np.array([ids + tokens + [0] * (CONFIG.context - 20 - len(tokens))])
        hidden_BTD = qwen3.forward(model, held_BT, np.ones_like(held_BT))
        logits_TV = np.asarray(qwen3.logits(model, hidden_BTD[0]), np.float64)[19 : 19 + len(tokens)]
        cut_TV = np.where((np.arange(len(tokens)) < rows[row].minimum)[:, None] & np.isin(np.arange(64), STOPS), -np.inf, logits_TV)
        for found, scores in ((logprobs, logits_TV), (behavior, cut_TV / 2.0)):
            expected = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
            np.testing.assert_allclose(found, expected[np.arange(len(tokens)), tokens], atol=1e-5)
        assert int(state.lengths_B[row]) == 19 + len(tokens) and int(state.pending_B[row]) == tokens[-1]


def test_sampling_follows_the_distribution_and_its_cuts():
    logits_BV = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, axis=0)
    keys_B2 = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (4000, 2), dtype=np.uint32))

    def shares(expected, temperature=1.0, top_p=1.0, top_k=0):
        drawn_B, logprob_B = sample(
            logits_BV, keys_B2, jnp.zeros(4000, jnp.int32), jnp.float32(temperature), top_p=top_p, top_k=top_k
        )
        np.testing.assert_allclose(np.bincount(np.asarray(drawn_B), minlength=4) / 4000, expected, atol=0.03)
        np.testing.assert_allclose(np.exp(logprob_B), np.asarray(expected)[np.asarray(drawn_B)], rtol=1e-5)

    shares([0.5, 0.3, 0.15, 0.05])
    shares([0.625, 0.375, 0, 0], top_k=2)
    shares([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], top_p=0.81)
    shares([1, 0, 0, 0], top_p=0.45)
    shares([1, 0, 0, 0], temperature=0.0)
    squared = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    shares((squared / squared.sum()).tolist(), temperature=0.5)


def test_a_mass_that_rounding_never_reaches_keeps_all_tokens():
    top_p = float(np.nextafter(np.float32(1), np.float32(0)))
    keys_B2 = jnp.asarray(np.arange(16, dtype=np.uint32).reshape(8, 2))
    token_B, logprob_B = sample(jnp.zeros((8, 151_936)), keys_B2, jnp.zeros(8, jnp.int32), jnp.float32(1), top_p=top_p, top_k=0)
    assert len(set(token_B.tolist())) == 8
    np.testing.assert_allclose(logprob_B, -np.log(151_936), rtol=1e-5)


def test_no_draw_takes_a_token_of_no_probability():
    logits_BV = np.full((4000, 700), -np.inf, np.float32)
    allowed = [3, 11, 12, 400, 690]
    logits_BV[:, allowed] = [0.0, -15.0, 1.0, -3.0, 0.5]
    uniform_B = np.linspace(0, np.nextafter(np.float32(1), np.float32(0)), 4000, dtype=np.float32)
    token_B, logprob_B = sampling._inverse_cdf(jnp.asarray(logits_BV), jnp.asarray(uniform_B))
    assert (np.diff(token_B) >= 0).all() and set(token_B.tolist()) == {3, 12, 400, 690}
    expected = np.exp([0.0, 1.0, -3.0, 0.5]) / np.exp([0.0, -15.0, 1.0, -3.0, 0.5]).sum()
    np.testing.assert_allclose(np.bincount(np.asarray(token_B), minlength=700)[[3, 12, 400, 690]] / 4000, expected, atol=1e-3)
    np.testing.assert_allclose(np.exp(np.asarray(logprob_B)[[0, -1]]), expected[[0, -1]], rtol=1e-5)


def test_tp_must_divide_the_devices_of_a_process():
    with pytest.raises(ConfigError, match=r"rollout\.tp=3 does not divide the 1 devices"):
        meshes.rollout_mesh(meshes.make_mesh(MeshConfig(), jax.devices()[:1]), 3)


def test_rows_and_heads_split_over_devices_give_the_same_turns(model):
    """data 2 x tp 2, on simulated devices: shardings as said, the tokens of one device, nothing gathered over rows."""
    engine, ids = Engine(MODEL, CONFIG, STOPS), random_ids(30)
    turns = {row: Opening(29, ids[-1], 9, 0, np.array([row, 3], np.uint32)) for row in range(6)}
    one, _ = play(engine, model, [Read(row, 0, ids[:-1]) for row in range(6)], [], turns, 3)
    program = f"""
import json, sys
import jax, numpy as np
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_engine as t
from cacherl_jax import mesh as meshes
mesh = meshes.rollout_mesh(meshes.make_mesh(t.MeshConfig(fsdp=2, tp=2)), 0)
make = jax.make_mesh  # as on a torus, where it takes devices in an order of its own
jax.make_mesh = lambda *args, devices, **kwargs: make(*args, devices=devices[::-1], **kwargs)
assert meshes.rollout_mesh(mesh, 0).devices.ravel().tolist() == jax.devices()
jax.make_mesh = make
engine, ids = t.Engine(t.MODEL, t.CONFIG, t.STOPS, mesh), t.random_ids(30)
assert (engine.rows, engine.shards) == (12, 2), engine.rows
model = t.qwen3.init(t.MODEL, jax.random.key(0), meshes.make_mesh(t.MeshConfig(fsdp=2, tp=2)))
turns = {{row + 6: t.Opening(29, ids[-1], 9, 0, np.array([row, 3], np.uint32)) for row in range(6)}}
copies = [(6, row) for row in range(7, 12)]
sampled, state = t.play(engine, model, [t.Read(6, 0, ids[:-1])], copies, turns, 3)
shape = state.cache.k_LBKSH.sharding.shard_shape(state.cache.k_LBKSH.shape)
placed = engine.place(model)
text = engine._decode.lower(placed, state, np.zeros((12, 7), np.int32), np.float32(1)).compile().as_text()
print(json.dumps([sampled, shape, placed.layers.query_DA[...].sharding.shard_shape((2, 32, 64)), text]))
"""
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    sampled, cache, query, compiled = json.loads(done.stdout)
    assert cache == [2, 6, 1, 96, 16] and query == [2, 32, 32]
    # Devices of one tp group talk, and gather a number a row and block of tokens. Those of different rows agree on one
    # number, the steps of a dispatch.
    collectives = re.findall(r"= \(?\w+\[([\d,]*)\].* (all-\w+|collective-permute)\(.*replica_groups=(\S+),", compiled)
    assert {shape for shape, _, groups in collectives if groups != "[2,2]<=[4]"} == {""}
    assert {shape for shape, kind, _ in collectives if kind != "all-reduce"} <= {"6,2", "6,64"}
    assert "collective-permute" not in compiled
    for row, (tokens, logprobs, _) in one.items():
        assert sampled[str(row + 6)][0] == tokens
        np.testing.assert_allclose(sampled[str(row + 6)][1], logprobs, atol=1e-5)
