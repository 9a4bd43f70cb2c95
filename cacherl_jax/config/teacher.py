"""Who adds the reasoning to transcripts, and what it may cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cacherl_jax.config.basics import Count, EndpointConfig, Positive, Rate, require


@dataclass(frozen=True)
class TeacherConfig(EndpointConfig):
    """The teacher of the stage `think` (room: trajectories/). max_tokens, timeout and retries are of one request."""

    kind: Literal["scripted", "http", "policy"] = "scripted"  # rules; an OpenAI-compatible endpoint; a model of ours
    policy: str = ""  # a finished stage or a converted folder, for kind="policy"
    retries: Count = 8  # after the first try, with growing pauses; endpoints are busy for minutes
    temperature: Rate = 0.6
    attempts: Positive = 3  # replies that the checks may reject, each from another seed, before a message stays without reasoning
    concurrency: Positive = 8  # requests on their way at a time
    min_words: Count = 2  # of written reasoning
    max_words: Positive = 200
    max_past: Positive = 60_000  # characters of the past that a prompt holds; of longer ones the oldest results are cut
    price_prompt: Rate = 0.0  # money a million tokens
    price_completion: Rate = 0.0
    budget_tokens: Count = 0  # of prompts and replies in one output folder, all runs together; 0: no limit
    budget_money: Rate = 0.0  # likewise

    def __post_init__(self) -> None:
        needed = {"http": ("base_url", "model"), "policy": ("policy",), "scripted": ()}[self.kind]
        for name in needed:
            require(bool(getattr(self, name)), f"teacher.{name} is empty; teacher.kind={self.kind!r} needs it")
        require(
            self.min_words <= self.max_words,
            f"teacher.min_words={self.min_words} is above teacher.max_words={self.max_words}; no reasoning would pass",
        )
        require(
            not self.budget_money or bool(self.price_prompt or self.price_completion),
            f"teacher.budget_money={self.budget_money} without teacher.price_prompt and teacher.price_completion limits nothing",
        )


# What decides the transcripts that come out; the rest decides how fast they come and what they may cost.
TEACHER_PARTS = tuple(
    f"teacher.{name}"
    for name in ("kind", "model", "policy", "max_tokens", "temperature", "attempts", "min_words", "max_words", "max_past")
)
