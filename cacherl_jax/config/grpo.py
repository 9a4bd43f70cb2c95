"""GRPO: what is played, what an episode is worth, what is minimised, and what is watched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pydantic

from cacherl_jax.config.basics import Count, Positive, PositiveRate, Rate, Share, require
from cacherl_jax.config.model import LoraConfig
from cacherl_jax.config.training import OptimizerConfig

Rule = Literal["keep", "mask", "penalty"]


@dataclass(frozen=True)
class StopRules:
    """What an episode that ended without an answer is used for, by how it ended (trajectory.StopReason).

    keep: as any other. mask: it carries no loss, and stays in its group's baseline. penalty: `penalty` is taken off its
    reward.
    """

    turn_cap: Rule = "keep"
    token_cap: Rule = "keep"
    context_full: Rule = "keep"
    turn_truncated: Rule = "keep"
    void_turn: Rule = "keep"
    tool_failure: Rule = "keep"
    penalty: Rate = 0.5
    soft_tokens: Count = 0  # the penalty begins so many sampled tokens below rollout.max_sampled_tokens, and grows evenly

    def __post_init__(self) -> None:
        require(
            not self.soft_tokens or self.token_cap == "penalty",
            f"grpo.stops.soft_tokens={self.soft_tokens} softens the penalty of the token cap, but grpo.stops.token_cap is "
            f"{self.token_cap!r}; set it to 'penalty'",
        )


@dataclass(frozen=True)
class WatchConfig:
    """When a row of metrics warns. The run's first `steps` steps are what later ones are compared with."""

    steps: Positive = 3
    entropy: Share = 0.3  # a share of the first steps' entropy, below which the policy has collapsed
    think: Annotated[float, pydantic.Field(gt=1, allow_inf_nan=False)] = 2.0  # thinking so many times longer or shorter


@dataclass(frozen=True)
class GrpoConfig:
    steps: Positive = 20
    tools: Literal["cache", "live"] = "cache"  # live: the control, for corpora whose tools can be run
    prompts: Positive = 8
    group: Positive = 16
    extra_rounds: Count = 0  # groups without any advantage are dropped, others played in so many rounds; 0: none is dropped
    stops: StopRules = StopRules()

    process_weight: Rate = 0.5  # c of the advantage under reward.tier="calibrated"
    baseline: Literal["mean", "leave_one_out"] = "mean"  # of the group, or of its other episodes
    divide_by_std: bool = False  # advantages are then of size 1, otherwise of the rewards' spread: kl_coef weighs accordingly

    ratio: Literal["token", "sequence"] = "token"  # of new to old policy: a token's, or its episode's geometric mean
    clip_low: Share = 0.2
    clip_high: Rate = 0.2
    kl: Literal["k1_in_reward", "k2", "k3"] = "k3"  # the estimator; k1 is taken off the advantage, the others are in the loss
    kl_coef: Rate = 0.02  # beta: how much advantage a nat is worth
    aggregation: Literal["token_mean", "sequence_mean", "token_budget"] = "token_mean"  # budget: sums over a constant
    importance: Literal["token", "sequence", "none"] = "token"  # of trainer's over sampler's probability, a policy term's weight
    importance_cap: PositiveRate = 2.0
    beyond_cap: Literal["truncate", "mask"] = "truncate"  # mask: no policy term where the weight leaves [1 / cap, cap]

    minibatches: Positive = 1  # optimizer steps a batch of rollouts
    tokens_per_batch: Positive = 2048
    packed_length: Count = 0  # as in SftConfig
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-3, adam_learning_rate=3e-4, warmup_steps=2, schedule="constant")
    checkpoint_every: Positive = 5
    validate_every: Positive = 5
    watch: WatchConfig = WatchConfig()

    def __post_init__(self) -> None:
        require(
            self.minibatches <= self.prompts * self.group,
            f"grpo.minibatches={self.minibatches} is above grpo.prompts x grpo.group = {self.prompts * self.group} episodes",
        )
        require(
            self.group > 1 or self.baseline == "mean",
            f"grpo.baseline={self.baseline!r} needs other episodes of the task, but grpo.group is {self.group}",
        )
        require(
            self.beyond_cap == "truncate" or (self.importance != "none" and self.importance_cap >= 1),
            f"grpo.beyond_cap={self.beyond_cap!r} needs weights and a cap of at least 1, but grpo.importance is "
            f"{self.importance!r} and grpo.importance_cap {self.importance_cap}",
        )
