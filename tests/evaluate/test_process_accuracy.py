"""The metric against worked examples, the intervals against scipy."""

import numpy as np
import pytest
from scipy import stats

from cacherl_jax.evaluate.intervals import bootstrap_mean, hierarchical, paired_difference, wilson
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
    for successes, n in ((81, 263), (15, 148), (0, 20), (29, 29)):
        interval = wilson(successes, n)
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


def test_an_interval_over_runs_and_tasks_holds_the_mean_over_runs_not_seen():
    """Runs whose true accuracies vary: tasks alone would give an interval that misses the mean of all runs far too often."""
    rng = np.random.default_rng(0)
    held, blind = 0, 0
    for trial in range(60):
        runs = [(rng.random(300) < p).astype(float) for p in 0.6 + 0.06 * rng.standard_normal(8)]
        over_both = hierarchical(runs, seed=trial, draws=500)
        over_tasks = bootstrap_mean(np.concatenate(runs), draws=500)
        held += over_both.low <= 0.6 <= over_both.high
        blind += over_tasks.low <= 0.6 <= over_tasks.high
        assert over_both.mean == pytest.approx(np.mean([run.mean() for run in runs]))
    assert held >= 50 and blind < held - 5
    assert hierarchical([[1.0, 1.0], [1.0]]).low == 1.0
    with pytest.raises(ValueError, match="at least one"):
        hierarchical([[0.5], []])
