"""Answers by rule, the paper's process reward, true success and what correlates with it."""

import dataclasses

import numpy as np
import pytest

from cacherl_jax.config import Config, ConfigError, with_overrides
from cacherl_jax.reward import answer
from cacherl_jax.reward.process import paper_process_reward, validity
from cacherl_jax.reward.success import correlation, succeeded
from cacherl_jax.reward.tier import WEIGHTS
from cacherl_jax.tools.registry import error_result
from cacherl_jax.trajectory import StopReason, Trajectory
from cacherl_jax.types import Kind, Observation, Task, Tier, ToolCall, ToolResult, ToolSpec

SPECS = {
    name: ToolSpec(name, "", {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}) for name in "abc"
}
A, B = ToolCall.of("a", x=1), ToolCall.of("b", x=2)


def episode(*observations, answer="it is shipped", stop=StopReason.ANSWER, turns=None, leaked=False):
    none = np.zeros(0)
    turns = len(observations) + 1 if turns is None else turns
    return Trajectory("t", 0, none, none, none, none, (), observations, answer, stop, turns, leaked)


def seen(call, tier=Tier.EXACT, text="x"):
    return Observation(call, ToolResult(text), tier, Kind.RECORDED)


def task(*references, facts=("shipped",), tools=("a", "b")):
    return Task("t", "f", "train", tools, (), references or ((A,),), facts)


@pytest.mark.parametrize(
    ("name", "facts", "said", "expected"),
    [
        ("exact", ["New York"], "The new  york.", 1.0),
        ("exact", ["New York"], "in New York", 0.0),
        ("exact", ["o417", "shipped"], "O417: shipped!", 1.0),
        # SQuAD's F1 by hand: 2 common of 3 and 4 words; a repeated word counts once
        ("f1", ["big red house"], "red house on hill", 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)),
        ("f1", ["red"], "red red red", 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("f1", ["red"], "blue", 0.0),
        ("numeric", ["1250"], "It costs $1,250.00 in all.", 1.0),
        ("numeric", ["1250 euros"], "1 250 € then", 1.0),
        ("numeric", ["1250 euros"], "$1,250", 0.0),
        ("numeric", ["1250 euros"], "1250", 1.0),
        ("numeric", ["1.2 million"], "about 1,209,000 people", 1.0),
        ("numeric", ["1.2 million"], "about 1,213,000 people", 0.0),
        ("numeric", ["50 %"], "50 percent", 1.0),
        ("numeric", ["-4"], "it is −4 now", 1.0),
        ("numeric", ["4"], "it is -4 now", 0.0),
        ("numeric", ["17"], "order o17 of 2026-03-17 at 17:17, v17.1.17, a 17th", 0.0),
        ("numeric", ["3", "shipped"], "3 are shipped", 1.0),
        ("numeric", ["3", "7"], "3", 0.5),
        ("numeric", ["12"], "12k", 0.0),
        ("numeric", ["12000"], "12k", 1.0),
    ],
)  # fmt: skip
def test_rules_for_answers(name, facts, said, expected):
    assert answer.rule(name, 0.01)(facts, said) == pytest.approx(expected)


def test_every_rule_needs_an_answer_and_none_pays_a_list():
    everything = " ".join(map(str, range(1000)))
    for name in ("facts", "exact", "f1", "numeric"):
        rule = answer.rule(name, 0.01)
        wanted = task(facts=("417",))
        assert answer.graded(wanted, episode(answer="417"), rule) == 1.0
        assert answer.graded(wanted, episode(answer="417", leaked=True), rule) == 0.0
        assert answer.graded(wanted, episode(answer="417", stop=StopReason.TOKEN_CAP), rule) == 0.0
        assert answer.graded(wanted, episode(answer=everything), rule) < 0.1
        assert answer.graded(task(facts=()), episode(answer="yes"), rule) == 1.0


UNFINISHED = Observation(ToolCall("", ""), error_result("unfinished_thinking", ""), Tier.LOOP, Kind.LIVE)
MALFORMED = seen(ToolCall("", "<tool_call>{"), Tier.LOOP)
OF_SCHEMA = seen(ToolCall.of("a", x="one"), Tier.LOOP)
UNOFFERED = seen(ToolCall.of("c", x=1), Tier.LOOP)


