"""Recording: agents act on live tools, and what they said and saw becomes transcripts."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cacherl_jax.tools.demonstrators import DEMONSTRATORS, reply
from cacherl_jax.tools.registry import check_call
from cacherl_jax.types import Message, Observation, Task, ToolCall, ToolProvider, ToolSpec, Transcript


def record(
    tasks: Sequence[Task], agents: Sequence[str], provider: ToolProvider, specs: Mapping[str, ToolSpec], seed: int
) -> Iterator[Transcript]:
    """One transcript a task and entry of `agents`; an agent named twice acts twice, with draws of its own.

    Raises ValueError for an unknown agent.
    """
    for agent in agents:
        if agent not in DEMONSTRATORS:
            raise ValueError(f"demonstrator {agent!r} is none of {', '.join(DEMONSTRATORS)}")
    for task in tasks:
        acted: Counter[str] = Counter()
        for agent in agents:
            yield _act(task, agent, acted[agent], provider, specs, seed)
            acted[agent] += 1


def _act(task: Task, agent: str, take: int, provider: ToolProvider, specs: Mapping[str, ToolSpec], seed: int) -> Transcript:
    rng = np.random.default_rng((seed, zlib.crc32(f"{task.id}/{agent}/{take}".encode())))
    session = provider.start(task, take)
    messages = list(task.messages)
    observations: list[Observation] = []
    for turn, planned in enumerate(DEMONSTRATORS[agent](task, rng)):
        call = ToolCall(planned.name, planned.arguments, id=f"call_{turn}")
        if (refused := check_call(specs, call)) is not None:
            raise ValueError(f"task {task.id}: the demonstrator's call is refused: {refused.content}")
        observation = session.execute(call, turn)
        observations.append(observation)
        result = observation.result
        messages.append(Message("assistant", tool_calls=(call,)))
        messages.append(Message("tool", result.content, tool_call_id=call.id, error=result.error))
    messages.append(Message("assistant", reply(task, observations)))
    return Transcript(f"{task.id}/{agent}/{take}", task.id, agent, task.tools, tuple(messages))
