"""What the rollouts of a step are worth: rewards, advantages, and the metrics that say how they came about."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cacherl_jax.config import Config
from cacherl_jax.reward import answer, process, tier
from cacherl_jax.train import advantages, stops
from cacherl_jax.trajectory import Trajectory
from cacherl_jax.types import Task, ToolSpec


@dataclass(frozen=True, eq=False)
class Scored:
    """The rollouts of one step in group order, with their rewards and advantages, all of length N."""

    trajectories: Sequence[Trajectory]
    answer_N: np.ndarray
    process_N: np.ndarray
    weight_N: np.ndarray
    advantage_N: np.ndarray


def score_groups(
    tasks: Sequence[Task], trajectories: Sequence[Trajectory], specs: Mapping[str, ToolSpec], config: Config
) -> Scored:
    """Rewards and advantages; `trajectories` holds `config.grpo.group` episodes of each task, one task after the other."""
    group, kind = config.grpo.group, config.grpo.advantage
    by_task = [task for task in tasks for _ in range(group)]
    pairs = list(zip(by_task, trajectories, strict=True))
    answer_N = np.array([answer.answer_reward(task, t) for task, t in pairs])
    process_N = np.array([process.process_reward(task, t, specs).total for task, t in pairs])
    weight = tier.paper_weight if kind == "paper" else tier.episode_weight
    weight_N = np.array([weight(t) for t in trajectories])
    shaping_N = stops.shaping(trajectories, config.grpo.stops, config.rollout.max_sampled_tokens)
    advantage_N = np.concatenate(
        [
            advantages.advantages(config.grpo, kind, *(x_N[i : i + group] for x_N in (answer_N, process_N, weight_N, shaping_N)))
            for i in range(0, len(pairs), group)
        ]
    )
    return Scored(trajectories, answer_N, process_N, weight_N, advantage_N)


def rollout_metrics(scored: Scored) -> dict[str, Any]:
    """What the report draws and what warns of a policy that leaves the cache."""
    n = len(scored.trajectories)
    tiers = Counter(o.tier.value for t in scored.trajectories for o in t.observations)
    stops = Counter(t.stop.value for t in scored.trajectories)
    return {
        "reward": float((scored.answer_N + scored.process_N).mean() / 2),
        "answer": float(scored.answer_N.mean()),
        "process": float(scored.process_N.mean()),
        "accuracy": float((scored.process_N >= 1.0).mean()),
        "calls": float(sum(len(t.observations) for t in scored.trajectories) / n),
        "tiers": {k: v / max(1, sum(tiers.values())) for k, v in sorted(tiers.items())},
        "stops": dict(sorted(stops.items())),
        "weight_advantage_cov": float(np.cov(scored.weight_N, scored.advantage_N, bias=True)[0, 1]),
        "sampled_tokens": int(sum(t.sampled_T.sum() for t in scored.trajectories)),
    }


def write_rollouts(path: Path, scored: Scored) -> None:
    """One JSON line an episode: the trajectory, its rewards, weight and advantage. Rewritten whole when a step is redone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = zip(scored.trajectories, scored.answer_N, scored.process_N, scored.weight_N, scored.advantage_N, strict=True)
    with path.open("w") as f:
        for trajectory, a, p, w, advantage in columns:
            rewards = {"answer": float(a), "process": float(p), "weight": float(w), "advantage": float(advantage)}
            f.write(json.dumps(trajectory.to_json() | {"rewards": rewards}) + "\n")
