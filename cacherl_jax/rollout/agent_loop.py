"""CacheAgentLoop, one episode: a state machine on the host between sampled turns and tool answers.

It sees no model and runs no tool. `start` gives the ids to inject first. `on_turn` takes a sampled turn and says what is next:
ids to inject, calls to make (whose answers `on_answers` takes), or None when the episode is over. Ids sampled plus ids
injected are exactly the ids held; nothing sampled is ever decoded and encoded again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cacherl_jax.config import MIN_TURN, RolloutConfig
from cacherl_jax.text import chat
from cacherl_jax.text.chat import MalformedCall, ParsedTurn, Piece
from cacherl_jax.text.tokenizer import Tokenizer
from cacherl_jax.tools.registry import check_call, error_result
from cacherl_jax.trajectory import Source, StopReason, Trajectory
from cacherl_jax.types import Kind, Observation, Task, Tier, ToolCall, ToolFailure, ToolResult, ToolSpec


@dataclass(frozen=True)
class Inject:
    """Ids to be read into the row; then a turn is sampled."""

    ids: list[int]


@dataclass(frozen=True)
class CallTools:
    """Calls of one turn that passed the checks, in call order, each with the place of its answer among the episode's
    observations."""

    calls: tuple[tuple[int, ToolCall], ...]


Step = Inject | CallTools | None


class Episode:
    """One task being played. `opening` is chat.opening of the task, made once for its whole group.

    observations: so far, of answered turns. info: what the trajectory will say of where it comes from.
    """

    def __init__(
        self,
        tok: Tokenizer,
        specs: Mapping[str, ToolSpec],
        task: Task,
        sample: int,
        config: RolloutConfig,
        opening: Sequence[Piece],
    ) -> None:
        self.task, self.sample, self.turn, self.config = task, sample, 0, config
        self.observations: list[Observation] = []
        self.info: dict[str, Any] = {}
        self._tok = tok
        self._specs = {name: specs[name] for name in task.tools}  # a tool that the task does not list is unknown to it
        self._opening = list(opening)
        self._pieces: list[Piece] = []
        self._logprobs: list[float] = []
        self._behavior_logprobs: list[float] = []
        self._made: list[Observation | ToolCall] = []  # of the turn whose answers are awaited: refusals and calls, in call order
        self._followups = list(task.followups)
        self._answer, self._leaked = "", False
        self._length = self._sampled = 0
        self._stop: StopReason | None = None

    def start(self) -> Inject | None:
        """The ids before the first turn; None if they leave no room for one."""
        return self._inject(self._opening)

    @property
    def budget(self) -> int:
        """Tokens that the turn to come may take."""
        config = self.config
        return min(config.max_turn_tokens, config.max_sampled_tokens - self._sampled, config.context - self._length)

    @property
    def minimum(self) -> int:
        """Tokens that it must take before it may stop."""
        floors = self.config.min_tokens
        return floors[self.turn] if self.turn < len(floors) else 0

    @property
    def ids(self) -> list[int]:
        """All ids held so far."""
        return [i for _, piece, _ in self._pieces for i in piece]

    def on_turn(self, ids: Sequence[int], logprobs: Sequence[float], behavior_logprobs: Sequence[float]) -> Step:
        """Takes the turn sampled since the last injection, its stop token included if it came; logprobs as in Trajectory."""
        if self._made or self._stop is not None:
            state = "is over" if self._stop is not None else "waits for answers of its tools"
            raise ValueError(f"episode {self.task.id}/{self.sample} {state} and takes no turn")
        room = self.config.context - self._length
        self._hold(Source.SAMPLED, list(ids), None, logprobs, behavior_logprobs)
        self._sampled += len(ids)
        self.turn += 1
        ended = bool(ids) and ids[-1] == self._tok.im_end
        parsed = chat.parse_turn(self._tok.decode(ids))
        if not parsed.thinking_closed:
            remark = error_result("unfinished_thinking", "the thinking block was left open; nothing in it was executed")
            closing = chat.after_turn(self._tok) if ended else chat.close_thinking(self._tok)
            return self._observe(closing, [Observation(ToolCall("", ""), remark, Tier.LOOP, Kind.LIVE)])
        if not ended:
            return self._end(self._cut_by(room))
        if not parsed.calls:
            return self._reply(parsed)
        self._made = [self._checked(call) for call in parsed.calls]
        first = len(self.observations)
        calls = tuple((first + i, made) for i, made in enumerate(self._made) if isinstance(made, ToolCall))
        return CallTools(calls) if calls else self.on_answers([])

    def on_answers(self, answers: Sequence[Observation | ToolFailure]) -> Inject | None:
        """Takes the answers to the calls of the CallTools last returned, in call order. A ToolFailure ends the episode; the
        answers after it may be left out."""
        awaited = sum(isinstance(made, ToolCall) for made in self._made)
        failed = bool(answers) and isinstance(answers[-1], ToolFailure)
        if not self._made or len(answers) > awaited or (len(answers) < awaited and not failed):
            raise ValueError(f"episode {self.task.id}/{self.sample} awaits {awaited} answers, not {len(answers)}")
        turn, self._made = self._made, []
        given = iter(answers)
        observed: list[Observation] = []
        for made in turn:
            answer = made if isinstance(made, Observation) else next(given)
            if isinstance(answer, ToolFailure):
                self.observations += [*observed, answer.observation]
                return self._end(StopReason.TOOL_FAILURE)
            observed.append(answer)
        return self._observe(chat.after_turn(self._tok), observed)

    def _reply(self, parsed: ParsedTurn) -> Inject | None:
        if not parsed.content.strip():
            return self._end(StopReason.VOID_TURN)
        self._answer, self._leaked = parsed.content, self._leaked or parsed.leaked
        if not self._followups:
            return self._end(StopReason.ANSWER)
        return self._inject([*chat.after_turn(self._tok), *chat.user_turn(self._tok, self._followups.pop(0))])

    def _checked(self, call: ToolCall | MalformedCall) -> Observation | ToolCall:
        """The call, or why it is not made: whatever the policy wrote, there is an observation."""
        if isinstance(call, MalformedCall):
            made = ToolCall("", f"<tool_call>{call.text}")
            refused: ToolResult | None = error_result("malformed_call", call.problem[:120])
        else:
            made, refused = call, check_call(self._specs, call)
        return made if refused is None else Observation(made, refused, Tier.LOOP, Kind.LIVE)

    def _observe(self, closing: Sequence[Piece], observed: Sequence[Observation]) -> Inject | None:
        """Holds a turn's observations, cut to their limit, in one user turn after the `closing` of the assistant's."""
        first = len(self.observations)
        texts = [chat.cut(self._tok, o.result.content, self.config.max_tool_tokens) for o in observed]
        for o, text in zip(observed, texts, strict=True):
            self.observations.append(o if text == o.result.content else replace(o, shown=len(text)))
        results = chat.tool_results(self._tok, texts)
        return self._inject([*closing, *((source, ids, first + (i or 0)) for source, ids, i in results)])

    def _inject(self, pieces: Sequence[Piece]) -> Inject | None:
        """Holds the pieces and opens the next turn, unless a limit is reached."""
        if self.turn >= self.config.max_turns:
            return self._end(StopReason.TURN_CAP)
        if self._sampled + MIN_TURN > self.config.max_sampled_tokens:
            return self._end(StopReason.TOKEN_CAP)
        pieces = [*pieces, *chat.generation_prompt(self._tok)]
        ids = [i for _, piece, _ in pieces for i in piece]
        if self._length + len(ids) + MIN_TURN > self.config.context:
            return self._end(StopReason.CONTEXT_FULL)
        for source, piece, observation in pieces:
            zeros = [0.0] * len(piece)
            self._hold(source, piece, observation, zeros, zeros)
        return Inject(ids)

    def _hold(
        self,
        source: Source,
        ids: list[int],
        observation: int | None,
        logprobs: Sequence[float],
        behavior_logprobs: Sequence[float],
    ) -> None:
        if not len(ids) == len(logprobs) == len(behavior_logprobs):
            raise ValueError(f"{len(ids)} ids with {len(logprobs)} and {len(behavior_logprobs)} logprobs")
        self._pieces.append((source, ids, observation))
        self._logprobs += logprobs
        self._behavior_logprobs += behavior_logprobs
        self._length += len(ids)

    def _cut_by(self, room: int) -> StopReason:
        """Which limit cut a turn short, given the room that the context had for it."""
        if self._length >= self.config.context or room <= 0:
            return StopReason.CONTEXT_FULL
        return StopReason.TOKEN_CAP if self._sampled >= self.config.max_sampled_tokens else StopReason.TURN_TRUNCATED

    def _end(self, reason: StopReason) -> None:
        self._stop = reason

    def trajectory(self, seconds: Sequence[tuple[float, float]] = ()) -> Trajectory:
        """The finished episode; `seconds` as in Trajectory. Raises ValueError while it is still going."""
        if self._stop is None:
            raise ValueError(f"episode {self.task.id}/{self.sample} is not over")
        tokens_T, sampled_T, segments = chat.join(self._pieces)
        return Trajectory(
            task_id=self.task.id,
            sample=self.sample,
            tokens_T=tokens_T,
            sampled_T=sampled_T,
            logprobs_T=np.asarray(self._logprobs, np.float32),
            behavior_logprobs_T=np.asarray(self._behavior_logprobs, np.float32),
            segments=segments,
            observations=tuple(self.observations),
            answer=self._answer,
            stop=self._stop,
            turns=self.turn,
            reasoning_leaked=self._leaked,
            info=dict(self.info),
            seconds=tuple(seconds),
        )
