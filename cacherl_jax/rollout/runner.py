"""Continuous batching: rows are refilled as episodes end, injections of all rows are read together.

The host works one dispatch late: it launches the next one, then reads what the last one sampled, so that the device never
waits for parsing and tools. A row whose turn ended meanwhile stands still for that dispatch; so does one whose tools have
not answered yet.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from cacherl_jax import interrupts, processes
from cacherl_jax.config import RolloutConfig
from cacherl_jax.model import qwen3
from cacherl_jax.rollout import fork, lockstep
from cacherl_jax.rollout.agent_loop import CallTools, Episode, Inject, Step
from cacherl_jax.rollout.engine import Engine
from cacherl_jax.rollout.rows import Row, Rows, shared_slots
from cacherl_jax.rollout.tool_calls import Answer, ToolCalls
from cacherl_jax.text import chat
from cacherl_jax.text.chat import Piece
from cacherl_jax.text.tokenizer import Tokenizer
from cacherl_jax.trajectory import Trajectory
from cacherl_jax.types import Task, ToolProvider, ToolSpec

POLL = 0.1  # seconds at most that the host waits for tools before it looks again for Ctrl-C and for other processes


@dataclass(frozen=True)
class Dispatch:
    """Facts of one decode dispatch, for those who watch how busy the rows are.

    used: rows with an episode; ready: those whose tools owe no answer; advanced: those that kept a token; tokens: kept in
    all; queued: episodes that waited for a row; device_seconds: how long the host waited for what it sampled.
    """

    used: int
    ready: int
    advanced: int
    tokens: int
    queued: int
    device_seconds: float


def run(
    engine: Engine,
    model: qwen3.Qwen3,
    tok: Tokenizer,
    specs: Mapping[str, ToolSpec],
    episodes: Sequence[tuple[Task, int]],
    provider: ToolProvider,
    config: RolloutConfig,
    seed: int,
    *,
    replays: Mapping[tuple[str, int], fork.Replay] | None = None,
    finished: Iterable[Trajectory] = (),
    on_done: Callable[[Trajectory], object] | None = None,
    on_dispatch: Callable[[Dispatch], object] | None = None,
) -> list[Trajectory]:
    """Plays every (task, sample) and returns the trajectories in the order asked.

    A turn's draws depend on (seed, task id, sample, turn) alone: rows, order and company change nothing. `model` lies as
    `engine.place` puts it. `finished` are not played again; `replays` begin as stored trajectories did. Under several
    processes all call this with the same episodes, each plays its share, and all get all trajectories; `finished`,
    `on_done` and `on_dispatch` concern its own. Raises ValueError before anything is sampled when an episode is asked for
    twice, or a task lists a tool that `specs` lacks.
    """
    openings = _openings(tok, specs, [task for task, _ in episodes])
    _refuse_repeated(episodes)
    own = [episodes[i] for i in lockstep.mine(len(episodes))]
    index_of = {(task.id, sample): i for i, (task, sample) in enumerate(own)}
    done = {index_of[t.task_id, t.sample]: t for t in finished if (t.task_id, t.sample) in index_of}
    waiting = [i for i in range(len(own)) if i not in done][::-1]
    rows = Rows(engine, shared_slots(config.slots, engine.rows, jax.process_index(), jax.process_count()), seed)

    def begin(index: int) -> tuple[Row, Inject | None]:
        task, sample = own[index]
        row = Row(index, Episode(tok, specs, task, sample, config, openings[task.id]), provider.start(task, sample))
        replay = (replays or {}).get((task.id, sample))
        if replay is None:
            return row, row.episode.start()
        tools = calls if provider.blocking else None
        step = fork.replay(row.episode, row.session, replay.trajectory, replay.turns, tools=tools)
        row.seconds = [(0.0, 0.0)] * row.episode.turn
        return row, step

    def fill() -> None:
        while waiting and rows.free:
            row, step = begin(waiting.pop())
            if step is None:
                finish(row)
            else:
                rows.put(row, step.ids)

    def finish(row: Row) -> None:
        done[row.index] = row.episode.trajectory(tuple(row.seconds))
        if on_done is not None:
            on_done(done[row.index])

    def advance(at: int, step: Step) -> None:
        row = rows.used[at]
        if isinstance(step, CallTools):
            row.since, row.calling = time.monotonic(), True
            answers = calls.submit(at, row.session, step.calls, blocking=provider.blocking)
            if answers is not None:
                take_answers(at, answers)
        elif step is None:
            finish(rows.used.pop(at))
        else:
            row.inject = step.ids

    def take_answers(at: int, answers: Sequence[Answer]) -> None:
        row = rows.used[at]
        row.calling = False
        row.seconds[-1] = row.seconds[-1][0], time.monotonic() - row.since
        advance(at, row.episode.on_answers(answers))

    def take_tokens(out: Any, launched: Mapping[str, Any]) -> None:
        start = time.monotonic()
        sampled = engine.read(out)
        now = time.monotonic()
        if on_dispatch is not None:
            counts_B = sampled.counts_B
            facts = {"advanced": int((counts_B > 0).sum()), "tokens": int(counts_B.sum()), "device_seconds": now - start}
            on_dispatch(Dispatch(**launched, **facts))
        for at in [at for at in rows.used if sampled.counts_B[at]]:
            row, count = rows.used[at], int(sampled.counts_B[at])
            row.ids += sampled.tokens_BN[at, :count].tolist()
            row.logprobs += sampled.logprobs_BN[at, :count].tolist()
            row.behavior += sampled.behavior_BN[at, :count].tolist()
            row.length, row.pending = row.length + count, row.ids[-1]
            if sampled.stopped_B[at] or len(row.ids) >= row.episode.budget:
                row.left = 0
                row.seconds.append((now - row.since, 0.0))
                advance(at, row.episode.on_turn(row.ids, row.logprobs, row.behavior))

    state, flying = engine.init(), None  # flying: the dispatch that the host has not read yet
    with contextlib.closing(ToolCalls(specs, config.tool_timeout)) as calls:
        while True:
            for at, answers in calls.done().items():
                take_answers(at, answers)
            fill()
            plan, turns = rows.open_turns()
            active = any(row.left > 0 for row in rows.used.values())
            *counts, active, going, interrupted = processes.agree(
                [*plan.counts(), active, bool(rows.used) or flying is not None, interrupts.pending()]
            )
            interrupts.stop(interrupted)
            if not going:
                break
            launched = None
            if active:
                ready = sum(not row.calling for row in rows.used.values())
                state = engine.append(model, state, plan, counts)
                state, out = engine.decode(model, state, turns, config.temperature)
                launched = out, {"used": len(rows.used), "ready": ready, "queued": len(waiting)}
                for at, row in rows.used.items():
                    row.left = max(0, row.left - engine.steps)
                    row.since = time.monotonic() if at in turns else row.since
            if flying is not None:
                take_tokens(*flying)
            elif launched is None:
                calls.wait(POLL)
            flying = launched
    return lockstep.gather([done[i] for i in range(len(own))])


def _refuse_repeated(episodes: Sequence[tuple[Task, int]]) -> None:
    names = Counter((task.id, sample) for task, sample in episodes)
    for (task, sample), times in names.items():
        if times > 1:
            raise ValueError(f"sample {sample} of task {task} is asked for {times} times: its draws would be the same")


def _openings(tok: Tokenizer, specs: Mapping[str, ToolSpec], tasks: Sequence[Task]) -> dict[str, list[Piece]]:
    openings: dict[str, list[Piece]] = {}
    for task in tasks:
        if task.id not in openings:
            if unknown := [name for name in task.tools if name not in specs]:
                raise ValueError(f"task {task.id} lists tool {unknown[0]!r}, which is unknown; known: {', '.join(specs)}")
            openings[task.id] = chat.opening(tok, task.messages, [specs[name] for name in task.tools])
    return openings
