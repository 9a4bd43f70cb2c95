"""Rejection sampling (paper.md, section 4): which episodes of a policy are worth learning from, and how they are mixed with
the recorded transcripts.

An accepted episode is trained on as the ids it was sampled as: another segmentation of the same text would be other data.
`as_transcript` is for readers, and for models with another tokenizer.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from cacherl_jax.config import MixConfig, RejectionConfig
from cacherl_jax.text import chat
from cacherl_jax.text.chat import MalformedCall
from cacherl_jax.text.tokenizer import Tokenizer
from cacherl_jax.trajectory import Source, StopReason, Trajectory
from cacherl_jax.types import Message, Task, ToolCall, Transcript

Score = Callable[[Task, Trajectory], float]  # in [0, 1]

ACCEPTED = "accepted"
REASONS = (
    "no_answer",  # a limit or a failure ended the episode
    "reasoning_leaked",  # into the answer
    "malformed",  # a call that cannot be read, or a thinking block left open
    "unfaithful",  # an observation that is probably not what the tool would have said
    "wrong_calls",
    "wrong_answer",
    "duplicate",  # the same tokens as another episode of the task
    "surplus",  # the task has enough better ones
)


def verdict(task: Task, trajectory: Trajectory, calls: Score | None, answer: Score, rules: RejectionConfig) -> str:
    """ACCEPTED, or the first of REASONS against an episode by itself.

    calls: 1 where all calls are right; None where no reference says so, and the answer's score alone decides, as the paper's
    judge does. answer: by rule, or a judge's; asked last, and only of episodes that nothing else speaks against, since a
    judge costs money.
    """
    if trajectory.stop is not StopReason.ANSWER:
        return "no_answer"
    if trajectory.reasoning_leaked:
        return "reasoning_leaked"
    if any(not o.call.name for o in trajectory.observations):
        return "malformed"
    if any(o.fidelity < rules.least_fidelity for o in trajectory.observations):
        return "unfaithful"
    if calls is not None and calls(task, trajectory) < 1:
        return "wrong_calls"
    return ACCEPTED if answer(task, trajectory) >= rules.least_answer else "wrong_answer"


def select(
    episodes: Iterable[tuple[Task, Trajectory]], *, calls: Score | None, answer: Score, rules: RejectionConfig
) -> tuple[list[Trajectory], dict[str, int]]:
    """The accepted episodes, at most `rules.keep` a task, in the order in which their tasks come; and how many episodes met
    which end, ACCEPTED or one of REASONS."""
    counts: Counter[str] = Counter(dict.fromkeys((ACCEPTED, *REASONS), 0))
    good: dict[str, dict[bytes, Trajectory]] = defaultdict(dict)
    for task, trajectory in episodes:
        said = verdict(task, trajectory, calls, answer, rules)
        if said == ACCEPTED:
            said = "duplicate" if trajectory.tokens_T.tobytes() in good[task.id] else ACCEPTED
            good[task.id].setdefault(trajectory.tokens_T.tobytes(), trajectory)
        counts[said] += 1
    accepted = [t for of_task in good.values() for t in _varied(list(of_task.values()), rules.keep)]
    counts["surplus"] = counts[ACCEPTED] - len(accepted)
    counts[ACCEPTED] = len(accepted)
    return accepted, dict(counts)


def _varied(trajectories: Sequence[Trajectory], keep: int) -> list[Trajectory]:
    """Up to `keep` of one task: first one of each sequence of tools, those of fewest calls before others, then fewest
    sampled tokens."""
    by_cost = sorted(trajectories, key=lambda t: (len(t.calls), int(t.sampled_T.sum()), t.sample))
    first: dict[tuple[str, ...], Trajectory] = {}
    for trajectory in by_cost:
        first.setdefault(tuple(call.name for call in trajectory.calls), trajectory)
    chosen = list(first.values())
    return [*chosen, *(t for t in by_cost if all(t is not c for c in chosen))][:keep]


def distinct(trajectories: Iterable[Trajectory]) -> list[Trajectory]:
    """The first of each (task, tokens): what a later round found again counts once."""
    return list({(t.task_id, t.tokens_T.tobytes()): t for t in reversed(list(trajectories))}.values())[::-1]


# ---- the mix ---------------------------------------------------------------------------------------------------------


def calls_of(episode: Transcript | Trajectory) -> Counter[str]:
    """How often an episode calls each tool."""
    if isinstance(episode, Trajectory):
        return Counter(call.name for call in episode.calls)
    return Counter(call.name for message in episode.messages for call in message.tool_calls)


def mix(recorded: Mapping[str, int], accepted: Sequence[Mapping[str, int]], config: MixConfig) -> list[int]:
    """Which accepted episodes stand beside all recorded transcripts: indices into `accepted`, one as often as it stands there.

    recorded: calls of each tool among the transcripts; accepted: those of each episode. Episodes enter one by one, at most
    `config.repeats` times, each only if every tool's share of all calls then still is `config.tool_floor` of its share among
    the transcripts: a policy that has learnt to do without a tool does not take it out of the data.
    """
    names = sorted({*recorded, *(name for episode in accepted for name in episode)})
    recorded_K = np.array([recorded.get(name, 0) for name in names], np.float64)
    calls_NK = np.array([[episode.get(name, 0) for name in names] for episode in accepted], np.float64).reshape(-1, len(names))
    least_K = config.tool_floor * recorded_K / max(1.0, recorded_K.sum())
    held_K, chosen = recorded_K.copy(), []
    waiting = [i for _ in range(config.repeats) for i in range(len(accepted))]
    while True:
        left = []
        for i in waiting:
            after_K = held_K + calls_NK[i]
            if np.all(after_K >= least_K * after_K.sum() - 1e-9):
                held_K = after_K
                chosen.append(i)
            else:
                left.append(i)
        if len(left) in (0, len(waiting)):  # the others' tools may have made room for what waited
            return sorted(chosen)
        waiting = left


def entropy(calls: Mapping[str, int]) -> float:
    """Of the shares of tools among calls, in bits; 0 without calls."""
    total = sum(calls.values())
    return -sum(n / total * math.log2(n / total) for n in calls.values() if n) + 0.0


# ---- for readers -----------------------------------------------------------------------------------------------------


def as_transcript(tok: Tokenizer, task: Task, trajectory: Trajectory, agent: str) -> Transcript:
    """An accepted episode in the form of recorded ones. Raises ValueError at a call that cannot be read: text has no place
    for it."""
    messages = list(task.messages)
    followups = list(task.followups)
    for segment in trajectory.segments:
        if segment.source is Source.SAMPLED:
            turn = chat.parse_turn(tok.decode(trajectory.tokens_T[segment.start : segment.stop].tolist()))
            calls = tuple(call for call in turn.calls if isinstance(call, ToolCall))
            broken = [call.text for call in turn.calls if isinstance(call, MalformedCall)]
            if broken or not turn.thinking_closed:
                raise ValueError(f"{task.id}, sample {trajectory.sample}: no message says {(broken or [turn.reasoning])[0]!r}")
            messages.append(Message("assistant", turn.content, turn.reasoning, calls))
        elif segment.source is Source.TOOL and segment.observation is not None:
            observation = trajectory.observations[segment.observation]
            messages.append(Message("tool", observation.result.content[: observation.shown], error=observation.result.error))
        elif segment.source is Source.USER and messages[-1].role == "assistant":
            messages.append(Message("user", followups.pop(0)))
    return Transcript(f"{task.id}/{agent}/{trajectory.sample}", task.id, agent, task.tools, tuple(messages))
