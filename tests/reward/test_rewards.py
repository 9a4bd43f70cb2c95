"""Rewards and advantages: graded, not gameable by the cases known, and neutral to the cache's tier."""

import dataclasses

import numpy as np
import pytest

from cacherl_jax.reward.answer import answer_reward, contains
from cacherl_jax.reward.process import match_calls, process_reward
from cacherl_jax.reward.tier import episode_weight, paper_weight
from cacherl_jax.train.advantages import calibrated, scalar
from cacherl_jax.trajectory import StopReason, Trajectory
from cacherl_jax.types import Kind, Observation, Task, Tier, ToolCall, ToolResult

A, B, C = (ToolCall.of(name, x=1, y="z") for name in "abc")
NEAR_B = ToolCall.of("b", x=2, y="z")


def trajectory(answer="", stop=StopReason.ANSWER, observations=(), leaked=False):
    none = np.zeros(0)
    return Trajectory("t", 0, none, none, none, none, (), tuple(observations), answer, stop, 1, leaked)


def task(*facts, references=((),)):
    return Task("t", "f", "train", (), (), references, facts)


def observed(call, tier=Tier.EXACT, fidelity=1.0):
    return Observation(call, ToolResult("x"), tier, Kind.RECORDED, fidelity=fidelity)


def total(calls, reference=(A, B, C)):
    return match_calls(reference, calls, {}, [False] * len(calls)).total


def test_process_reward_orders_episodes_as_a_teacher_would():
    ladder = [(), (A,), (A, B), (A, NEAR_B, C), (A, B, C)]
    values = [total(calls) for calls in ladder]
    assert values == sorted(values) and len(set(values)) == len(values)
    assert values[0] == 0.0 and values[-1] == 1.0
    for worse in ((A, B, C, C), (A, A, B, C), (A, B, C, A, B, C), (A, ToolCall("", "<tool_call>{"), B, C)):
        assert total(worse) < total((A, B))  # a needless call costs more than stopping one call early
    assert total((C, B, A)) == total((A,))  # order counts
    assert total((A,) * 10) < total((A,)) < 1.0  # repeating pays nothing


def test_process_reward_parts_by_hand():
    made = match_calls((A, B), (A, ToolCall.of("b", x=2, q=0)), {}, [False, False])
    assert (made.names, made.parameters, made.values, made.milestones) == (1.0, (1 + 1 / 3) / 2, 0.5, 0.5)
    assert made.total == pytest.approx(0.2 * 1.0 + 0.1 * 2 / 3 + 0.3 * 0.5 + 0.4 * 0.5)
    abstained = process_reward(task(), trajectory(), {})
    assert abstained.total == 1.0 and process_reward(task(), trajectory(observations=[observed(A)]), {}).total == 0.0
    either = task(references=((A, B), (B, A)))
    assert process_reward(either, trajectory(observations=[observed(B), observed(A)]), {}).total == 1.0


def test_facts_are_matched_as_whole_words():
    assert contains("The order is o417.", "o417") and not contains("It is 417.", "17")
    assert contains("costs 1,250.0 euros", "1250") and contains("Day: MONDAY", "monday")
    assert contains("in New York now", "new york") and not contains("York new", "new york")
    assert not contains("anything", "")


def test_answer_reward_needs_an_answer_without_leaks_or_lists():
    wanted = task("o417", "shipped")
    assert answer_reward(wanted, trajectory("o417 was shipped")) == 1.0
    assert answer_reward(wanted, trajectory("o417 is open")) == 0.5
    assert answer_reward(wanted, trajectory("o417 was shipped", leaked=True)) == 0.0
    assert answer_reward(wanted, trajectory("o417 was shipped", StopReason.TURN_CAP)) == 0.0
    assert answer_reward(task(), trajectory("hello")) == 1.0 and answer_reward(task(), trajectory(" ")) == 0.0
    listing = " ".join(f"o{i:03d}" for i in range(1000)) + " shipped"
    assert answer_reward(wanted, trajectory(listing)) < 0.1


def test_episode_weights():
    chain = [observed(A), observed(B, Tier.FUZZY, 0.3), observed(C, Tier.BEST_EFFORT, 0.1)]
    assert episode_weight(trajectory()) == 1.0 and episode_weight(trajectory(observations=chain)) == pytest.approx(0.03)
    assert [paper_weight(trajectory(observations=chain[:n])) for n in range(4)] == [0.6, 0.6, 0.3, 0.1]


def test_calibrated_against_its_formula_and_in_its_limits():
    rng = np.random.default_rng(1)
    for _ in range(200):
        a, p, w = rng.random(6), rng.random(6), rng.choice([0.0, 0.1, 0.3, 1.0], 6)
        w[0] = max(w[0], 0.1)
        expected = [w[i] * (a[i] - sum(w * a) / sum(w)) + 0.5 * (p[i] - sum(p) / 6) for i in range(6)]
        found = calibrated(a, p, w, process_weight=0.5)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        assert abs(found.sum()) < 1e-12
    p, one = np.array([0.2, 0.4]), np.ones(2)
    np.testing.assert_allclose(calibrated(np.array([1.0, 0.0]), p, 0 * one, process_weight=0.5), [-0.05, 0.05])
    better = calibrated(np.array([1.0, 0.5]), 0 * one, one, process_weight=0.5)
    assert better[0] > 0 > better[1]
    equal = np.full(5, 0.1 + 0.2)
    assert not calibrated(equal, equal, rng.random(5), process_weight=0.5).any()
    assert not scalar(equal).any()


def test_trajectories_survive_json():
    made = dataclasses.replace(
        trajectory("é", observations=[observed(A)]),
        tokens_T=np.arange(3, dtype=np.int32), sampled_T=np.array([True, False, True]), logprobs_T=np.float32([0.1, 0, -1e-7]),
        behavior_logprobs_T=np.float32([0.2, 0, -3.5]), seconds=((0.5, 0.25), (1.0, 0.0)),
    )  # fmt: skip
    back = Trajectory.from_json(made.to_json())
    assert back.to_json() == made.to_json()
    np.testing.assert_array_equal(back.logprobs_T, made.logprobs_T)
    np.testing.assert_array_equal(back.behavior_logprobs_T, made.behavior_logprobs_T)
    assert back.seconds == made.seconds


def test_a_digest_names_what_weights_seed_and_snapshot_decide():
    made = trajectory("é", observations=[observed(A)])
    same = dataclasses.replace(made, seconds=((0.5, 0.25),), info={"replay": {}})
    assert same.digest() == made.digest() == Trajectory.from_json(same.to_json()).digest()
    changes = {
        "sample": 1, "tokens_T": np.int32([1]), "logprobs_T": np.float32([1]), "behavior_logprobs_T": np.float32([1]),
        "answer": "e", "turns": 2, "observations": (dataclasses.replace(observed(A), shown=0),),
    }  # fmt: skip
    assert len({made.digest(), *(dataclasses.replace(made, **{name: value}).digest() for name, value in changes.items())}) == 8
