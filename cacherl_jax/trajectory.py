"""An episode of our policy, token by token, with the source of every token. It crosses rooms, as what types.py holds."""

from __future__ import annotations

import base64
import enum
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cacherl_jax.types import Kind, Observation, Tier, ToolCall, ToolResult, worst_tier


class StopReason(enum.StrEnum):
    """Why an episode ended. Each is counted."""

    ANSWER = "answer"  # a reply without a call, and no user turn left
    TURN_CAP = "turn_cap"  # max_turns assistant turns used
    TOKEN_CAP = "token_cap"  # the episode's budget of sampled tokens used
    CONTEXT_FULL = "context_full"  # the next injection or a minimal turn would not fit
    TURN_TRUNCATED = "turn_truncated"  # outside its thinking block a turn ended without <|im_end|>: at its cap, by <|endoftext|>
    VOID_TURN = "void_turn"  # a turn with neither text nor call
    TOOL_FAILURE = "tool_failure"  # a session raised ToolFailure: the miss policy `fail`


class Source(enum.StrEnum):
    """Who wrote a span of tokens. Only SAMPLED carries loss."""

    PROMPT = "prompt"  # system, tools
    USER = "user"
    TEMPLATE = "template"  # generation prompts, the newline after <|im_end|>, forced closings
    SAMPLED = "sampled"
    TOOL = "tool"


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of a trajectory, written by `source`; of TOOL segments, the index of the observation."""

    start: int
    stop: int
    source: Source
    observation: int | None = None


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One episode of our policy, token by token.

    tokens_T int32; sampled_T bool, True where the policy sampled the token (the loss mask); logprobs_T float32, the
    sampler's logprob under the untempered policy; behavior_logprobs_T float32, its logprob under the distribution that was
    drawn from (temperature, top-p, top-k, the floor on a turn's tokens). Both are 0 where injected. segments cover [0, T) in
    order. observations: one a call in the order made; a malformed call has name "" and its text as arguments.
    answer: the last reply's text outside <think>. reasoning_leaked: that text contains a think marker. info: where the episode
    comes from, such as the one it was forked from. seconds: of each turn, spent on sampling it and on waiting for its tools.
    """

    task_id: str
    sample: int
    tokens_T: np.ndarray
    sampled_T: np.ndarray
    logprobs_T: np.ndarray
    behavior_logprobs_T: np.ndarray
    segments: tuple[Segment, ...]
    observations: tuple[Observation, ...]
    answer: str
    stop: StopReason
    turns: int
    reasoning_leaked: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)
    seconds: tuple[tuple[float, float], ...] = ()

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """Every call, malformed and failed ones included; a remark on an unfinished thought answers no call."""
        return tuple(o.call for o in self.observations if o.call.name or o.call.arguments)

    @property
    def refused(self) -> tuple[bool, ...]:
        """Of each of `calls`, whether the loop refused it: it was never made, however near it is to one that could be."""
        return tuple(o.tier is Tier.LOOP for o in self.observations if o.call.name or o.call.arguments)

    @property
    def calls_made(self) -> tuple[ToolCall, ...]:
        """`calls` as metrics count them: a refused one stands without a name, equal to no call of a reference."""
        pairs = zip(self.calls, self.refused, strict=True)
        return tuple(ToolCall("", f"{c.name} {c.arguments}") if refused else c for c, refused in pairs)

    @property
    def worst_tier(self) -> Tier | None:
        return worst_tier([o.tier for o in self.observations])

    def digest(self) -> str:
        """SHA-256 of what weights, seed and snapshot decide: all but `seconds` and `info`."""
        decided = {name: value for name, value in self.to_json().items() if name not in ("seconds", "info")}
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "task_id": self.task_id,
            "sample": self.sample,
            "tokens": self.tokens_T.tolist(),
            "sampled": "".join("1" if s else "0" for s in self.sampled_T),
            "logprobs": _to_base64(self.logprobs_T),
            "behavior_logprobs": _to_base64(self.behavior_logprobs_T),
            "segments": [[s.start, s.stop, s.source.value, s.observation] for s in self.segments],
            "observations": [asdict(o) for o in self.observations],
            "answer": self.answer,
            "stop": self.stop.value,
            "turns": self.turns,
            "reasoning_leaked": self.reasoning_leaked,
            "info": dict(self.info),
            "seconds": [list(pair) for pair in self.seconds],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trajectory:
        return cls(
            task_id=data["task_id"],
            sample=data["sample"],
            tokens_T=np.asarray(data["tokens"], np.int32),
            sampled_T=np.frombuffer(data["sampled"].encode(), np.uint8) == ord("1"),
            logprobs_T=_from_base64(data["logprobs"]),
            behavior_logprobs_T=_from_base64(data["behavior_logprobs"]),
            segments=tuple(Segment(a, b, Source(s), o) for a, b, s, o in data["segments"]),
            observations=tuple(map(_observation, data["observations"])),
            answer=data["answer"],
            stop=StopReason(data["stop"]),
            turns=data["turns"],
            reasoning_leaked=data["reasoning_leaked"],
            info=data["info"],
            seconds=tuple((sampling, waiting) for sampling, waiting in data["seconds"]),
        )


def _observation(data: Mapping[str, Any]) -> Observation:
    call, result = ToolCall(**data["call"]), ToolResult(**data["result"])
    return Observation(**{**data, "call": call, "result": result, "tier": Tier(data["tier"]), "kind": Kind(data["kind"])})


def _to_base64(values_T: np.ndarray) -> str:
    return base64.b64encode(values_T.astype("<f4").tobytes()).decode()


def _from_base64(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)
