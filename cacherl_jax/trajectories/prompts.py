"""What a language model is asked as a teacher: fixed prompts, the schemas of its replies, and the requests made of them.

A prompt shows the past and the message itself. What comes later is no argument of any function here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cacherl_jax.types import Message, ToolSpec

CLASSIFY = (
    "You read one message of an agent that solves a task with tools. Say whom its text addresses. "
    '"analytical": the agent thinks aloud about what it knows, what it needs or what it does next. '
    '"user_facing": it tells, asks or confirms something to the user. '
    'Reply with JSON and nothing else: {"role": "analytical"} or {"role": "user_facing"}.'
)
WRITE = (
    "You write the private reasoning of an agent that solves a task with tools. You see the conversation so far and the agent's "
    "next message. Write what the agent thinks right before that message: why this, why now. For a call: what is known, what is "
    "missing, why this tool, where each argument's value is from. For an answer: why nothing more is to be done. "
    "Use only what the conversation shows; never guess what a tool will return. Speak as the agent, in the first person, in "
    "two to six plain sentences. Do not repeat the message's own text. "
    'Reply with JSON and nothing else: {"reasoning": "..."}.'
)
ROLE = {
    "type": "object",
    "properties": {"role": {"type": "string", "enum": ["analytical", "user_facing"]}},
    "required": ["role"],
    "additionalProperties": False,
}
REASONING = {
    "type": "object",
    "properties": {"reasoning": {"type": "string"}},
    "required": ["reasoning"],
    "additionalProperties": False,
}
SCHEMAS: Mapping[str, dict[str, Any]] = {"role": ROLE, "reasoning": REASONING}
LEFT = 200  # characters that stay of a result that is cut

Chat = tuple[tuple[str, str], ...]  # (role, content) of each message of a prompt


def prompt_hash() -> str:
    """Of everything fixed in the prompts: results of one hash are comparable."""
    return _sha256([CLASSIFY, WRITE, SCHEMAS, LEFT])[:16]


@dataclass(frozen=True)
class Request:
    """One question to a language model, wherever it runs. schema: a name of SCHEMAS. seed: of its draw."""

    model: str
    messages: Chat
    schema: str
    temperature: float
    max_tokens: int
    seed: int

    @cached_property
    def key(self) -> str:
        """Names the request by its content, the same on every endpoint."""
        parts = [self.model, self.messages, SCHEMAS[self.schema], self.temperature, self.max_tokens, self.seed]
        return _sha256(parts)

    @property
    def prompt_tokens(self) -> int:
        """An estimate from above for most languages: three bytes a token, and what the chat format adds."""
        return sum(len(text.encode()) // 3 + 8 for _, text in self.messages)


def classify(past: Sequence[Message], message: Message, limit: int) -> Chat:
    """Whom the text addresses. Cheap: of the past, the user's last words alone."""
    said = next((m.content for m in reversed(past) if m.role == "user"), "")
    asked = f"The user said last:\n{_shorter(said, limit // 4)}\n\nThe agent's message:\n{_shorter(message.content, limit // 4)}"
    if message.tool_calls:
        asked += f"\n\nWith it come calls of {', '.join(call.name for call in message.tool_calls)}."
    return ("system", CLASSIFY), ("user", _plain(asked))


def write(past: Sequence[Message], message: Message, specs: Mapping[str, ToolSpec], limit: int) -> Chat:
    """Why this message. `limit`: characters of the past."""
    called = dict.fromkeys(call.name for call in message.tool_calls)
    tools = [f"{name}: {_shorter(specs[name].description, 500)}" for name in called if name in specs]
    parts = [f"The conversation so far:\n{_past(past, limit)}"]
    parts += ["The tools that are called next:\n" + "\n".join(tools)] if tools else []
    parts.append(f"The agent's next message:\n{_shorter(_block(message), limit)}")
    return ("system", WRITE), ("user", _plain("\n\n".join(parts)))


def _past(past: Sequence[Message], limit: int) -> str:
    """The messages as text of at most about `limit` characters. Where they are longer, results are cut, the oldest first;
    then the oldest messages go; what is left says so."""
    blocks = [_block(message) for message in past]
    surplus = sum(map(len, blocks)) - limit
    for i, message in enumerate(past):
        if surplus > 0 and message.role == "tool" and len(blocks[i]) > 2 * LEFT:
            cut = _shorter(blocks[i], LEFT)
            surplus -= len(blocks[i]) - len(cut)
            blocks[i] = cut
    dropped = 0
    while surplus > 0 and dropped < len(blocks) - 1:
        surplus -= len(blocks[dropped])
        dropped += 1
    blocks = blocks[dropped:]
    if surplus > 0 and blocks:
        blocks = [_shorter(blocks[0], limit)]
    return "\n\n".join([f"[{dropped} earlier messages are left out]"] * bool(dropped) + blocks)


def _block(message: Message) -> str:
    head = {"tool": "tool result", "assistant": "agent"}.get(message.role, message.role)
    head += f" (error: {message.error})" if message.error else ""
    calls = [f"calls {call.name} {call.arguments}" for call in message.tool_calls]
    return "\n".join([f"[{head}]", *filter(None, [message.content]), *calls])


def _shorter(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} [... {len(text) - limit} characters are left out]"


def _plain(text: str) -> str:
    """Halves of surrogate pairs, which JSON can smuggle in and UTF-8 cannot spell, join or become U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
