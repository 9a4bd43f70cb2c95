"""What an episode is worth: rules for its calls and its answer, and how far the cache's tiers count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cacherl_jax.config.basics import REPLY_PARTS, EndpointConfig, Positive, Rate, parts, require


@dataclass(frozen=True)
class JudgeConfig(EndpointConfig):
    """An endpoint that grades answers by the rubric of reward/rubric.py."""

    concurrency: Positive = 8  # answers graded at a time


@dataclass(frozen=True)
class RewardConfig:
    """The reward (rooms: reward/). The advantage that follows from it is grpo's."""

    tier: Literal["none", "paper", "calibrated"] = "calibrated"  # the answer's weight: constant, by worst tier, by fidelities
    process: Literal["matched", "paper"] = "matched"  # calls against the references, or the paper's rule, which has none
    answer: Literal["facts", "exact", "f1", "numeric", "judge"] = "facts"
    tolerance: Rate = 0.01  # relative, of answer="numeric"
    judge: JudgeConfig = JudgeConfig()  # for answer="judge"

    def __post_init__(self) -> None:
        if self.answer == "judge":
            for name in ("base_url", "model"):
                require(
                    bool(getattr(self.judge, name)),
                    f"reward.judge.{name} is empty; reward.answer='judge' asks an endpoint that it names",
                )


REWARD_PARTS = parts("reward", RewardConfig, judge=REPLY_PARTS)  # what decides rewards
