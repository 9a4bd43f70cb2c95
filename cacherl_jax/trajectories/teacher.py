"""Who adds the reasoning. A teacher sees the past and the message itself, never what comes after it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import jsonschema

from cacherl_jax.config import TeacherConfig
from cacherl_jax.trajectories import prompts
from cacherl_jax.trajectories.prompts import Request
from cacherl_jax.types import Message, ToolCall, ToolSpec

Role = Literal["analytical", "user_facing"]


@dataclass(frozen=True)
class Reply:
    """What a language model said. problem: why `text` cannot be used: "cut" at max_tokens, "refused" by the endpoint, which
    may also have "failed" on it at every try."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Answer:
    """A role or a reasoning, and what it took. problem: why there is none."""

    value: str = ""
    problem: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Model(Protocol):
    """A language model as teachers see it: an endpoint, a policy of ours, either behind a store of paid replies."""

    async def complete(self, request: Request) -> Reply: ...


class Teacher(Protocol):
    """Classifies an assistant message's text and writes the causal reasoning in front of it (paper.md, section 1).

    name, prompt: who that is, and the hash of the prompts, for the provenance. draws: whether another attempt, counted from
    0, may answer otherwise.
    """

    draws: bool

    @property
    def name(self) -> str: ...

    @property
    def prompt(self) -> str: ...

    async def classify(self, past: Sequence[Message], message: Message, attempt: int = 0) -> Answer:
        """Whether the text is the agent's own analysis or addressed to the user: a `Role`."""
        ...

    async def write(self, past: Sequence[Message], message: Message, attempt: int = 0) -> Answer:
        """Why this message, now: the reason for its calls or for answering."""
        ...


class LanguageTeacher:
    """A language model with two fixed prompts. Replies that are no JSON of the asked form become problems."""

    def __init__(self, model: Model | None, name: str, specs: Mapping[str, ToolSpec], config: TeacherConfig, seed: int) -> None:
        self.name, self.prompt = name, prompts.prompt_hash()
        self.draws = config.kind != "policy" or config.temperature > 0  # endpoints vary at temperature 0 as well
        self._model, self._specs, self._config, self._seed = model, specs, config, seed

    def requests(self, past: Sequence[Message], message: Message, *, classifies: bool) -> Iterator[Request]:
        """What a message costs at most, if no reply is rejected."""
        if classifies:
            yield self._classification(past, message, 0)
        yield self._writing(past, message, 0)

    async def classify(self, past: Sequence[Message], message: Message, attempt: int = 0) -> Answer:
        return await self._ask(self._classification(past, message, attempt))

    async def write(self, past: Sequence[Message], message: Message, attempt: int = 0) -> Answer:
        return await self._ask(self._writing(past, message, attempt))

    def _classification(self, past: Sequence[Message], message: Message, attempt: int) -> Request:
        return self._request(prompts.classify(past, message, self._config.max_past), "role", attempt)

    def _writing(self, past: Sequence[Message], message: Message, attempt: int) -> Request:
        return self._request(prompts.write(past, message, self._specs, self._config.max_past), "reasoning", attempt)

    def _request(self, messages: prompts.Chat, schema: str, attempt: int) -> Request:
        config = self._config
        return Request(self.name, messages, schema, config.temperature, config.max_tokens, self._seed + attempt)

    async def _ask(self, request: Request) -> Answer:
        if self._model is None:
            raise ValueError("a teacher without a model counts requests and makes none")
        reply = await self._model.complete(request)
        value, problem = ("", reply.problem) if reply.problem else _parsed(reply.text, request.schema)
        return Answer(value, problem, reply.prompt_tokens, reply.completion_tokens)


_VALID = {name: jsonschema.Draft202012Validator(schema) for name, schema in prompts.SCHEMAS.items()}


def _parsed(text: str, schema: str) -> tuple[str, str]:
    """The reply's one field, or why it has none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return "", "no_json" if text.strip() else "empty"
    return (value[schema].strip(), "") if _VALID[schema].is_valid(value) else ("", "wrong_schema")


# What an agent says to somebody, not to itself: a question, a second person, a courtesy.
_TO_USER = re.compile(r"\?|\b(?:you|your|yours|please|thanks?|thank|sorry|apologi[sz]e|welcome)\b", re.IGNORECASE)


class ScriptedTeacher:
    """Reasoning by rule, short and regular, so that a model of a million parameters can learn it: which tool comes next
    and where each of its arguments is from; or why it is time to answer. Works from the specs alone, for any corpus."""

    name, prompt, draws = "scripted", "", False

    def __init__(self, specs: Mapping[str, ToolSpec]) -> None:
        self._specs = specs

    async def classify(self, past: Sequence[Message], message: Message, attempt: int = 0) -> Answer:
        return Answer("user_facing" if _TO_USER.search(message.content) else "analytical")

    async def write(self, past: Sequence[Message], message: Message, attempt: int = 0) -> Answer:
        if message.tool_calls:
            steps = [self._why(past, call) for call in message.tool_calls]
            failed = "That failed. " if past and past[-1].role == "tool" and past[-1].error else ""
            return Answer(failed + " ".join(steps))
        results = [m for m in past if m.role == "tool"]
        if not results:
            return Answer("No tool is needed.")
        return Answer("It is done." if past[-1].role == "tool" else "No more tools are needed.")

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
