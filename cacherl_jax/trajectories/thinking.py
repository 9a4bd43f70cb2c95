"""Hybrid thinking trajectories (paper.md, section 1): reasoning for every assistant message of a recorded trajectory.

Analytical text is wrapped as reasoning, verbatim; in front of user-facing text and of bare calls the teacher writes it; the
final turn always gets written reasoning. Tool calls, results and errors stay byte-identical, which is checked each time.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cacherl_jax.trajectories.teacher import Teacher
from cacherl_jax.types import Message, Transcript


@dataclass
class ThinkingReport:
    """What was done to a set of transcripts: messages wrapped, written, kept (had reasoning), and rejected for a leak."""

    wrapped: int = 0
    written: int = 0
    kept: int = 0
    leaked: int = 0

    def to_json(self) -> dict[str, int]:
        return dataclasses.asdict(self)


def add_thinking(transcript: Transcript, teacher: Teacher, report: ThinkingReport) -> Transcript:
    """`transcript` with reasoning in every assistant message; counts go to `report`.

    Reasoning that names a value which only later results contain is rejected: the message then gets an empty block.
    """
    messages = transcript.messages
    final = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
    out: list[Message] = []
    for i, message in enumerate(messages):
        if message.role != "assistant":
            out.append(message)
        elif message.reasoning:
            report.kept += 1
            out.append(message)
        elif message.content and i != final and teacher.classify(messages[:i], message) == "analytical":
            report.wrapped += 1
            out.append(dataclasses.replace(message, reasoning=message.content, content=""))
        else:
            reasoning = teacher.write(messages[:i], message)
            if leaks(reasoning, messages[:i], message, messages[i + 1 :]):
                report.leaked += 1
                reasoning = ""
            else:
                report.written += 1
            out.append(dataclasses.replace(message, reasoning=reasoning))
    thought = dataclasses.replace(transcript, messages=tuple(out))
    check_unchanged(transcript, thought)
    return thought


def check_unchanged(before: Transcript, after: Transcript) -> None:
    """Raises ValueError naming the first call, result, error or user text that differs."""
    if len(before.messages) != len(after.messages):
        raise ValueError(f"{before.id}: {len(before.messages)} messages became {len(after.messages)}")
    for i, (a, b) in enumerate(zip(before.messages, after.messages, strict=True)):
        if a.role == "assistant":
            a, b = (dataclasses.replace(m, content="", reasoning=None) for m in (a, b))
        if a != b:
            raise ValueError(f"{before.id}, message {i}: {a} became {b}")


_VALUE = re.compile(r"\w+(?:[.@:/-]\w+)*")


def leaks(reasoning: str, past: Sequence[Message], message: Message, future: Sequence[Message]) -> bool:
    """Whether the reasoning names a value that stands in a later tool result and nowhere up to the message itself."""
    known = " ".join([*(m.content for m in past), message.content, *(c.name + c.arguments for c in message.tool_calls)])
    known += " ".join(c.name + c.arguments for m in past for c in m.tool_calls)
    later = {str(v) for m in future if m.role == "tool" for v in _leaves(m.content)}
    return any(word in later and word not in known for word in _VALUE.findall(reasoning))


def _leaves(content: str) -> list[Any]:
    """The scalar values of a result; the whole text where it is not JSON."""
    try:
        stack = [json.loads(content)]
    except ValueError:
        return _VALUE.findall(content)
    leaves = []
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list):
            stack += value
        else:
            leaves.append(value)
    return leaves
