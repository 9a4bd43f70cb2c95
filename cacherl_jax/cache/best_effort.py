"""Answers made up for calls that no recording answers: the shape of stored results, or a language model's imitation.

Both are labelled simulated wherever they go. What a shape does not know it says: the text "unknown" stands in every field
whose value nothing supports. null would not do, since tools return it to say that there is nothing.
"""

from __future__ import annotations

import json
import statistics
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacherl_jax.cache import tiers
from cacherl_jax.cache.store import Entry, Recording, SQLiteStore, Store
from cacherl_jax.chat_endpoint import ChatEndpoint, EndpointError
from cacherl_jax.config import CacheConfig, ConfigError, SimulatorConfig
from cacherl_jax.types import Kind, ToolCall, ToolResult, ToolSpec

UNKNOWN = "unknown"
SUPPORT = 3  # calls of different arguments that must agree before a value is believed

# ---- the shape of stored results -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaf:
    """A field without parts. constant: its one value as JSON text, None where it varies or too few calls say so. echoes:
    arguments (by path) whose value it repeats in every stored call that gives them."""

    name: str
    constant: str | None
    echoes: tuple[str, ...]


@dataclass(frozen=True)
class Items:
    """A list: its typical length and the shape of its items."""

    length: int
    item: Shape


Shape = Leaf | Items | dict[str, "Shape"]
# A value in a stored result, the tokens of its call's arguments, and these arguments as text.
_Seen = tuple[Any, tiers.Tokens, str]


def learn_shape(entries: Sequence[Entry]) -> Shape | None:
    """The common shape of a tool's stored results; None where none of them is JSON.

    A field is kept if at least half of the results have it. A list has the median length. A field's value is known where it
    is constant over all stored calls, or repeats one of their arguments, and `SUPPORT` calls of different arguments show it.
    """
    seen: list[_Seen] = []
    for entry in entries:
        try:
            value = json.loads(entry.result.content)
        except (ValueError, RecursionError):
            continue
        seen.append((value, tiers.tokens(entry.arguments), entry.arguments))
    return _shape(seen, "") if seen else None


def fill(shape: Shape, arguments: str) -> ToolResult:
    """A result of the shape for these canonical arguments."""
    return ToolResult(json.dumps(_filled(shape, tiers.tokens(arguments)), ensure_ascii=False))


def _shape(seen: Sequence[_Seen], name: str) -> Shape:
    kinds = Counter("dict" if isinstance(v, dict) else "list" if isinstance(v, list) else "leaf" for v, _, _ in seen)
    kind = max(sorted(kinds), key=lambda k: kinds[k])
    if kind == "dict":
        fields: dict[str, list[_Seen]] = {}
        for value, asked, text in seen:
            for key, child in value.items() if isinstance(value, dict) else ():
                fields.setdefault(key, []).append((child, asked, text))
        return {key: _shape(children, key) for key, children in fields.items() if 2 * len(children) >= kinds["dict"]}
    if kind == "list":
        lists = [(v, asked, text) for v, asked, text in seen if isinstance(v, list)]
        items = [(item, asked, text) for v, asked, text in lists for item in v]
        length = statistics.median_low(len(v) for v, _, _ in lists)
        return Items(length, _shape(items, name)) if items else Items(0, {})
    return _leaf([s for s in seen if not isinstance(s[0], dict | list)], name)


def _leaf(seen: Sequence[_Seen], name: str) -> Leaf:
    values = {json.dumps(value) for value, _, _ in seen}
    paths = sorted({path for _, asked, _ in seen for path in asked})
    believed = len({text for _, _, text in seen}) >= SUPPORT
    return Leaf(name, values.pop() if len(values) == 1 and believed else None, tuple(p for p in paths if _echoes(seen, p)))


def _echoes(seen: Sequence[_Seen], path: str) -> bool:
    given = [(tiers.tokens(json.dumps({"": value}))[""], asked[path], text) for value, asked, text in seen if path in asked]
    return len({text for _, _, text in given}) >= SUPPORT and all(value == argument for value, argument, _ in given)


def _filled(shape: Shape, asked: tiers.Tokens) -> Any:
    if isinstance(shape, dict):
        return {key: _filled(child, asked) for key, child in shape.items()}
    if isinstance(shape, Items):
        return [_filled(shape.item, asked)] * shape.length
    repeated = {path: asked[path] for path in shape.echoes if path in asked}
    # A constant may be an argument that never varied in the recordings; only one of the same name settles it.
    own = [value for path, value in repeated.items() if path.rpartition(".")[2] == shape.name]
    texts = {text if kind != "str" else json.dumps(text) for kind, text in own or repeated.values()}
    if not own and shape.constant is not None:
        texts.add(shape.constant)
    return json.loads(texts.pop()) if len(texts) == 1 else UNKNOWN


# ---- a language model in the tool's place ----------------------------------------------------------------------------

INSTRUCTIONS = (
    "You stand in for a tool. Reply with the result that the tool would return for the last call, and with nothing else. "
    "Keep the form of the example results. Do not explain."
)


class SimulatorError(Exception):
    """The endpoint gave no usable reply; the message says why in a few words."""


def open_simulator(config: CacheConfig, replies: Path) -> Simulator | None:
    """The simulator that `config` asks for, which keeps its replies in a store at `replies`; None where it asks for none."""
    return Simulator(config.simulator, SQLiteStore(replies, mode="rw")) if config.best_effort == "simulator" else None


class Simulator:
    """Asks an OpenAI-compatible endpoint once a call. Replies go to `side`, a store of their own: the same call gets the
    same text ever after, of kind simulated.

    Raises MissingExtra without the client, ConfigError where `side` holds the replies of another model.
    """

    def __init__(self, config: SimulatorConfig, side: Store) -> None:
        self._endpoint = ChatEndpoint(config)
        model = side.metadata().get("simulator")
        if model not in (None, config.model):
            raise ConfigError(
                f"cache.simulator.model={config.model!r}: the store of replies holds those of {model!r}; choose another file"
            )
        side.set_metadata("simulator", config.model)
        self._config, self._side = config, side
        self._asking: dict[bytes, threading.Lock] = {}  # by key: rollouts of one task ask the same at the same time

    def simulate(self, key: bytes, call: ToolCall, spec: ToolSpec, writes: str, examples: Sequence[Entry]) -> Entry:
        """The stored reply for `key`, or a new one. Raises SimulatorError where the endpoint gives none; nothing is stored then."""
        with self._asking.setdefault(key, threading.Lock()):
            if not (stored := self._side.get(key)):
                content = self._ask(simulator_messages(call, spec, writes, examples))
                if any(_is_json(e.result.content) for e in examples):
                    content = _without_fence(content)
                    if not _is_json(content):
                        raise SimulatorError("the reply is not JSON")
                self._side.add(Recording(key, call.name, call.arguments, writes, ToolResult(content), kind=Kind.SIMULATED))
                stored = self._side.get(key)
        return stored[0]

    def _ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        try:
            content, cut = self._endpoint.ask(messages)
        except EndpointError as error:
            raise SimulatorError(str(error)) from error
        if cut or not isinstance(content, str) or not content.strip():
            raise SimulatorError(f"the reply is longer than {self._config.max_tokens} tokens" if cut else "the reply is empty")
        return content.strip()


def simulator_messages(call: ToolCall, spec: ToolSpec, writes: str, examples: Sequence[Entry]) -> list[dict[str, str]]:
    """The prompt: the tool's schema, the nearest stored calls with their results, the episode's writes, the call."""
    parts = [f"The tool:\n{json.dumps(spec.to_function()['function'], ensure_ascii=False)}"]
    parts += [f"A call:\n{e.arguments}\nIts result:\n{e.result.content}" for e in reversed(examples)]  # the nearest comes last
    if writes:
        parts.append(f"Done before in this conversation:\n{writes}")
    parts.append(f"The call:\n{call.arguments}\nIts result:")
    return [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": "\n\n".join(parts)}]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _without_fence(text: str) -> str:
    """The inside of a Markdown code block, where the whole reply is one."""
    lines = text.splitlines()
    fenced = len(lines) > 2 and lines[0].startswith("```") and lines[-1].strip() == "```"
    return "\n".join(lines[1:-1]) if fenced else text
