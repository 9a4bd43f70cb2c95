"""What makes two calls the same: canonical text of (tool, arguments), the writes that came before, and their SHA-256.

raw        name and arguments as recorded, keys sorted. For published figures.
canonical  by the tool's schema: key order, number forms, defaults filled in, Unicode composed.
state      canonical, plus the episode's successful earlier writes to resources which this call reads or writes: the same
           question before and after a write to the same state is two questions.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from cacherl_jax.types import ToolCall, ToolSpec

KeyMode = Literal["raw", "canonical", "state"]
Write = tuple[frozenset[str], str]  # resources written, canonical call


def canonical_arguments(arguments: str, spec: ToolSpec | None) -> str:
    """The arguments' canonical JSON text. Text that is not a JSON object stands for itself, composed."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return unicodedata.normalize("NFC", arguments)
    return _dump(_canonical(value, spec.parameters if spec else {}))


def canonical_call(call: ToolCall, spec: ToolSpec | None) -> str:
    """One text for all ways of writing the same call; what process accuracy compares."""
    return f"{unicodedata.normalize('NFC', call.name)} {canonical_arguments(call.arguments, spec)}"


def raw_call(call: ToolCall) -> str:
    """Name and arguments as recorded, keys sorted."""
    try:
        return f"{call.name} {json.dumps(json.loads(call.arguments), sort_keys=True)}"
    except (ValueError, RecursionError):
        return f"{call.name} {call.arguments}"


def relevant_writes(spec: ToolSpec | None, earlier: Sequence[Write]) -> list[str]:
    """The earlier writes, in order, that this tool's answer may depend on. An unknown tool depends on all of them."""
    if spec is None:
        return [text for _, text in earlier]
    return [text for resources, text in earlier if resources & spec.effects.touches]


def call_key(call: ToolCall, spec: ToolSpec | None, mode: KeyMode, earlier: Sequence[Write] = ()) -> bytes:
    """The 32-byte key of a call. `earlier`: the episode's successful writes so far; only mode "state" reads them."""
    if mode == "raw":
        return hashlib.sha256(raw_call(call).encode("utf-8", "surrogatepass")).digest()
    parts = [canonical_call(call, spec)]
    if mode == "state":
        parts += relevant_writes(spec, earlier)
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).digest()


def _canonical(value: Any, schema: Mapping[str, Any]) -> Any:
    kind = schema.get("type")
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        out = {unicodedata.normalize("NFC", k): _canonical(v, properties.get(k, {})) for k, v in value.items()}
        for name, child in properties.items():
            if name not in out and "default" in child:
                out[name] = _canonical(child["default"], child)
        return out
    if isinstance(value, list):
        return [_canonical(v, schema.get("items", {})) for v in value]
    if isinstance(value, str):
        value = unicodedata.normalize("NFC", value)
        return _number(value) if kind in ("integer", "number") else value
    if isinstance(value, bool) or value is None:
        return value
    if kind == "string":
        return _dump(_plain_number(value))
    return _plain_number(value)


def _number(text: str) -> Any:
    """A numeric string where the schema wants a number; any other text unchanged."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return _plain_number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else text


def _plain_number(value: float) -> int | float | str:
    """1.0 and 1e0 as 1, -0.0 as 0; NaN and infinities by name, since JSON has none."""
    if isinstance(value, int):
        return value
    if not math.isfinite(value):
        return repr(value)
    return int(value) if value.is_integer() else value


# Made once: json.dumps makes an encoder a call where any option is set.
_dump = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode
