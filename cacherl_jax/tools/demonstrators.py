"""Agents of stated competence that act live, as real corpora mix them.

expert    follows an accepted reference and answers with what was asked.
stopper   is right as far as it goes, but stops after the first call and answers with what it has: on half of the tasks of
          two calls, always on longer ones.
wanderer  finishes, but on tasks with calls makes one needless call on the way: repeats a call it has just made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import numpy as np

from cacherl_jax.tools.world.phrasing import CANNED
from cacherl_jax.types import Observation, Task, ToolCall

# Share of the tasks of two calls that a stopper cuts.
STOP_SHARE_TWO = 0.5

Plan = tuple[ToolCall, ...]


def expert(task: Task, rng: np.random.Generator) -> Plan:
    return task.references[int(rng.integers(len(task.references)))]


def stopper(task: Task, rng: np.random.Generator) -> Plan:
    plan = expert(task, rng)
    stops = len(plan) > 2 or (len(plan) == 2 and rng.random() < STOP_SHARE_TWO)
    return plan[:1] if stops else plan


def wanderer(task: Task, rng: np.random.Generator) -> Plan:
    plan = expert(task, rng)
    if not plan:
        return plan
    at = int(rng.integers(len(plan)))
    return (*plan[: at + 1], plan[at], *plan[at + 1 :])


DEMONSTRATORS: Mapping[str, Callable[[Task, np.random.Generator], Plan]] = {
    "expert": expert,
    "stopper": stopper,
    "wanderer": wanderer,
}


def reply(task: Task, observations: list[Observation]) -> str:
    """The closing sentence: the fact asked for if a result holds it, else the first thing that the last result says."""
    if not observations:
        fact = task.facts[0]
        return CANNED.get(fact, f"The id is {fact}.")
    for fact in task.facts:
        for observation in reversed(observations):
            for field, value in _fields(observation.result.content):
                if str(value) == fact:
                    return f"The {field} is {value}."
    field, value = _fields(observations[-1].result.content)[0]
    return f"The {field} is {value}."


def _fields(content: str) -> list[tuple[str, object]]:
    value = json.loads(content)
    rows = value if isinstance(value, list) else [value]
    return [item for row in rows for item in row.items()]
