"""The gate of the fuzzy tier: arguments whose values must agree before a similar call may answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cacherl_jax.types import ToolSpec


def gate_values(arguments: str, spec: ToolSpec | None, gate: Sequence[str]) -> str:
    """The values, at any depth, of the arguments whose schema has a type in `gate` ("enum": lists its values), as one text.

    A stored call may answer another one fuzzily only where these texts are equal; an absent argument agrees with an absent
    one alone. Text that is no JSON has no such values.
    """
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return "{}"
    return json.dumps(dict(_gated(value, spec.parameters if spec else {}, gate, "")), sort_keys=True)


def _gated(value: Any, schema: Any, gate: Sequence[str], path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(schema, Mapping):
        return
    types = schema.get("type", ())
    named = {types} if isinstance(types, str) else set(types)
    if ("enum" in gate and "enum" in schema) or named & set(gate):
        yield path, value
    elif isinstance(value, dict):
        for name, child in sorted(value.items()):
            yield from _gated(child, schema.get("properties", {}).get(name), gate, f"{path}.{name}")
    elif isinstance(value, list):
        for i, child in enumerate(value):
            yield from _gated(child, schema.get("items"), gate, f"{path}[{i}]")
