"""Engine and runner: the same tokens in any company, logprobs that the trainer agrees with, few programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacherl_jax.config import ModelConfig, RolloutConfig
from cacherl_jax.model import qwen3
from cacherl_jax.rollout import runner
from cacherl_jax.rollout.engine import Engine
from cacherl_jax.rollout.sampling import sample
from cacherl_jax.text import chat
from cacherl_jax.text.tokenizer import train_tokenizer
from cacherl_jax.tools.world import LiveTools, make_tasks, tool_specs
from cacherl_jax.train import losses

SPECS = tool_specs()
TOK = train_tokenizer([t.messages[0].content for t in make_tasks("train", 60, 0)], chat.template_runs(list(SPECS.values())), 500)
CONFIG = RolloutConfig(rows=8, context=192, decode_steps=3, max_turn_tokens=24, max_sampled_tokens=80, max_turns=3)
MODEL = ModelConfig(
    vocab_size=TOK.vocab_size, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=48
)
TASKS = make_tasks("train", 14, 0)


@pytest.fixture(scope="module")
def model():
    return qwen3.init(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def engine():
    return Engine(MODEL, CONFIG, TOK.im_end)


def play(engine, model, episodes, seed=0, config=CONFIG):
    return runner.run(engine, model, TOK, SPECS, episodes, LiveTools("train", 0), config, seed)


def same(a, b):
    return a.tokens_T.tolist() == b.tokens_T.tolist() and a.logprobs_T.tobytes() == b.logprobs_T.tobytes()


@pytest.fixture(scope="module")
def played(engine, model):
    return play(engine, model, [(task, s) for task in TASKS for s in range(2)])


def test_company_and_order_change_nothing(engine, model, played):
    episodes = [(task, s) for task in TASKS for s in range(2)]
    order = np.random.default_rng(0).permutation(len(episodes))
    shuffled = play(engine, model, [episodes[i] for i in order])
    assert all(same(shuffled[k], played[i]) for k, i in enumerate(order))
    alone = [play(engine, model, [episodes[i]])[0] for i in (0, 5, 27)]
    assert all(same(a, played[i]) for a, i in zip(alone, (0, 5, 27), strict=True))
    assert all(same(a, b) for a, b in zip(play(engine, model, episodes), played, strict=True))


def test_samples_and_seeds_differ(engine, model, played):
    assert not same(played[0], played[1])
    assert not same(play(engine, model, [(TASKS[0], 0)], seed=1)[0], played[0])
    greedy = dataclasses.replace(CONFIG, temperature=0.0)
    a, b = play(engine, model, [(TASKS[0], 0), (TASKS[0], 1)], config=greedy)
    assert same(a, b)


def test_sampler_and_trainer_agree_on_every_sampled_token(model, played):
    longest = 0
    for t in played:
        tokens_BT = jnp.asarray(t.tokens_T)[None]
        hidden_BTD = qwen3.forward(model, tokens_BT, jnp.ones_like(tokens_BT))
        logprobs_BT, _ = losses.token_logprobs(hidden_BTD, qwen3.unembedding(model), tokens_BT, chunk=64)
        gap_T = np.abs(np.asarray(logprobs_BT[0]) - t.logprobs_T)[t.sampled_T]
        assert gap_T.max() <= 1e-5
        longest = max(longest, len(t.tokens_T))
    assert longest > 100


def test_budgets_groups_and_lengths_compile_nothing_new(engine, model, played):
    before = engine.compilations()
    for tokens in (5, 9, 24):
        play(
            engine,
            model,
            [(TASKS[2], s) for s in range(5)],
            config=dataclasses.replace(CONFIG, max_turn_tokens=tokens, temperature=0.7),
        )
    assert engine.compilations() == before <= 4


def test_a_floor_on_the_first_turn_holds(engine, model):
    config = dataclasses.replace(CONFIG, min_tokens=(20,))
    for t in play(engine, model, [(task, 0) for task in TASKS], config=config):
        first = next(s for s in t.segments if s.source == "sampled")
        assert first.stop - first.start >= 20
        assert TOK.im_end not in t.tokens_T[first.start : first.start + 20]


def test_a_task_with_an_unknown_tool_is_refused_before_any_sampling(engine, model):
    task = dataclasses.replace(TASKS[0], id="odd", tools=("get_order", "teleport"))
    with pytest.raises(ValueError, match="task odd lists tool 'teleport'"):
        play(engine, model, [(TASKS[1], 0), (task, 0)])


def test_long_injections_are_read_in_chunks(model):
    config = dataclasses.replace(CONFIG, context=640)
    engine = Engine(MODEL, config, TOK.im_end)
    ids = np.random.default_rng(0).integers(0, MODEL.vocab_size, 601).tolist()
    state = engine.append(model, engine.init(), {3: ids}, frozenset({3}))
    assert int(state.lengths_B[3]) == 600 and int(state.pending_B[3]) == ids[-1]
    assert engine.compilations() == 1  # of this engine, whatever others have compiled
    whole = qwen3.init_cache(MODEL, 1, 640)
    _, whole = qwen3.extend(model, whole, jnp.asarray(ids)[None], jnp.array([0]), jnp.array([600]))
    np.testing.assert_allclose(state.cache.k_LBKSH[:, 3], whole.k_LBKSH[:, 0], atol=1e-5)
    with pytest.raises(ValueError, match="exceed the context of 640"):
        engine.append(model, state, {3: ids[:100]}, frozenset())


def test_sampling_follows_the_distribution_and_its_cuts():
    logits_BV = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, axis=0)
    keys_B2 = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (4000, 2), dtype=np.uint32))

    def shares(temperature=1.0, top_p=1.0, top_k=0):
        drawn = sample(logits_BV, keys_B2, jnp.zeros(4000, jnp.int32), jnp.float32(temperature), top_p=top_p, top_k=top_k)
        return np.bincount(np.asarray(drawn), minlength=4) / 4000

    np.testing.assert_allclose(shares(), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.81), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.45), [1, 0, 0, 0])
    np.testing.assert_allclose(shares(temperature=0.0), [1, 0, 0, 0])
    assert shares(temperature=0.5)[0] > 0.65
