"""The agent loop and its engine; evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from cacherl_jax.config.basics import Count, Positive, PositiveRate, Rate, Share, require

MIN_TURN = 8  # tokens that must fit for a turn to be worth opening


@dataclass(frozen=True)
class RolloutConfig:
    """The agent loop and its engine (rooms: rollout/)."""

    rows: Positive = 64  # compiled rows a device (of tp devices together); never changes within a run, or bits differ
    slots: Count = 0  # rows in use on all devices; 0: all
    tp: Count = 0  # devices that share a row's heads; 0: as in training
    context: Positive = 256
    decode_steps: Positive = 4  # tokens a dispatch
    max_turns: Positive = 8
    max_turn_tokens: Positive = 96
    max_sampled_tokens: Positive = 320
    max_tool_tokens: Positive = 128  # longer tool text is cut, in tokens
    tool_timeout: PositiveRate = 30.0  # seconds a call may take, where the tools may take long
    min_tokens: tuple[Count, ...] = ()  # of the first turn, the second, ...: tokens to be sampled before it may stop
    temperature: Rate = 1.0
    top_p: Share = 1.0
    top_k: Count = 0  # 0: off

    def __post_init__(self) -> None:
        require(
            self.max_sampled_tokens >= MIN_TURN,
            f"rollout.max_sampled_tokens={self.max_sampled_tokens} opens no turn at all: one needs room for {MIN_TURN} tokens",
        )
        for turn, tokens in enumerate(self.min_tokens):
            require(
                tokens < self.max_turn_tokens,
                f"rollout.min_tokens of turn {turn} is {tokens}, not below rollout.max_turn_tokens={self.max_turn_tokens}; "
                "such a turn could not stop",
            )


@dataclass(frozen=True)
class EvalConfig:
    temperature: Rate = 0.0
    bootstrap: Positive = 10_000
