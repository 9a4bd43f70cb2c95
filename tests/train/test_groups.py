"""GRPO's choice of tasks, further rounds, and rules on ends of episodes, without a model; whole steps are in test_stages.py."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from cacherl_jax.config import GrpoConfig, StopRules
from cacherl_jax.tools.world import make_tasks
from cacherl_jax.train import stops
from cacherl_jax.train.groups import episodes_of, play_groups, tasks_at
from cacherl_jax.train.scoring import Scored
from cacherl_jax.trajectory import StopReason

TASKS = make_tasks("train", 5, 0)


def test_a_task_that_comes_twice_in_a_step_gets_samples_of_its_own():
    for step in range(5):
        chosen = tasks_at(TASKS, 4 * step, 4, 0)
        episodes = episodes_of(chosen, 3)
        assert [task.id for task, _ in episodes] == [task.id for task in chosen for _ in range(3)]
        assert len({(task.id, sample) for task, sample in episodes}) == len(episodes) == 12
    steps = [Counter(task.id for task in tasks_at(TASKS, 4 * step, 4, 0)) for step in range(5)]
    assert max(max(step.values()) for step in steps) == 2 and sum(steps, Counter()) == {task.id: 4 for task in TASKS}


def played(useful, *, extra_rounds, stops_of=lambda group: StopReason.ANSWER, position=3, rules=None):
    """play_groups with two prompts, where group i has advantages if `useful` says so; and the rounds' episodes."""
    grpo = GrpoConfig(prompts=2, group=2, extra_rounds=extra_rounds, stops=rules or StopRules())
    rounds = []

    def play(episodes):
        begun = sum(map(len, rounds))
        rounds.append([(task.id, sample) for task, sample in episodes])
        return [SimpleNamespace(stop=stops_of((begun + i) // 2)) for i in range(len(episodes))]

    scored = []

    def score(tasks, trajectories):
        """Once for each group, whatever a second time might say."""
        assert len(trajectories) == 2 * len(tasks)
        first = len(scored)
        scored.extend(tasks)
        advantage_N = np.array([x for i in range(first, len(scored)) for x in ((1.0, -1.0) if useful(i) else (0, 0))], float)
        judged = {"asked": len(trajectories), "failures": {"HTTP status 500": 1}}
        return Scored(trajectories, advantage_N, advantage_N, {"reward": advantage_N}, judged)

    return play_groups(TASKS, position, 7, grpo, play, score), rounds


@pytest.mark.parametrize(
    ("useful", "extra_rounds", "sizes", "kept", "dropped"),
    [
        ((0, 0), 0, [2], 2, 0),  # without extra rounds nothing is dropped
        ((1, 1), 3, [2], 2, 0),
        ((1, 0, 1), 3, [2, 1], 2, 1),
        ((0, 0, 1, 0, 0, 1), 3, [2, 2, 1, 1], 2, 4),
        ((0, 1, 0, 1), 1, [2, 1], 1, 2),  # the limit comes first: a smaller update
        ((0, 0, 0, 0), 1, [2, 2], 0, 4),  # or none
    ],
)
def test_groups_without_advantage_are_replaced_by_the_next_tasks(useful, extra_rounds, sizes, kept, dropped):
    made, rounds = played(lambda i: useful[i], extra_rounds=extra_rounds)
    assert [len(r) // 2 for r in rounds] == sizes and made.rounds == len(sizes)
    assert (made.kept, made.dropped) == (kept, dropped)
    assert made.metrics() == {"groups": {"played": sum(sizes), "dropped": dropped, "rounds": len(sizes)}}
    asked = episodes_of(tasks_at(TASKS, 3, made.tasks, 7), 2)
    assert [e for r in rounds for e in r] == [(task.id, sample) for task, sample in asked]
    assert len(set(asked)) == len(asked)  # also where the epoch turns and a task comes again
    expected = [bool(useful[i]) or not extra_rounds for i in range(made.tasks) for _ in range(2)]
    assert made.trained_N.tolist() == expected
    found = made.scored
    assert len(found.trajectories) == len(found.advantage_N) == len(found.components["reward"]) == len(asked)
    assert found.judged == {"asked": len(asked), "failures": {"HTTP status 500": made.rounds}}


CAPS = [s for s in StopReason if s is not StopReason.ANSWER]


@pytest.mark.parametrize("stop", CAPS)
def test_each_end_is_kept_masked_or_penalised_as_its_rule_says(stop):
    trajectories = [SimpleNamespace(stop=s, sampled_T=np.ones(10, bool)) for s in (StopReason.ANSWER, stop, stop)]
    for name in ("keep", "mask", "penalty"):
        rules = replace(StopRules(penalty=0.25), **{stop.value: name})
        assert stops.carries_loss(trajectories, rules).tolist() == [True, *[name != "mask"] * 2]
        assert stops.shaping(trajectories, rules, 10).tolist() == [0.0, *[-0.25 if name == "penalty" else 0.0] * 2]
        assert stops.counts(trajectories, rules) == {
            "masked": {stop.value: 2} if name == "mask" else {},
            "penalised": {stop.value: 2} if name == "penalty" else {},
        }
    # A group of which only masked episodes have an advantage teaches nothing.
    rules = replace(StopRules(), **{stop.value: "mask"})
    made, _ = played(lambda i: True, extra_rounds=1, stops_of=lambda group: stop if group == 0 else StopReason.ANSWER, rules=rules)
    assert (made.kept, made.dropped) == (2, 1) and made.trained_N.tolist() == [False] * 2 + [True] * 4


def test_the_soft_penalty_grows_towards_the_cap():
    """Of 100 tokens the last 40: none at 60, half at 80, all at 100 and at the cap."""
    lengths, ends = (10, 60, 80, 100, 99), [StopReason.ANSWER] * 4 + [StopReason.TOKEN_CAP]
    trajectories = [SimpleNamespace(stop=s, sampled_T=np.ones(n, bool)) for n, s in zip(lengths, ends, strict=True)]
    rules = StopRules(token_cap="penalty", penalty=0.5, soft_tokens=40)
    np.testing.assert_allclose(stops.shaping(trajectories, rules, 100), [0, 0, -0.25, -0.5, -0.5])
