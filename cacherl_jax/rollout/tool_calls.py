"""The tool calls of many episodes at once: a row waits for its tools while others are sampled.

Calls of one turn run together where none of them writes, else one after the other in call order. Answers are given in call
order, whatever finished first. A thread does nothing but make one call; everything else is decided on the caller's thread.

A call that takes longer than the timeout, counted from its own start, is answered by the typed error `timeout`. Its tier is
miss and its fidelity 0: nothing was learnt of what the tool would have said, and no reward may rest on it. The call itself
cannot be stopped. Until it returns, its session is not asked again, so that no two calls race for the episode's state: later
calls of the episode, those of the same turn included, are answered `timeout` at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from functools import partial

from cacherl_jax.tools.registry import error_result
from cacherl_jax.tools.threads import in_thread
from cacherl_jax.types import Kind, Observation, Tier, ToolCall, ToolFailure, ToolSession, ToolSpec

Calls = Sequence[tuple[int, ToolCall]]  # each with the place of its answer among the episode's observations
Answer = Observation | ToolFailure


def make_calls(session: ToolSession, calls: Calls) -> list[Answer]:
    """Makes the calls here and now, in call order, up to one that ends the episode."""
    answers: list[Answer] = []
    for index, call in calls:
        answers.append(_answer(call, partial(session.execute, call, index)))
        if isinstance(answers[-1], ToolFailure):
            break
    return answers


@dataclass
class _Turn:
    """The calls of one turn under way, by their position."""

    session: ToolSession
    calls: Calls
    together: bool
    unmade: list[int]
    running: dict[int, tuple[futures.Future[Observation], float]] = field(default_factory=dict)  # outcome and deadline
    answers: dict[int, Answer] = field(default_factory=dict)

    def in_order(self) -> list[Answer]:
        """The answers in call order, up to one that ends the episode."""
        answers = [self.answers[i] for i in sorted(self.answers)]
        failed = next((i for i, answer in enumerate(answers) if isinstance(answer, ToolFailure)), len(answers))
        return answers[: failed + 1]


class ToolCalls:
    """The calls under way, by row. timeout: seconds a call may take."""

    def __init__(self, specs: Mapping[str, ToolSpec], timeout: float) -> None:
        self._specs, self._timeout = specs, timeout
        self._turns: dict[int, _Turn] = {}
        self._late: list[tuple[ToolSession, futures.Future[Observation]]] = []  # given up and not yet returned

    def submit(self, row: int, session: ToolSession, calls: Calls, *, blocking: bool) -> list[Answer] | None:
        """Makes the calls of a row's turn. The answers at once if they are not `blocking`; else None, and `done` gives them.

        Exceptions of a session other than ToolFailure are raised, here or by `done` and `wait`, with a note of the call.
        """
        if not blocking:
            return make_calls(session, calls)
        if row in self._turns:
            raise ValueError(f"row {row} still waits for the calls of another turn")
        self._turns[row] = self._begin(session, calls)
        return None

    def done(self) -> dict[int, list[Answer]]:
        """The answers of every row whose calls have all returned or timed out since the last time, in call order."""
        finished = [row for row, turn in self._turns.items() if self._advance(turn)]
        return {row: self._turns.pop(row).in_order() for row in finished}

    def wait(self, seconds: float = math.inf) -> None:
        """Until at least one row is done, or so many seconds; at once where none waits."""
        self._wait(self._turns.values(), seconds)

    def answers(self, session: ToolSession, calls: Calls) -> list[Answer]:
        """The answers of one turn, waited for; no row is touched."""
        turn = self._begin(session, calls)
        self._wait([turn])
        return turn.in_order()

    def close(self) -> None:
        """Forgets what is under way: no further call starts, and those that run are not waited for."""
        self._turns.clear()
        self._late.clear()

    def _begin(self, session: ToolSession, calls: Calls) -> _Turn:
        together = not any(self._specs[call.name].effects.writes for _, call in calls)
        turn = _Turn(session, calls, together, list(range(len(calls))))
        self._advance(turn)
        return turn

    def _advance(self, turn: _Turn) -> bool:
        """Takes what has returned, gives up what is late, starts what may start. Whether all calls are answered."""
        for i, (outcome, deadline) in list(turn.running.items()):
            _, call = turn.calls[i]
            if outcome.done():
                turn.answers[i] = _answer(call, outcome.result)
                if isinstance(turn.answers[i], ToolFailure):
                    turn.unmade.clear()
            elif time.monotonic() >= deadline:
                turn.answers[i] = _timeout(call, f"{call.name} gave no answer in {self._timeout:g} s")
                self._late.append((turn.session, outcome))
            else:
                continue
            del turn.running[i]
        while turn.unmade and (turn.together or not turn.running):
            i = turn.unmade.pop(0)
            index, call = turn.calls[i]
            if self._waits_for_late(turn.session):
                turn.answers[i] = _timeout(call, f"{call.name} was not called: an earlier call has not returned")
            else:
                outcome = in_thread(partial(turn.session.execute, call, index))
                turn.running[i] = outcome, time.monotonic() + self._timeout
        return not turn.running

    def _waits_for_late(self, session: ToolSession) -> bool:
        self._late = [(s, outcome) for s, outcome in self._late if not outcome.done()]
        return any(s is session for s, _ in self._late)

    def _wait(self, turns: Collection[_Turn], seconds: float = math.inf) -> None:
        until = time.monotonic() + seconds
        while turns and not any(self._advance(turn) for turn in turns) and time.monotonic() < until:
            running = [pair for turn in turns for pair in turn.running.values()]
            soonest = min(until, *(deadline for _, deadline in running)) - time.monotonic()
            futures.wait([outcome for outcome, _ in running], min(max(soonest, 0.0), 60.0), futures.FIRST_COMPLETED)


def _answer(call: ToolCall, make: Callable[[], Observation]) -> Answer:
    try:
        return make()
    except ToolFailure as failure:
        return failure
    except Exception as error:
        error.add_note(f"in a call of tool {call.name}: {call.arguments[:200]}")
        raise


def _timeout(call: ToolCall, message: str) -> Observation:
    return Observation(call, error_result("timeout", message), Tier.MISS, Kind.SIMULATED, score=0.0, fidelity=0.0)
