"""What the rollouts of a step are worth: rewards, advantages, and the metrics that say how they came about."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cacherl_jax.config import Config
from cacherl_jax.reward import answer, monitor, process, tier
from cacherl_jax.reward.judge import Judge
from cacherl_jax.reward.success import correlation, succeeded
from cacherl_jax.train import advantages, stops
from cacherl_jax.trajectory import Trajectory
from cacherl_jax.types import Task, Tier, ToolSpec
from cacherl_jax.whole_files import whole_lines

MOST_FAILED = 0.1


@dataclass(frozen=True, eq=False)
class Scored:
    """The rollouts of one step in group order, with their rewards and advantages, all of length N.

    components: what the rewards are made of and what they are held against, by name, each [N] in [0, 1]. "facts",
    "matched" and "reference" are the answer by its facts, the calls by the references and both together, blind to tiers,
    whatever training is paid by; "answer" and "process" what it is paid by, "reward" both together; "success" is 1 for true
    success; "leaked" for an answer that uses a fact which only a near miss gave. judged: requests to the judge and failures
    by reason, empty without one.
    """

    trajectories: Sequence[Trajectory]
    weight_N: np.ndarray
    advantage_N: np.ndarray
    components: Mapping[str, np.ndarray]
    judged: Mapping[str, Any] = field(default_factory=dict)


def score_groups(
    tasks: Sequence[Task],
    trajectories: Sequence[Trajectory],
    specs: Mapping[str, ToolSpec],
    config: Config,
    judge: Judge | None = None,
) -> Scored:
    """Rewards and advantages; `trajectories` holds `config.grpo.group` episodes of each task, one task after the other.

    With `reward.answer` "judge", `judge` grades the answers. Where it fails, the share of the facts stands in; an answer to a
    task without facts is then worth 0, or one that no judge can read would be worth most.
    """
    group, reward = config.grpo.group, config.reward
    pairs = list(zip((task for task in tasks for _ in range(group)), trajectories, strict=True))
    matched = [process.process_reward(task, t, specs) for task, t in pairs]
    valid = [process.validity(task, t, specs) for task, t in pairs]
    facts_N = np.array([answer.answer_reward(task, t) for task, t in pairs])
    answer_N, judged = _answers(pairs, facts_N, config, judge)
    matched_N = np.array([r.total for r in matched])
    process_N = matched_N
    if reward.process == "paper":
        process_N = np.array([process.paper_process_reward(task, t, specs) for task, t in pairs])
    weight_N = np.array([tier.WEIGHTS[reward.tier](t) for t in trajectories])
    parts = {name: np.array([getattr(r, name) for r in matched]) for name in (*process.WEIGHTS, "economy")}
    components = parts | {
        "valid_names": np.array([v.names for v in valid]),
        "valid_arguments": np.array([v.arguments for v in valid]),
        "facts": facts_N,
        "answer": answer_N,
        "process": process_N,
        "matched": matched_N,
        "reward": _training_reward(config, answer_N, process_N, weight_N),
        "reference": monitor.reference_reward(facts_N, matched_N),
        "leaked": np.array([float(monitor.leaked(task, t, specs)) for task, t in pairs]),
        "success": np.array([float(succeeded(task, t, specs)) for task, t in pairs]),
    }
    shaping_N = stops.shaping(trajectories, config.grpo.stops, config.rollout.max_sampled_tokens)
    parts_N = answer_N, process_N, weight_N, shaping_N
    advantage_N = np.concatenate(
        [
            advantages.advantages(config.grpo, reward.tier, *(x_N[i : i + group] for x_N in parts_N))
            for i in range(0, len(pairs), group)
        ]
    )
    return Scored(trajectories, weight_N, advantage_N, components, judged)


def joined(parts: Sequence[Scored]) -> Scored:
    """Several as one: the rounds of a step."""

    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    judged: dict[str, Any] = {}
    for part in parts:
        if part.judged:
            failures = Counter(judged.get("failures", {})) + Counter(part.judged["failures"])
            judged = {"asked": judged.get("asked", 0) + part.judged["asked"], "failures": dict(sorted(failures.items()))}
    return Scored(
        [t for part in parts for t in part.trajectories],
        column("weight_N"),
        column("advantage_N"),
        {name: np.concatenate([part.components[name] for part in parts]) for name in parts[0].components},
        judged,
    )


def _training_reward(config: Config, answer_N: np.ndarray, process_N: np.ndarray, weight_N: np.ndarray) -> np.ndarray:
    """[N] what training maximises as one number in [0, 1]: the paper's mixture, or the calibrated advantage's two terms before
    they are centred, over their greatest sum. Without the penalties of `grpo.stops`, which are no part of an episode's worth."""
    if config.reward.tier != "calibrated":
        return weight_N * answer_N + (1.0 - weight_N) * process_N
    c = config.grpo.process_weight
    return (weight_N * answer_N + c * process_N) / (1.0 + c)


