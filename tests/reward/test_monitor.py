"""The monitor fires on planted exploitation and is silent over honest steps."""

import json

import numpy as np
import pytest

from cacherl_jax.reward import monitor
from cacherl_jax.train.advantages import calibrated, scalar
from cacherl_jax.trajectory import StopReason, Trajectory
from cacherl_jax.types import Kind, Message, Observation, Task, Tier, ToolCall, ToolResult

TIERS = (Tier.EXACT, Tier.FUZZY, Tier.BEST_EFFORT, None)
WEIGHT = {"calibrated": np.array([1.0, 0.3, 0.1, 1.0]), "paper": np.array([0.6, 0.3, 0.1, 0.6])}


def step(rng, kind, *, bad=0.15, answer=0.6, process=0.9, leaks=0.02, groups=8, size=8):
    """A step of groups whose tasks differ in how often the cache lacks their calls, and in how hard they are. Quality does
    not depend on the tier."""
    lack_P, hard_P = rng.beta(2, 2 / bad - 2, groups), rng.normal(0, 0.15, groups)
    kept_P1 = rng.choice([0, 0, 0, 3], (groups, 1))  # tasks that need no call have no tier
    tier_PG = np.where(rng.random((groups, size)) < lack_P[:, None], rng.integers(1, 3, (groups, size)), kept_P1)
    answer_PG = (rng.random((groups, size)) < answer + hard_P[:, None]).astype(float)
    process_PG = np.clip(rng.normal(process, 0.1, (groups, size)), 0, 1)
    weight_PG = WEIGHT[kind][tier_PG]
    if kind == "paper":
        advantage_PG = [
            scalar(w * a + (1 - w) * p, divide_by_std=True) for a, p, w in zip(answer_PG, process_PG, weight_PG, strict=True)
        ]
        reward_PG = weight_PG * answer_PG + (1 - weight_PG) * process_PG
    else:
        rows = zip(answer_PG, process_PG, weight_PG, strict=True)
        advantage_PG = [calibrated(*row, process_weight=0.5) for row in rows]
        reward_PG = (weight_PG * answer_PG + 0.5 * process_PG) / 1.5
    return monitor.observe(
        [TIERS[t] for t in tier_PG.ravel()], group=size, reward_N=reward_PG.ravel(),
        reference_N=monitor.reference_reward(answer_PG, process_PG).ravel(), weight_N=weight_PG.ravel(),
        advantage_N=np.ravel(advantage_PG), leaked_N=rng.random(groups * size) < leaks,
    )  # fmt: skip


def warned(steps):
    """The names of warnings, with the step of the first of each."""
    seen, found = monitor.Seen(), {}
    for number, made in enumerate(steps):
        seen = monitor.advance(seen, made)
        for text in monitor.warnings(seen):
            found.setdefault(text.split(":")[0], number)
    return found


def honest(run, steps=60):
    """The warnings of a run whose policy stays as it is or, in every other run, gets better at everything."""
    rng, better = np.random.default_rng(run), (run % 2) * np.linspace(0, 0.3, steps)
    return warned(step(rng, "calibrated", answer=0.5 + b, process=0.6 + b, bad=0.2 - b / 3) for b in better)


def test_honest_training_is_not_accused():
    assert [honest(run) for run in range(8)] == [{}] * 8  # of 300 runs: monitor.ERRORS


@pytest.mark.parametrize(
    ("planted", "kind", "change"),
    [
        ("tier_drift", "calibrated", lambda t: {"bad": 0.15 + 0.4 * t}),
        ("miss_pays", "paper", lambda t: {}),
        ("low_weight_pays", "paper", lambda t: {}),
        ("reward_apart", "paper", lambda t: {"bad": 0.1 + 0.7 * t, "answer": 0.6 - 0.3 * t, "process": 0.8 + 0.15 * t}),
        ("leaks", "calibrated", lambda t: {"leaks": 0.4 * t}),
    ],
)
def test_planted_exploitation_is_found(planted, kind, change):
    rng = np.random.default_rng(7)
    assert planted in warned(step(rng, kind, groups=16, **change(t)) for t in np.linspace(0, 1, 30))


