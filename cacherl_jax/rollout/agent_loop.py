"""CacheAgentLoop, one episode: a state machine on the host between sampled turns and tool answers.

It never sees a model. `start` gives the ids to inject first; each `on_turn` takes a sampled turn and gives the ids to inject
next, or None when the episode is over. Ids sampled plus ids injected are exactly the ids held; nothing sampled is ever
decoded and encoded again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cacherl_jax.config import RolloutConfig
from cacherl_jax.text import chat
from cacherl_jax.text.chat import MalformedCall, ParsedTurn, Piece
from cacherl_jax.text.tokenizer import Tokenizer
from cacherl_jax.tools.registry import check_call, error_result
from cacherl_jax.types import (
    Kind,
    Observation,
    Source,
    StopReason,
    Task,
    Tier,
    ToolCall,
    ToolFailure,
    ToolResult,
    ToolSession,
    ToolSpec,
    Trajectory,
)

MIN_TURN = 8  # tokens that must fit for another turn to be worth opening


class Episode:
    """One task being played. `opening` is chat.opening of the task, made once for its whole group."""

    def __init__(
        self,
        tok: Tokenizer,
        specs: Mapping[str, ToolSpec],
        task: Task,
        sample: int,
        session: ToolSession,
        config: RolloutConfig,
        opening: Sequence[Piece],
    ) -> None:
        self.task, self.sample, self.turn = task, sample, 0
        self._tok, self._session, self._config = tok, session, config
        self._specs = {name: specs[name] for name in task.tools}  # a tool that the task does not list is unknown to it
        self._opening = list(opening)
        self._pieces: list[Piece] = []
        self._logprobs: list[float] = []
        self._observations: list[Observation] = []
        self._followups = list(task.followups)
        self._answer, self._leaked = "", False
        self._length = self._sampled = 0
        self._stop: StopReason | None = None

    def start(self) -> list[int] | None:
        """The ids before the first turn; None if they leave no room for one."""
        return self._inject(self._opening)

    @property
    def budget(self) -> int:
        """Tokens that the turn to come may take."""
        config = self._config
        return min(config.max_turn_tokens, config.max_sampled_tokens - self._sampled, config.context - self._length)

    @property
    def minimum(self) -> int:
        """Tokens that it must take before it may stop."""
        return self._config.min_tokens_first_turn if self.turn == 0 else 0

    def on_turn(self, ids: Sequence[int], logprobs: Sequence[float]) -> list[int] | None:
        """Takes the turn sampled since the last injection, its stop token included if it came. Returns the next injection."""
        room = self._config.context - self._length
        self._hold(Source.SAMPLED, list(ids), None, logprobs)
        self._sampled += len(ids)
        self.turn += 1
        ended = bool(ids) and ids[-1] == self._tok.im_end
        parsed = chat.parse_turn(self._tok.decode(ids))
        if not parsed.thinking_closed:
            remark = error_result("unfinished_thinking", "the thinking block was left open; nothing in it was executed")
            self._observations.append(Observation(ToolCall("", ""), remark, Tier.LOOP, Kind.LIVE))
            closing = chat.after_turn(self._tok) if ended else chat.close_thinking(self._tok)
            return self._inject([*closing, *self._results([remark])])
        if not ended:
            return self._end(self._cut_by(room))
        if parsed.calls:
            try:
                results = [self._execute(call) for call in parsed.calls]
            except ToolFailure as failure:
                self._observations.append(failure.observation)
                return self._end(StopReason.TOOL_FAILURE)
            return self._inject([*chat.after_turn(self._tok), *self._results(results)])
        return self._reply(parsed)

    def _reply(self, parsed: ParsedTurn) -> list[int] | None:
        if not parsed.content.strip():
            return self._end(StopReason.VOID_TURN)
        self._answer, self._leaked = parsed.content, self._leaked or parsed.leaked
        if not self._followups:
            return self._end(StopReason.ANSWER)
        return self._inject([*chat.after_turn(self._tok), *chat.user_turn(self._tok, self._followups.pop(0))])

    def _execute(self, call: ToolCall | MalformedCall) -> ToolResult:
        """Answers one call; whatever the policy wrote, there is an observation."""
        if isinstance(call, MalformedCall):
            made = ToolCall("", f"<tool_call>{call.text}")
            refused: ToolResult | None = error_result("malformed_call", call.problem[:120])
        else:
            made, refused = call, check_call(self._specs, call)
        if refused is not None:
            self._observations.append(Observation(made, refused, Tier.LOOP, Kind.LIVE))
        else:
            self._observations.append(self._session.execute(made))
        return self._observations[-1].result

    def _results(self, results: Sequence[ToolResult]) -> list[Piece]:
        first = len(self._observations) - len(results)
        turn = chat.tool_results(self._tok, [r.content for r in results], self._config.max_tool_tokens)
        return [(source, ids, first + (index or 0)) for source, ids, index in turn]

    def _inject(self, pieces: Sequence[Piece]) -> list[int] | None:
        """Holds the pieces and opens the next turn, unless a limit is reached."""
        if self.turn >= self._config.max_turns:
            return self._end(StopReason.TURN_CAP)
        if self._sampled + MIN_TURN > self._config.max_sampled_tokens:
            return self._end(StopReason.TOKEN_CAP)
        pieces = [*pieces, *chat.generation_prompt(self._tok)]
        ids = [i for _, piece, _ in pieces for i in piece]
        if self._length + len(ids) + MIN_TURN > self._config.context:
            return self._end(StopReason.CONTEXT_FULL)
        for source, piece, observation in pieces:
            self._hold(source, piece, observation, [0.0] * len(piece))
        return ids

    def _hold(self, source: Source, ids: list[int], observation: int | None, logprobs: Sequence[float]) -> None:
        self._pieces.append((source, ids, observation))
        self._logprobs += logprobs
        self._length += len(ids)

    def _cut_by(self, room: int) -> StopReason:
        """Which limit cut a turn short, given the room that the context had for it."""
        if self._length >= self._config.context or room <= 0:
            return StopReason.CONTEXT_FULL
        return StopReason.TOKEN_CAP if self._sampled >= self._config.max_sampled_tokens else StopReason.TURN_TRUNCATED

    def _end(self, reason: StopReason) -> None:
        self._stop = reason

    def trajectory(self) -> Trajectory:
        """The finished episode. Raises ValueError while it is still going."""
        if self._stop is None:
            raise ValueError(f"episode {self.task.id}/{self.sample} is not over")
        tokens_T, sampled_T, segments = chat.join(self._pieces)
        return Trajectory(
            task_id=self.task.id,
            sample=self.sample,
            tokens_T=tokens_T,
            sampled_T=sampled_T,
            logprobs_T=np.asarray(self._logprobs, np.float32),
            segments=segments,
            observations=tuple(self._observations),
            answer=self._answer,
            stop=self._stop,
            turns=self.turn,
            reasoning_leaked=self._leaked,
        )