def _answers(
    pairs: Sequence[tuple[Task, Trajectory]], facts_N: np.ndarray, config: Config, judge: Judge | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """answer_N by the configured rule, and what was asked of the judge."""
    if config.reward.answer != "judge":
        rule = answer.rule(config.reward.answer, config.reward.tolerance)
        return np.array([answer.graded(task, t, rule) for task, t in pairs]), {}
    if judge is None:
        raise ValueError("reward.answer='judge' needs a judge; open one with judge.open_judge")
    verdicts = judge.grade(pairs)
    rows = zip(pairs, verdicts.rewards, facts_N, strict=True)
    answer_N = np.array([(f if task.facts else 0.0) if r is None else r for (task, _), r, f in rows])
    return answer_N, {"asked": verdicts.asked, "failures": dict(verdicts.failures)}


def watch(scored: Scored, config: Config, seen: monitor.Seen) -> tuple[dict[str, Any], monitor.Seen, list[str]]:
    """What the monitor says of a step, for its metrics row; what it has seen by now; warnings that it gives for the first
    time."""
    step = monitor.observe(
        [t.worst_tier for t in scored.trajectories], group=config.grpo.group, reward_N=scored.components["reward"],
        reference_N=scored.components["reference"], weight_N=scored.weight_N, advantage_N=scored.advantage_N,
        leaked_N=scored.components["leaked"],
    )  # fmt: skip
    seen = monitor.advance(seen, step)
    warnings = monitor.warnings(seen) + _of_judge(scored.judged)
    news, seen = monitor.tell(seen, warnings)
    row = {"monitor": monitor.to_json(step), "by_tier": monitor.by_tier(step), "drift": dataclasses.asdict(monitor.drift(seen))}
    return row | {"warnings": warnings}, seen, news


def _of_judge(judged: Mapping[str, Any]) -> list[str]:
    """A warning, its name first, where the judge failed on more than MOST_FAILED of what it was asked."""
    asked, failed = judged.get("asked", 0), sum(judged.get("failures", {}).values())
    if failed <= MOST_FAILED * asked:
        return []
    return [f"judge_fails: no verdict on {failed} of {asked} answers, which are paid by the facts they state"]


def rollout_metrics(scored: Scored) -> dict[str, Any]:
    """What the report draws, and every part of the reward with its correlation with true success."""
    n = len(scored.trajectories)
    tiers = Counter(o.tier.value for t in scored.trajectories for o in t.observations)
    stops = Counter(t.stop.value for t in scored.trajectories)
    success_N = scored.components["success"]
    row = {
        "reward": float(scored.components["reward"].mean()),
        "answer": float(scored.components["answer"].mean()),
        "process": float(scored.components["process"].mean()),
        "accuracy": float((scored.components["matched"] >= 1.0).mean()),
        "components": {name: float(values_N.mean()) for name, values_N in scored.components.items()},
        "correlations": {name: correlation(x_N, success_N) for name, x_N in scored.components.items() if name != "success"},
        "calls": float(sum(len(t.observations) for t in scored.trajectories) / n),
        "tiers": {k: v / max(1, sum(tiers.values())) for k, v in sorted(tiers.items())},
        "stops": dict(sorted(stops.items())),
        "sampled_tokens": int(sum(t.sampled_T.sum() for t in scored.trajectories)),
    }
    return row | ({"judge": dict(scored.judged)} if scored.judged else {})


def correlations_of(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """The correlation of each component with true success over all rollouts of files that `write_rollouts` wrote."""
    rows = [json.loads(line)["rewards"]["components"] for path in paths for line in path.read_text().splitlines()]
    columns = {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else ())}
    return {name: correlation(x_N, columns["success"]) for name, x_N in columns.items() if name != "success"}


def live_calls_of(paths: Iterable[Path]) -> int:
    """How many calls live tools answered in the rollouts of files that `write_rollouts` wrote."""
    rows = (json.loads(line) for path in paths for line in path.read_text().splitlines())
    return sum(observation["tier"] == Tier.LIVE for row in rows for observation in row["observations"])


def write_rollouts(path: Path, scored: Scored) -> None:
    """One JSON line an episode: the trajectory, its rewards with their components, weight and advantage. Rewritten whole when
    a step is redone."""
    with whole_lines(path) as write:
        for i, trajectory in enumerate(scored.trajectories):
            parts = {name: float(values_N[i]) for name, values_N in scored.components.items()}
            rewards = {"answer": parts["answer"], "process": parts["process"], "weight": float(scored.weight_N[i])}
            rewards |= {"advantage": float(scored.advantage_N[i]), "components": parts}
            write(trajectory.to_json() | {"rewards": rewards})
