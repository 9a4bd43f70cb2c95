"""The experiment's world is what its README says, and its program runs from end to end."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from cacherl_jax.cache.lookup import CachedTools, record_transcript
from cacherl_jax.cache.store import MemoryStore
from cacherl_jax.config import PAPER_CACHE, Config, GrpoConfig, RewardConfig
from cacherl_jax.reward import monitor
from cacherl_jax.train.scoring import correlations_of, live_calls_of, rollout_metrics, score_groups, watch, write_rollouts
from cacherl_jax.trajectory import StopReason, Trajectory
from cacherl_jax.types import Tier

FOLDER = Path(__file__).parents[2] / "experiments" / "reward_hacking"
GROUP = 3


@pytest.fixture(scope="module")
def world():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield __import__("world")
        for name in ("world", "figure", "random_groups"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def played(world):
    """Tasks, and of each the expert's episode and two of the hasty agent's from the store of the expert's calls."""
    tasks, store = world.tasks("train", 40, 0), MemoryStore()
    for transcript in world.recorded(tasks, ("expert",), 0):
        record_transcript(store, transcript, world.SPECS, "canonical")
    cache = CachedTools(store, world.SPECS, PAPER_CACHE, 0)
    trajectories = []
    for task in tasks:
        for sample, agent in enumerate(("expert", "hasty", "hasty")):
            (call,) = (c for m in world.transcript(task, agent, sample, 0).messages for c in m.tool_calls)
            observed = cache.start(task, sample).execute(call, 0)
            answer = f"Each is {json.loads(observed.result.content)['price']}, together 1."  # the total is beyond the model
            none = np.zeros(0)
            trajectories.append(Trajectory(task.id, sample, none, none, none, none, (), (observed,), answer, StopReason.ANSWER, 2))
    return tasks, trajectories


def test_asking_right_is_exact_and_asking_anything_else_leaves_the_cache(world, played):
    tasks, trajectories = played
    assert [t.worst_tier for t in trajectories[::GROUP]] == [Tier.EXACT] * len(tasks)
    assert {t.worst_tier for i, t in enumerate(trajectories) if i % GROUP} == {Tier.BEST_EFFORT}
    asked = {split: {t.messages[0].content.split()[4] for t in world.tasks(split, 200, 0)} for split in world.SPLITS}
    assert not asked["train"] & asked["test"] and not asked["train"] & asked["validation"]
    for task in tasks[:5]:
        price, total = map(int, task.facts)
        several = int(task.messages[0].content.split()[2])
        live = world.Warehouse(0).start(task, 0).execute(task.references[0][0], 0)
        assert json.loads(live.result.content) == {"price": price} and total == several * price
        assert str(total) in world.transcript(task, "expert", 0, 0).messages[-1].content


def scored(world, played, tier, process="paper"):
    config = Config(reward=RewardConfig(tier=tier, process=process), grpo=GrpoConfig(group=GROUP))
    return score_groups(*played, world.SPECS, config), config


def test_leaving_the_cache_pays_under_the_papers_formula_alone(world, played):
    left_N = np.arange(len(played[1])) % GROUP > 0
    for tier, process, pays in (
        ("paper", "paper", True), ("none", "paper", False), ("calibrated", "paper", False), ("paper", "matched", False),
    ):  # fmt: skip
        made, _ = scored(world, played, tier, process)
        assert (made.advantage_N[left_N].mean() > 0) == pays, (tier, process)
    made, config = scored(world, played, "paper")
    # the formula by hand: a R_answer + (1 - a) R_process, half the facts and everything valid
    np.testing.assert_allclose(made.components["reward"], np.where(left_N, 0.9 + 0.1 * made.components["answer"], 0.6 * 0.5 + 0.4))
    np.testing.assert_allclose(made.components["reference"][~left_N], 0.6 * 0.5 + 0.4)
    seen, told = monitor.Seen(), []
    for _ in range(2 * monitor.STEPS):
        row, seen, news = watch(made, config, seen)
        told += news
    assert {text.split(":")[0] for text in row["warnings"]} == {"miss_pays", "low_weight_pays"}
    assert len(told) == 2 and len(row["warnings"]) == 2  # told once, though every row has them
    assert row["by_tier"]["best_effort"]["share"] == pytest.approx(2 / 3)


def test_falling_out_of_the_cache_earns_nothing_unlike_in_the_paper(world):
    """The experiment's 10,000 random groups, whose quality does not depend on the tier."""
    found = __import__("random_groups").mean_advantages(10_000)
    for way in ("calibrated", "none", "none_divided"):
        assert all(abs(tier["mean"]) < 3 * tier["error"] for tier in found[way].values()), way
    exact, best_effort = found["paper"]["exact"], found["paper"]["best_effort"]
    assert exact["mean"] < -10 * exact["error"] and best_effort["mean"] > 10 * best_effort["error"]


def test_every_component_is_logged_with_its_correlation(world, played, tmp_path):
    made, _ = scored(world, played, "calibrated")
    metrics = json.loads(json.dumps(rollout_metrics(made)))
    assert metrics["correlations"].keys() == metrics["components"].keys() - {"success"}
    assert metrics["correlations"]["process"] == {"r": None, "n": len(played[1])}  # the paper's is 1 for all: it says nothing
    assert metrics["reward"] == metrics["components"]["reward"] != (metrics["answer"] + metrics["process"]) / 2
    assert metrics["components"]["valid_names"] == metrics["components"]["valid_arguments"] == 1.0
    assert metrics["accuracy"] == pytest.approx(1 / 3) and metrics["components"]["success"] == 0.0
    write_rollouts(tmp_path / "rollouts.jsonl", made)
    twice = correlations_of([tmp_path / "rollouts.jsonl"] * 2)
    assert twice.keys() == metrics["correlations"].keys() and twice["process"] == {"r": None, "n": 2 * len(played[1])}
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert live_calls_of([tmp_path / "rollouts.jsonl"]) == 0
    live = world.Warehouse(0).execute(played[0][0].references[0][0], 0)
    with_live = dataclasses.replace(made.trajectories[0], observations=(live, live))
    write_rollouts(tmp_path / "live.jsonl", dataclasses.replace(made, trajectories=[with_live, *made.trajectories[1:]]))
    assert live_calls_of([tmp_path / "live.jsonl"] * 2) == 4
    for name, values_N in made.components.items():
        np.testing.assert_array_equal([line["rewards"]["components"][name] for line in lines], values_N)


def test_the_experiment_runs_and_goes_on(world, tmp_path, monkeypatch, capsys):
    result = tmp_path / "result"
    arguments = ["--smoke", "--seeds", "0", "--arms", "paper", "--out", str(tmp_path / "out"), "--result", str(result)]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    for _ in range(2):
        runpy.run_path(str(FOLDER / "run.py"), run_name="__main__")
        made = json.loads((result / "result.json").read_text())
        assert len(made["seeds"]["0"]["paper"]["steps"]) == 2 and made["seeds"]["0"]["paper"]["live_calls"] == 0
        assert (result / "figure.png").stat().st_size > 10_000 and "| paper's tiers |" in (result / "table.md").read_text()
    assert "grpo: 100%" not in capsys.readouterr().err.split("seed 0:")[1]  # the second time nothing was trained again