def test_drift_against_its_definition_and_its_noise():
    rng = np.random.default_rng(0)
    steps = [step(rng, "calibrated", bad=0.1 + 0.3 * (i >= 5)) for i in range(10)]
    seen = monitor.Seen(tuple(steps[:5]), tuple(steps[5:]))
    shares = [{n: np.mean([s[f"tier/{n}"].mean for s in part]) for n in monitor.WORST} for part in (seen.first, seen.last)]
    moved = monitor.drift(seen)
    assert moved.distance == pytest.approx(sum(abs(shares[0][n] - shares[1][n]) for n in monitor.WORST) / 2)
    bad = [s["fuzzy"] + s["best_effort"] + s["miss"] for s in shares]
    assert moved.to_worse == pytest.approx(bad[1] - bad[0])
    # Without a drift, distances vary about `noise`.
    still = []
    for _ in range(40):
        same = [step(rng, "calibrated") for _ in range(10)]
        still.append(monitor.drift(monitor.Seen(tuple(same[:5]), tuple(same[5:]))))
    assert np.mean([d.distance for d in still]) == pytest.approx(np.mean([d.noise for d in still]), rel=0.2)


def test_a_run_that_goes_on_has_seen_what_it_saw():
    rng, seen, rows = np.random.default_rng(3), monitor.Seen(), []
    for _ in range(8):
        made = step(rng, "paper")
        seen = monitor.advance(seen, made)
        texts = monitor.warnings(seen)
        _, seen = monitor.tell(seen, texts)
        rows.append(json.loads(json.dumps({"loss": 0.0, "monitor": monitor.to_json(made), "warnings": texts})))
        assert set(monitor.by_tier(made)) <= set(monitor.WORST)
    back = monitor.from_rows([{"validation": 0.5}, *rows])
    assert monitor.warnings(back) == monitor.warnings(seen) and monitor.drift(back) == monitor.drift(seen)
    assert back.told == seen.told and monitor.tell(back, monitor.warnings(back))[0] == []
    assert len(back.first) == 5 and len(back.last) == 3


REFERENCE, OTHER = ToolCall.of("get", id="o1"), ToolCall.of("get", id="o2")


@pytest.mark.parametrize(
    ("observed", "said", "asked", "expected"),
    [
        ([(OTHER, Tier.BEST_EFFORT, "blue")], "blue", "?", True),
        ([(OTHER, Tier.FUZZY, "blue")], "it is blue", "?", True),
        ([(REFERENCE, Tier.FUZZY, "blue")], "blue", "?", False),  # the right call
        ([(OTHER, Tier.EXACT, "blue")], "blue", "?", False),  # a true result
        ([(OTHER, Tier.FUZZY, "blue")], "red", "?", False),  # unused
        ([(OTHER, Tier.FUZZY, "blue")], "blue", "blue or red?", False),  # the user said it
        ([(OTHER, Tier.FUZZY, "blue"), (REFERENCE, Tier.EXACT, "blue")], "blue", "?", False),
        ([(OTHER, Tier.FUZZY, "cut: blue")], "blue", "?", False),  # beyond what was read
        ([(OTHER, Tier.FUZZY, "blue"), (REFERENCE, Tier.EXACT, "cut: blue")], "blue", "?", True),
    ],
)
def test_a_leak_is_a_fact_that_only_a_near_miss_gave(observed, said, asked, expected):
    observations = tuple(Observation(c, ToolResult(text), tier, Kind.RECORDED, shown=4) for c, tier, text in observed)
    none = np.zeros(0)
    episode = Trajectory("t", 0, none, none, none, none, (), observations, said, StopReason.ANSWER, 2)
    wanted = Task("t", "f", "train", ("get",), (Message("user", asked),), ((REFERENCE,),), ("blue",))
    assert monitor.leaked(wanted, episode, {}) == expected
