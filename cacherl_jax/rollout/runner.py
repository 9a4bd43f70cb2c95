"""Continuous batching: rows are refilled as episodes end, injections of all rows are read together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cacherl_jax.config import RolloutConfig
from cacherl_jax.model import qwen3
from cacherl_jax.rollout.agent_loop import CallTools, Episode
from cacherl_jax.rollout.engine import Engine
from cacherl_jax.rollout.sampling import turn_key
from cacherl_jax.rollout.tool_calls import ToolCalls, make_calls
from cacherl_jax.text import chat
from cacherl_jax.text.chat import Piece
from cacherl_jax.text.tokenizer import Tokenizer
from cacherl_jax.types import Task, ToolProvider, ToolSession, ToolSpec, Trajectory


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
    on_done: Callable[[Trajectory], object] | None = None,
) -> list[Trajectory]:
    """Plays every (task, sample) and returns the trajectories in the order asked.

    A turn's draws depend on (seed, task id, sample, turn) alone: rows, order and company change nothing. Raises ValueError
    before anything is sampled when a task lists a tool that `specs` lacks.
    """
    openings = _openings(tok, specs, [task for task, _ in episodes])
    finished: dict[int, Trajectory] = {}
    waiting = list(range(len(episodes)))[::-1]
    playing: dict[int, tuple[int, Episode]] = {}  # row -> (index, episode)
    turns: dict[int, tuple[list[int], list[float]]] = {}  # row -> the turn sampled so far
    sessions: dict[int, ToolSession] = {}  # row -> the tools of its episode
    tools = ToolCalls(specs, config.tool_timeout)
    state = engine.init()

    def finish(index: int, episode: Episode) -> None:
        finished[index] = episode.trajectory()
        if on_done is not None:
            on_done(finished[index])

    injections: dict[int, list[int]] = {}
    while waiting or playing:
        fresh = set()
        for row in range(engine.rows):
            while row not in playing and waiting:
                index = waiting.pop()
                task, sample = episodes[index]
                episode = Episode(tok, specs, task, sample, config, openings[task.id])
                first = episode.start()
                if first is None:
                    finish(index, episode)
                else:
                    playing[row], injections[row], sessions[row] = (index, episode), first.ids, provider.start(task, sample)
                    fresh.add(row)
        if not playing:
            break
        if injections:
            state = engine.append(model, state, injections, frozenset(fresh))
            turns |= {row: ([], []) for row in injections}
        injections = {}
        budgets_B, taken_B, minimum_B, keys_B2 = _controls(engine.rows, playing, turns, seed)
        state, out = engine.decode(
            model, state, budgets_B=budgets_B, taken_B=taken_B, minimum_B=minimum_B, keys_B2=keys_B2,
            temperature=config.temperature,
        )  # fmt: skip
        for row, (index, episode) in list(playing.items()):
            ids, logprobs = turns[row]
            count = int(out.counts_B[row])
            ids += out.tokens_NB[:count, row].tolist()
            logprobs += out.logprobs_NB[:count, row].tolist()
            if not out.stopped_B[row] and len(ids) < episode.budget:
                continue
            step = episode.on_turn(ids, logprobs, logprobs)
            if isinstance(step, CallTools):
                session = sessions[row]
                step = episode.on_answers(
                    tools.answers(session, step.calls) if provider.blocking else make_calls(session, step.calls)
                )
            if step is None:
                finish(index, episode)
                del playing[row], turns[row]
            else:
                injections[row] = step.ids
    return [finished[index] for index in range(len(episodes))]


def _controls(
    rows: int, playing: Mapping[int, tuple[int, Episode]], turns: Mapping[int, tuple[list[int], list[float]]], seed: int
) -> tuple[np.ndarray, ...]:
    """(budgets_B, taken_B, minimum_B, keys_B2) for the next dispatch; rows without an episode have budget 0."""
    budgets_B, taken_B, minimum_B = (np.zeros((rows,), np.int32) for _ in range(3))
    keys_B2 = np.zeros((rows, 2), np.uint32)
    for row, (_, episode) in playing.items():
        taken_B[row] = len(turns[row][0])
        budgets_B[row] = episode.budget - taken_B[row]
        minimum_B[row] = episode.minimum
        keys_B2[row] = turn_key(seed, episode.task.id, episode.sample, episode.turn)
    return budgets_B, taken_B, minimum_B, keys_B2


def _openings(tok: Tokenizer, specs: Mapping[str, ToolSpec], tasks: Sequence[Task]) -> dict[str, list[Piece]]:
    openings: dict[str, list[Piece]] = {}
    for task in tasks:
        if task.id not in openings:
            if unknown := [name for name in task.tools if name not in specs]:
                raise ValueError(f"task {task.id} lists tool {unknown[0]!r}, which is unknown; known: {', '.join(specs)}")
            openings[task.id] = chat.opening(tok, task.messages, [specs[name] for name in task.tools])
    return openings