@pytest.mark.parametrize(
    ("made", "names", "arguments", "total"),
    [
        # 0.40 names + 0.10 diversity + 0.10 arguments, then 0.25 for the answer and 0.15 for thinking
        ((seen(A), seen(B)), 1, 1, 1.0),
        ((seen(A), seen(A)), 1, 1, 0.95),
        ((seen(A), MALFORMED), 1 / 2, 1 / 2, 0.2 + 0.05 + 0.05 + 0.4),
        ((seen(A), OF_SCHEMA), 1, 1 / 2, 0.4 + 0.05 + 0.05 + 0.4),
        ((seen(A), UNOFFERED), 1 / 2, 1 / 2, 0.2 + 0.05 + 0.05 + 0.4),
        ((seen(A), UNFINISHED), 1, 1, 0.6 + 0.25 + 0.15 * 2 / 3),
        ((), 1, 1, 0.4),
    ],
)  # fmt: skip
def test_calls_that_could_be_made_and_the_papers_process_reward(made, names, arguments, total):
    shares = validity(task(), episode(*made), SPECS)
    assert (shares.names, shares.arguments) == (names, arguments)
    assert paper_process_reward(task(), episode(*made), SPECS) == pytest.approx(total)


def test_the_papers_process_reward_does_not_know_what_was_asked():
    wrong = episode(seen(ToolCall.of("a", x=99)), seen(ToolCall.of("b", x=98)))
    assert paper_process_reward(task((A, B)), wrong, SPECS) == pytest.approx(1.0)
    assert paper_process_reward(task(()), episode(), SPECS) == pytest.approx(1.0)
    assert paper_process_reward(task(), episode(seen(A), answer=""), SPECS) == pytest.approx(0.75)


def test_true_success_takes_all_calls_in_order_and_all_facts():
    both = task((A, B), facts=("shipped", "o1"))
    good = episode(seen(A), seen(B, Tier.BEST_EFFORT), answer="o1 is shipped")
    assert succeeded(both, good, SPECS)  # by task and calls, whatever the cache served
    for changed in (
        dataclasses.replace(good, observations=(seen(B), seen(A))),
        dataclasses.replace(good, observations=(seen(A), seen(B), seen(B))),
        dataclasses.replace(good, observations=(seen(A), seen(B, Tier.LOOP))),
        dataclasses.replace(good, answer="shipped"),
        dataclasses.replace(good, reasoning_leaked=True),
    ):
        assert not succeeded(both, changed, SPECS)


def test_point_biserial_correlation_against_its_formula():
    rng = np.random.default_rng(0)
    success_N = rng.random(50) < 0.4
    value_N = rng.random(50) + success_N
    ones, zeros = value_N[success_N], value_N[~success_N]
    expected = (ones.mean() - zeros.mean()) / value_N.std() * np.sqrt(len(ones) * len(zeros) / 50**2)
    found = correlation(value_N, success_N)
    assert found["n"] == 50 and found["r"] == pytest.approx(expected)
    for undefined in ((np.ones(5), np.arange(5) % 2), (np.arange(5), np.ones(5)), (np.ones(1), np.ones(1))):
        assert correlation(*undefined) == {"r": None, "n": len(undefined[0])}


def test_weights_of_an_answer_by_the_way_tiers_count():
    made = episode(dataclasses.replace(seen(A, Tier.FUZZY), fidelity=0.5), dataclasses.replace(seen(B), fidelity=0.9))
    assert {name: weight(made) for name, weight in WEIGHTS.items()} == {"none": 0.6, "paper": 0.3, "calibrated": 0.45}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward.tier=worst"], "reward.tier = 'worst'"),
        (["reward.tolerance=-1"], "reward.tolerance = -1"),
        (["reward.answer=judge", "reward.judge.model=m"], "reward.judge.base_url is empty; reward.answer='judge'"),
        (["reward.judge.concurrency=0"], "reward.judge.concurrency = 0"),
    ],
)
def test_rewards_that_cannot_be_computed_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        with_overrides(Config(), overrides)
