"""What a result says: when two results are the same answer, and the facts in one.

Two results are the same when their errors are equal and their contents are equal as parsed JSON, the order of lists
ignored; contents that are not JSON are compared as text.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cacherl_jax.types import ToolResult

Fact = tuple[str, str]  # field name, value as text


MAX_DEPTH = 100  # of a content that is read as JSON; deeper ones are compared as text


def parsed(content: str) -> Any:
    """The content as JSON; text that is none, or is nested too deeply, stands for itself."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content
    deep = content.count("[") + content.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH
    return content if deep else value


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    return depth


def meaning(result: ToolResult) -> str:
    """One text for all results that say the same."""
    return meaning_of(parsed(result.content), result.error)


def meaning_of(value: Any, error: str | None = None) -> str:
    """`meaning` of a parsed content."""
    return f"{error or ''}\n{_ordered(value)}"


def is_negative(result: ToolResult) -> bool:
    """An error, or nothing found: blank text, null, an empty text, list or object. What a text mentions does not matter: a
    payload that contains "404" is a success."""
    return result.error is not None or parsed(result.content.strip() or "null") in (None, "", [], {})


def facts(result: ToolResult) -> Counter[Fact]:
    """Every leaf of a JSON result with the name of its field; a text or a bare value has the name ""."""
    return Counter((name, as_text(value)) for name, value in leaves(parsed(result.content)))


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name of the nearest enclosing field, value) of everything in `value` that is neither an object nor a list."""
    stack = [(name, value)]
    while stack:
        name, node = stack.pop()
        if isinstance(node, dict):
            stack += [(k, v) for k, v in node.items()]
        elif isinstance(node, list):
            stack += [(name, v) for v in node]
        else:
            yield name, node


def as_text(value: Any) -> str:
    """A value as it reads: a text as it is, anything else as JSON with sorted keys."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _ordered(value: Any) -> str:
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ",".join([f"{k!r}:{_ordered(v)}" for k, v in sorted(value.items())]) + "}"
    if isinstance(value, list):
        return "[" + ",".join(sorted([_ordered(v) for v in value])) + "]"
    if isinstance(value, float) and value.is_integer():
        return repr(int(value))  # 1.0 is 1
    return repr(value)
