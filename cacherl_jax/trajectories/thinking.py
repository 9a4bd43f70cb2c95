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
    out: list[Message] = []
    for i, message in enumerate(messages):
        if message.role != "assistant":
            out.append(message)
        elif message.reasoning:
            report.kept += 1
            out.append(message)
        elif _goes_on(messages, i) and message.content and teacher.classify(messages[:i], message) == "analytical":
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


def _goes_on(messages: Sequence[Message], i: int) -> bool:
    """Whether the assistant acts on before the user speaks again. Text that ends its turn is for the user, however it
    sounds: as reasoning it would leave the turn empty."""
    return bool(messages[i].tool_calls) or (i + 1 < len(messages) and messages[i + 1].role == "assistant")


def check_unchanged(before: Transcript, after: Transcript) -> None:
    """Raises ValueError naming the first call, result, error or user text that differs."""
    if len(before.messages) != len(after.messages):
        raise ValueError(f"{before.id}: {len(before.messages)} messages became {len(after.messages)}")
    for i, (a, b) in enumerate(zip(before.messages, after.messages, strict=True)):
        if a.role == "assistant":
            a, b = (dataclasses.replace(m, content="", reasoning=None) for m in (a, b))
        if a != b:
            raise ValueError(f"{before.id}, message {i}: {a} became {b}")


_WORD = re.compile(r"\w+(?:[.@:/-]\w+)*")


def leaks(reasoning: str, past: Sequence[Message], message: Message, future: Sequence[Message]) -> bool:
    """Whether the reasoning names a value, of one word or several, that stands in a later tool result and nowhere up to the
    message itself."""
    calls = [c for m in (*past, message) for c in m.tool_calls]
    known = _words(" ".join([*(m.content for m in (*past, message)), *(f"{c.name} {c.arguments}" for c in calls)]))
    said = _words(reasoning)
    later = {_words(str(v)) for m in future if m.role == "tool" for v in _leaves(m.content)}
    return any(value.strip() and value in said and value not in known for value in later)


def _words(text: str) -> str:
    """The words of a text in one form, each between spaces, so that a run of words is found as a substring."""
    return f" {' '.join(_WORD.findall(text.lower()))} "


def _leaves(content: str) -> list[Any]:
    """The scalar values of a result as JSON writes them; the words of a text that is not JSON."""
    try:
        stack = [json.loads(content)]
    except (ValueError, RecursionError):
        return _WORD.findall(content)
    leaves = []
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list):
            stack += value
        else:
            leaves.append(value if isinstance(value, str) else json.dumps(value))
    return leaves
