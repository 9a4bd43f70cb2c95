"""The metric against worked examples, the intervals against scipy."""

import numpy as np
import pytest
from scipy import stats

from cacherl_jax.evaluate.intervals import bootstrap_mean, hierarchical_difference, paired_difference, wilson
from cacherl_jax.evaluate.process_accuracy import evaluate, milestone_share, process_accuracy
from cacherl_jax.trajectory import StopReason, Trajectory
from cacherl_jax.types import Kind, Observation, Task, Tier, ToolCall, ToolResult, ToolSpec

SPECS = {"a": ToolSpec("a", "", {"properties": {"n": {"type": "integer"}}})}
A, B, C, D = (ToolCall.of(name, n=1) for name in "abcd")


def task(*references, family="f", id="t"):
    return Task(id, family, "test", (), (), references or ((),))


@pytest.mark.parametrize(
    ("calls", "reference", "right"),
    [
        ([A, B], (A, B), 1),
        ([ToolCall("a", '{"n":1.0}'), B], (A, B), 1),  # canonical arguments
        ([B, A], (A, B), 0),
        ([A], (A, B), 0),
        ([A, B, B], (A, B), 0),
        ([A, ToolCall("", "<tool_call>{"), B], (A, B), 0),  # malformed calls count
        ([], (), 1),
        ([A], (), 0),
    ],
)
def test_process_accuracy_is_equality_of_calls(calls, reference, right):
    assert process_accuracy(task(reference), calls, SPECS) == right


def test_any_accepted_order_is_right():
    assert process_accuracy(task((A, B), (B, A)), [B, A], SPECS) == 1


def test_milestones_do_not_rewind():
    reference = task((A, B, C))
    assert milestone_share(reference, [A, D, B, C], SPECS) == 1.0
    assert milestone_share(reference, [A, C], SPECS) == 1 / 3  # b uses up all that is left, c included
    assert milestone_share(reference, [B, C], SPECS) == 0.0  # a missed loses everything
    assert milestone_share(reference, [A, B], SPECS) == 2 / 3
    assert milestone_share(task(), [], SPECS) == 1.0 and milestone_share(task(), [A], SPECS) == 0.0


def trajectory(task, calls, tier):
    none = np.zeros(0)
    observations = tuple(Observation(c, ToolResult(""), tier, Kind.RECORDED) for c in calls)
    return Trajectory(task.id, 0, none, none, none, none, (), observations, "x", StopReason.ANSWER, 1)


def test_evaluation_groups_by_family_and_worst_tier():
    tasks = [task((A,), family="one", id="1"), task((A,), family="one", id="2"), task(family="no", id="3")]
    played = [trajectory(tasks[0], [A], Tier.EXACT), trajectory(tasks[1], [B], Tier.MISS), trajectory(tasks[2], [], Tier.EXACT)]
    result = evaluate(tasks, played, SPECS)
    assert result.process.mean == 2 / 3 and result.calls_per_task == 2 / 3 and result.stops == {"answer": 3}
    assert {k: (v.mean, v.n) for k, v in result.families.items()} == {"one": (0.5, 2), "no": (1.0, 1)}
    assert {k: v.mean for k, v in result.worst_tiers.items()} == {"exact": 1.0, "miss": 0.0, "none": 1.0}
    with pytest.raises(ValueError, match="'2'"):
        evaluate(tasks[1:2], played[:1], SPECS)


def test_wilson_against_scipy():
    for successes, n in ((81, 263), (15, 148), (0, 20), (0, 24), (25, 25), (29, 29)):
        interval = wilson(successes, n)
        assert interval.low <= interval.mean <= interval.high
        expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
        assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_bootstrap_covers_as_a_normal_interval_would():
    values = np.random.default_rng(0).normal(0.5, 0.2, 400)
    interval = bootstrap_mean(values.tolist(), seed=1)
    half = 1.96 * values.std() / 20
    assert (interval.low, interval.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.003)
    gain = paired_difference(np.clip(values + 0.1, 0, None), values, seed=0, draws=1000)
    assert gain.low == pytest.approx(0.1, abs=0.01) and gain.high == pytest.approx(0.1, abs=0.01)
    with pytest.raises(ValueError, match="2 and 1"):
        paired_difference([1, 2], [1], seed=0, draws=10)


def test_a_difference_over_runs_knows_both_sources_of_chance():
    rng = np.random.default_rng(0)
    before_RN = rng.random((40, 50))
    after_RN = before_RN + 0.2 + 0.1 * rng.standard_normal((40, 1)) + 0.3 * rng.standard_normal((40, 50))
    found = hierarchical_difference(after_RN.tolist(), before_RN.tolist(), seed=0, draws=600)
    difference_RN = after_RN - before_RN
    error = np.sqrt((difference_RN.mean(axis=1).var() + difference_RN.var(axis=1).mean() / 50) / 40)
    assert found.mean == pytest.approx(difference_RN.mean()) and found.n == 2000
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    uneven = hierarchical_difference([[1.0], [0.0] * 9], [[0.0], [0.0] * 9], seed=0, draws=200)
    assert (uneven.mean, uneven.low, uneven.high) == (0.5, 0.0, 1.0)  # a run is a run, however few its tasks
    for after, before in (([], []), ([[1.0]], [[1.0, 2.0]]), ([[]], [[]]), ([[1.0]], [[1.0], [2.0]])):
        with pytest.raises(ValueError, match=r"pairs of runs|differ in number"):
            hierarchical_difference(after, before, seed=0, draws=10)
