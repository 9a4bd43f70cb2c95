"""Rounds of SFT, GRPO and rejection sampling."""

from __future__ import annotations

from dataclasses import dataclass

from cacherl_jax.config.basics import Count, Positive, PositiveRate, Share, require


@dataclass(frozen=True)
class RejectionConfig:
    """Which episodes of a policy are worth learning from (trajectories/rejection.py): by references and facts, or, with
    reward.answer="judge", by the judge alone."""

    tasks: Count = 0  # training tasks played a round; 0: all
    samples: Positive = 4  # episodes a task
    temperature: PositiveRate = 1.0
    keep: Positive = 2  # accepted episodes a task at most
    least_answer: Share = 1.0  # score of the answer from which on it is accepted; 1: all facts are in it, or the judge's best grade
    least_fidelity: Share = 0.5  # of each observation: the probability that it is the tool's true result

    def __post_init__(self) -> None:
        require(
            self.keep <= self.samples,
            f"iterate.rejection.keep={self.keep} is above iterate.rejection.samples={self.samples}; no task has so many episodes",
        )


@dataclass(frozen=True)
class MixConfig:
    """How accepted episodes are mixed with the recorded transcripts, all of which stay."""

    repeats: Positive = 1  # times an accepted episode may stand in the mix
    tool_floor: Share = 0.5  # a tool's share of the calls stays above this share of what it was among the transcripts


@dataclass(frozen=True)
class IterateConfig:
    rounds: Positive = 2
    rejection: RejectionConfig = RejectionConfig()
    mix: MixConfig = MixConfig()
