"""Who adds the reasoning. A teacher sees the past and the message itself, never what comes after it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from cacherl_jax.types import Message, ToolCall, ToolSpec

Role = Literal["analytical", "user_facing"]


class Teacher(Protocol):
    """Classifies an assistant message's text and writes the causal reasoning in front of it (paper.md, section 1)."""

    def classify(self, past: Sequence[Message], message: Message) -> Role:
        """Whether the text is the agent's own analysis or addressed to the user."""
        ...

    def write(self, past: Sequence[Message], message: Message) -> str:
        """Why this message, now: the reason for its calls or for answering."""
        ...


class ScriptedTeacher:
    """Reasoning by rule, short and regular, so that a model of a million parameters can learn it: which tool comes next
    and where each of its arguments is from; or why it is time to answer. Works from the specs alone, for any corpus."""

    def __init__(self, specs: Mapping[str, ToolSpec]) -> None:
        self._specs = specs

    def classify(self, past: Sequence[Message], message: Message) -> Role:
        text = message.content.strip().lower()
        return "analytical" if text.startswith(("i need ", "first ", "next ", "then ", "now ")) else "user_facing"

    def write(self, past: Sequence[Message], message: Message) -> str:
        if message.tool_calls:
            steps = [self._why(past, call) for call in message.tool_calls]
            failed = "That failed. " if past and past[-1].role == "tool" and past[-1].error else ""
            return failed + " ".join(steps)
        results = [m for m in past if m.role == "tool"]
        if not results:
            return "No tool is needed."
        return "It is done." if past[-1].role == "tool" else "No more tools are needed."

    def _why(self, past: Sequence[Message], call: ToolCall) -> str:
        try:
            arguments = call.parsed()
        except (ValueError, RecursionError):
            arguments = {}  # no JSON: nothing to say about where its values are from
        if not arguments:
            return f"Next {call.name}."
        sources = {self._source(past, value) for value in arguments.values()}
        return f"Next {call.name} with what {' and '.join(sorted(sources))} gave."

    @staticmethod
    def _source(past: Sequence[Message], value: object) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        for message in reversed(past):
            if text in message.content:
                return "the user" if message.role == "user" else "the tool" if message.role == "tool" else "I"
        return "the user"
