"""The runner: the same tokens in any company, at any pace of tools, after any interruption; rows kept busy; few programs."""

import dataclasses
import itertools
import threading
import time
from unittest import mock

import jax
import numpy as np
import pytest

from cacherl_jax import interrupts
from cacherl_jax.config import ModelConfig, RolloutConfig
from cacherl_jax.data.pipeline import Row, collate
from cacherl_jax.model import qwen3
from cacherl_jax.rollout import runner
from cacherl_jax.rollout.engine import Engine
from cacherl_jax.text import chat
from cacherl_jax.text.tokenizer import train_tokenizer
from cacherl_jax.tools.world import LiveTools, make_tasks, tool_specs
from cacherl_jax.train import step as steps
from cacherl_jax.trajectory import StopReason
from cacherl_jax.types import Kind, Message, Observation, Task, Tier, ToolResult

SPECS = tool_specs()
TOK = train_tokenizer([t.messages[0].content for t in make_tasks("train", 60, 0)], chat.template_runs(list(SPECS.values())), 500)
CONFIG = RolloutConfig(rows=8, context=192, decode_steps=3, max_turn_tokens=24, max_sampled_tokens=80, max_turns=3)
MODEL = ModelConfig(
    vocab_size=TOK.vocab_size, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=48
)
TASKS = make_tasks("train", 14, 0)
EPISODES = [(task, sample) for task in TASKS for sample in range(2)]


