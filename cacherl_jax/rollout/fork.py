"""Forks: a stored episode is played again up to a turn and goes on from there, with the same tools or with changed ones.

Under an unchanged provider the ids held are the stored ones, byte for byte. Under a changed one (an entry left out or answered
otherwise by cache.counterfactual, other tiers or thresholds by configuration) the episode goes its own way from the first
observation that differs: what the policy said before it, it would have said in any case.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cacherl_jax.rollout.agent_loop import CallTools, Episode, Inject, Step
from cacherl_jax.rollout.tool_calls import ToolCalls, make_calls
from cacherl_jax.trajectory import Source, Trajectory
from cacherl_jax.types import Observation, ToolSession


@dataclass(frozen=True)
class Replay:
    """A stored episode, and how many of its turns are to be played again before the policy goes on."""

    trajectory: Trajectory
    turns: int


def replay(
    episode: Episode, session: ToolSession, trajectory: Trajectory, turns: int, *, tools: ToolCalls | None = None
) -> Inject | None:
    """Plays the first `turns` turns of a stored trajectory through a fresh episode, up to the first observation that differs
    from the stored one; that one is injected as it is now.

    Calls are made on `session`, so that its state (a database, the chain of writes) is right: by `tools`, with its timeout,
    where they may take long, else at once. Another sample than the stored one has its own draws. Returns all ids held so far,
    to be read at once before the next turn, or None where the replayed episode is over. `episode.info` says what was replayed
    of which trajectory: its digest, the turns, and the first observation that differs (None: none did).

    Raises ValueError for a trajectory of another task, for turns that it does not have or that exceed the episode's limits,
    and where it cannot be played again: another tokenizer, template, tool definition or max_tool_tokens wrote its ids.
    """
    name = f"sample {trajectory.sample} of task {trajectory.task_id}"
    if trajectory.task_id != episode.task.id:
        raise ValueError(f"{name} cannot be replayed in task {episode.task.id}")
    if not 0 <= turns <= trajectory.turns:
        raise ValueError(f"{name} has {trajectory.turns} turns; {turns} cannot be replayed")
    sampled = [s for s in trajectory.segments if s.source is Source.SAMPLED]
    step: Step = episode.start()
    changed = None
    while step is not None and changed is None:
        _compare(episode, trajectory, name)
        if episode.turn == turns:
            break
        turn = slice(sampled[episode.turn].start, sampled[episode.turn].stop)
        ids, limit = trajectory.tokens_T[turn].tolist(), episode.budget
        if len(ids) > limit:
            raise ValueError(f"turn {episode.turn} of {name} has {len(ids)} tokens; the limits of this run allow {limit}")
        known = len(episode.observations)
        step = episode.on_turn(ids, trajectory.logprobs_T[turn].tolist(), trajectory.behavior_logprobs_T[turn].tolist())
        if isinstance(step, CallTools):
            step = episode.on_answers(tools.answers(session, step.calls) if tools else make_calls(session, step.calls))
        changed = _first_change(episode.observations, trajectory.observations, known)
    episode.info["replay"] = {"of": trajectory.digest(), "turns": episode.turn, "changed": changed}
    return None if step is None else Inject(episode.ids)


def _compare(episode: Episode, trajectory: Trajectory, name: str) -> None:
    """Raises ValueError unless the ids held are those stored, as far as both go: an episode may have stopped at a limit
    that is now higher."""
    held_T, stored_T = np.asarray(episode.ids, np.int64), trajectory.tokens_T
    length = min(len(held_T), len(stored_T))
    different = np.flatnonzero(held_T[:length] != stored_T[:length])
    if len(different):
        n = int(different[0])
        raise ValueError(
            f"{name} cannot be replayed: ids differ at position {n} ({stored_T[n]} stored, {held_T[n]} now); "
            "was it written with another tokenizer, other tool definitions or another rollout.max_tool_tokens?"
        )


def _first_change(now: list[Observation], stored: tuple[Observation, ...], known: int) -> int | None:
    """The first observation from `known` on that reads otherwise than the stored one of its place."""
    for i in range(known, len(now)):
        if i == len(stored) or now[i].result != stored[i].result:
            return i
    return None
