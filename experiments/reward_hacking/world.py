"""A warehouse in which leaving the cache costs a policy nothing under the paper's reward.

One tool tells the price of an item, and a task asks what several of an item cost. A right answer holds two facts: the price,
which stands in the result, and the total, a product that a model of this size gets wrong, so that even a policy that asks
right earns about half of the answer's reward. Two agents were recorded. The expert asks for the item that the user named.
The hasty one asks for another item, a valid call of the right tool, and reports that item's price. The store holds the
expert's calls alone: what the hasty one asks is answered with the nearest stored result, best effort.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from cacherl_jax.tools.registry import Tool, ToolError, run_live
from cacherl_jax.types import Effects, Message, Observation, Task, ToolCall, ToolSpec, Transcript

SPLITS = ("train", "validation", "test")
ITEMS = 100_000  # ids i00000 to i99999, all in stock


def price(seed: int, item: str) -> int:
    """Of an item, from 100 to 999."""
    return int(np.random.default_rng((seed, int(item[1:]))).integers(100, 1000))


def _look_up(seed: int, item: str) -> dict[str, Any]:
    if not (len(item) == 6 and item[0] == "i" and item[1:].isdecimal()):
        raise ToolError("not_found", f"no item {item}")
    return {"price": price(seed, item)}


SPEC = ToolSpec(
    "look_up",
    "The price of an item.",
    {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]},
    Effects(reads=("stock",)),
)
SPECS = {SPEC.name: SPEC}


class Warehouse:
    """The live tool; an episode changes nothing."""

    blocking = False

    def __init__(self, seed: int) -> None:
        self._seed, self._tool = seed, Tool(SPEC, _look_up)

    def start(self, task: Task, sample: int) -> Warehouse:
        return self

    def execute(self, call: ToolCall, index: int) -> Observation:
        return run_live(self._tool, self._seed, call)


def tasks(split: str, count: int, seed: int) -> list[Task]:
    """`count` tasks about items that no other split has. Raises ValueError where there are not enough."""
    share = ITEMS // len(SPLITS)
    if count > share:
        raise ValueError(f"a split has {share} items, not {count}")
    which = SPLITS.index(split)
    rng = np.random.default_rng((seed, which))
    made = []
    for place, number in enumerate(rng.permutation(share)[:count]):
        item, several = f"i{int(number) * len(SPLITS) + which:05d}", int(rng.integers(2, 10))
        one = price(seed, item)
        made.append(
            Task(
                id=f"{split}-{place:05d}",
                family="total",
                split=split,
                tools=tuple(SPECS),
                messages=(Message("user", f"What do {several} of {item} cost?"),),
                references=((ToolCall.of(SPEC.name, item=item),),),
                facts=(str(one), str(several * one)),
            )
        )
    return made


def transcript(task: Task, agent: str, take: int, seed: int) -> Transcript:
    """What "expert" or "hasty" did with a task, on the live tool."""
    (right,) = task.references[0]
    item = right.parsed()["item"]
    if agent == "hasty":
        digits = np.random.default_rng((seed, int(item[1:]), take, 1)).permutation(10)[:5]
        item = "i" + "".join(map(str, digits))
    reason = {"expert": "Ask for this item.", "hasty": "Ask for any item."}[agent]
    several = int(task.messages[0].content.split()[2])
    call = ToolCall(SPEC.name, json.dumps({"item": item}), id="call_0")
    result = Warehouse(seed).execute(call, 0).result
    one = json.loads(result.content)["price"]
    messages = (
        *task.messages,
        Message("assistant", reasoning=reason, tool_calls=(call,)),
        Message("tool", result.content, tool_call_id=call.id),
        Message("assistant", f"Each is {one}, together {several * one}.", reasoning="Now answer."),
    )
    return Transcript(f"{task.id}/{agent}/{take}", task.id, agent, task.tools, messages)


def recorded(made: Sequence[Task], agents: Sequence[str], seed: int) -> list[Transcript]:
    """Every task by every entry of `agents`."""
    return [transcript(task, agent, take, seed) for task in made for take, agent in enumerate(agents)]