@pytest.fixture(scope="module")
def model():
    return qwen3.init(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def engine():
    return Engine(MODEL, CONFIG, [TOK.im_end])


def play(engine, model, episodes=EPISODES, seed=0, config=CONFIG, provider=None, **more):
    return runner.run(engine, model, TOK, SPECS, episodes, provider or LiveTools("train", 0), config, seed, **more)


def digests(trajectories):
    return [t.digest() for t in trajectories]


@pytest.fixture(scope="module")
def played(engine, model):
    return play(engine, model)


def test_company_order_and_slots_change_nothing(engine, model, played):
    order = np.random.default_rng(0).permutation(len(EPISODES))
    shuffled = play(engine, model, [EPISODES[i] for i in order])
    assert digests(shuffled) == [played[i].digest() for i in order]
    for slots in (1, 3):
        config = dataclasses.replace(CONFIG, slots=slots)
        used = []
        assert digests(play(engine, model, EPISODES[:9], config=config, on_dispatch=used.append)) == digests(played[:9])
        assert max(d.used for d in used) == slots
    assert digests(play(engine, model)) == digests(played)


def test_samples_and_seeds_differ(engine, model, played):
    assert played[0].digest() != played[1].digest()
    assert play(engine, model, EPISODES[:1], seed=1)[0].tokens_T.tolist() != played[0].tokens_T.tolist()
    greedy = dataclasses.replace(CONFIG, temperature=0.0)
    a, b = play(engine, model, EPISODES[:2], config=greedy)
    assert a.tokens_T.tolist() == b.tokens_T.tolist() and not a.behavior_logprobs_T.any()


def test_sampler_and_trainer_agree_on_every_sampled_token(model, played):
    rows = [Row(t.tokens_T, t.sampled_T) for t in played]
    logprobs_BT = np.asarray(steps.score(model, collate(rows, CONFIG.context, len(rows))))
    for t, scored_T in zip(played, logprobs_BT, strict=True):
        assert np.abs(scored_T[: len(t.tokens_T)] - t.logprobs_T)[t.sampled_T].max() <= 1e-5
        np.testing.assert_allclose(t.behavior_logprobs_T, t.logprobs_T, atol=1e-5)  # at temperature 1 without cuts
    assert max(len(t.tokens_T) for t in played) > 100


def test_budgets_groups_and_lengths_compile_nothing_new(engine, model, played):
    before = engine.compilations()
    for tokens in (5, 9, 24):
        config = dataclasses.replace(CONFIG, max_turn_tokens=tokens, temperature=0.7, slots=tokens // 2)
        play(engine, model, [(TASKS[2], sample) for sample in range(5)], config=config)
    assert engine.compilations() == before <= 6


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


def test_an_episode_asked_for_twice_is_refused(engine, model):
    with pytest.raises(ValueError, match="sample 0 of task train-00001 is asked for 2 times"):
        play(engine, model, [(TASKS[0], 0), (TASKS[1], 0), (TASKS[1], 0)])


def test_a_group_reads_its_prompt_once(engine, model, monkeypatch):
    read = []
    plan = engine.plan
    monkeypatch.setattr(engine, "plan", lambda reads, copies: read.extend(reads) or plan(reads, copies))
    play(engine, model, [(task, sample) for task in TASKS[:3] for sample in range(6)])
    starts = [r for r in read if r.start == 0]
    assert 3 <= len(starts) < 18 and len({tuple(r.ids) for r in starts}) == 3


# ---- tools that take their time --------------------------------------------------------------------------------------


class Scripted:
    """The tokenizer, but every sampled turn reads as two calls, whatever its length and last token."""

    im_end = mock.ANY

    def __init__(self):
        self.encode, self.encode_parts, self.encode_content = TOK.encode, TOK.encode_parts, TOK.encode_content

    def decode(self, ids):
        return CALLS


CALLS = "</think>" + "".join(
    f'<tool_call>\n{{"name": "get_order", "arguments": {{"order_id": "o-{n}"}}}}\n</tool_call>' for n in (1, 2)
)
ASKING = [Task(f"ask-{i}", "f", "train", ("get_order",), (Message("user", f"Order {i}."),), ((),)) for i in range(7)]
CALLING = [(task, sample) for task in ASKING for sample in range(2)]
STOPS = range(0, MODEL.vocab_size, 12)  # many, so that turns are ragged


class Slow:
    """Answers after a time that a seed draws, or never; from threads."""

    blocking = True

    def __init__(self, seed, longest, stuck=frozenset()):
        self._rng, self._longest, self._stuck = np.random.default_rng(seed), longest, stuck
        self.never, self.asked, self.answered = threading.Event(), threading.Event(), threading.Event()

    def start(self, task, sample):
        self._task = task
        stuck, draw = task.id in self._stuck, lambda: float(self._rng.uniform(0, self._longest))

        class Session:
            def execute(_, call, index):
                self.asked.set()
                self.never.wait(30.0) if stuck else time.sleep(draw())
                self.answered.set()
                return Observation(call, ToolResult(f"{task.id}/{sample}/{index}"), Tier.EXACT, Kind.RECORDED)

        return Session()


@pytest.fixture(scope="module")
def calling(model):
    """Plays episodes of three ragged turns of two calls each."""
    engine = Engine(MODEL, CONFIG, STOPS)

    def run(provider, episodes=None, config=CONFIG, **more):
        return runner.run(engine, model, Scripted(), SPECS, episodes or CALLING, provider, config, 0, **more)

    return run


def test_the_pace_of_tools_changes_nothing(calling):
    fast, slow = calling(Slow(0, 0.0)), calling(Slow(1, 0.02))
    assert digests(fast) == digests(slow) and sum(len(t.observations) for t in fast) > 20
    for t in fast:
        answers = [o.result.content for o in t.observations if o.tier is Tier.EXACT]
        assert answers == [f"{t.task_id}/{t.sample}/{i}" for i in range(len(answers))]
    assert all(len(t.seconds) == t.turns for t in slow) and max(tools for t in slow for _, tools in t.seconds) > 0


def test_rows_that_wait_for_tools_leave_the_others_going(calling):
    provider = Slow(0, 0.0, stuck={"ask-3"})
    ended = []
    config = dataclasses.replace(CONFIG, tool_timeout=3.0)

    def on_done(trajectory):
        ended.append(trajectory.task_id)
        if len(ended) == 12:  # all that are not stuck: these need not wait to the end
            provider.never.set()

    trajectories = calling(provider, config=config, on_done=on_done)
    assert set(ended[:12]) == {f"ask-{i}" for i in (0, 1, 2, 4, 5, 6)} and len(trajectories) == 14


def test_a_tool_that_never_answers_is_a_typed_error(calling):
    provider = Slow(0, 0.0, stuck={"ask-0"})
    config = dataclasses.replace(CONFIG, tool_timeout=0.05)
    (trajectory,) = calling(provider, [(ASKING[0], 0)], config=config)
    provider.never.set()
    assert {o.result.error for o in trajectory.observations} == {"timeout"} and trajectory.stop is not StopReason.TOOL_FAILURE


def test_ctrl_c_does_not_wait_for_a_tool(calling, monkeypatch):
    provider = Slow(0, 0.0, stuck={"ask-0"})
    looks = itertools.count()
    monkeypatch.setattr(interrupts, "pending", lambda: provider.asked.is_set() and next(looks) > 5)  # when nothing else is left
    with pytest.raises(interrupts.Interrupted):
        calling(provider, [(ASKING[0], 0)])
    assert not provider.answered.is_set()
    provider.never.set()


# ---- resuming --------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_without_repeating_episodes(engine, model, played):
    ended = []

    def stop(trajectory):
        ended.append(trajectory)
        if len(ended) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(engine, model, on_done=stop)
    again = []
    assert digests(play(engine, model, finished=ended, on_done=again.append)) == digests(played)
    assert len(again) == len(EPISODES) - 9
