"""Live tools: their functions, typed errors, checks before a call, and the guard that keeps training away from them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jsonschema

from cacherl_jax.types import Effects, Kind, Observation, Tier, ToolCall, ToolResult, ToolSpec


class ToolError(Exception):
    """A failure that the agent is to read, such as ToolError("not_found", "no order o417")."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class LiveToolError(RuntimeError):
    """A live tool was called where none may be reached."""


@dataclass(frozen=True)
class Tool:
    """A tool that can be run: `run(state, **arguments)` returns a JSON value or raises ToolError."""

    spec: ToolSpec
    run: Callable[..., Any]


def error_result(kind: str, message: str) -> ToolResult:
    """A failure as the agent reads it."""
    return ToolResult(json.dumps({"error": kind, "message": message}, ensure_ascii=False), error=kind)


def check_call(specs: Mapping[str, ToolSpec], call: ToolCall) -> ToolResult | None:
    """None when the call can be executed; else the typed error to answer it with: unknown_tool, malformed_arguments or
    schema_violation. The agent loop and the recording of demonstrations use the same check."""
    spec = specs.get(call.name)
    if spec is None:
        return error_result("unknown_tool", f"no tool {call.name[:64]!r}")
    try:
        arguments = call.parsed()
    except (ValueError, RecursionError) as error:
        return error_result("malformed_arguments", str(error)[:120])
    violation = next(iter(_validator(json.dumps(spec.parameters, sort_keys=True)).iter_errors(arguments)), None)
    if violation is not None:
        return error_result("schema_violation", violation.message[:120])
    return None


@lru_cache(maxsize=4096)
def _validator(schema: str) -> jsonschema.Draft202012Validator:
    parsed = json.loads(schema)
    jsonschema.Draft202012Validator.check_schema(parsed)
    return jsonschema.Draft202012Validator(parsed)


def specs_to_json(specs: Mapping[str, ToolSpec]) -> list[dict[str, Any]]:
    """Tool definitions as a JSON array: files and stores keep them so."""
    return [dataclasses.asdict(spec) for spec in specs.values()]


def specs_from_json(rows: Sequence[Mapping[str, Any]]) -> dict[str, ToolSpec]:
    specs = {}
    for row in rows:
        effects = row["effects"]
        specs[row["name"]] = ToolSpec(
            row["name"],
            row["description"],
            row["parameters"],
            Effects(tuple(effects["reads"]), tuple(effects["writes"]), effects["stochastic"], effects["time_dependent"]),
        )
    return specs


_guards: list[object] = []  # of the whole process: a thread that a tool runs in is guarded as well
_live_calls = itertools.count()
_live_seen = 0


@contextlib.contextmanager
def forbid_live() -> Iterator[None]:
    """Inside, running a live tool raises LiveToolError, in whatever thread."""
    guard = object()
    _guards.append(guard)
    try:
        yield
    finally:
        _guards.remove(guard)


def live_call_count() -> int:
    """Live executions in this process so far, refused attempts included."""
    return _live_seen


def refuse_live(call: ToolCall) -> None:
    """Raises LiveToolError inside `forbid_live()`. Whoever is about to reach a live tool asks here first."""
    if _guards:
        raise LiveToolError(f"live tool {call.name} was called where only the cache may answer: {call.arguments[:200]}")


def run_live(tool: Tool, state: Any, call: ToolCall) -> Observation:
    """Runs a tool on a call that `check_call` accepted. ToolError becomes a result; anything else is a bug and is raised.

    Raises LiveToolError inside `forbid_live()`.
    """
    global _live_seen
    _live_seen = next(_live_calls) + 1
    refuse_live(call)
    try:
        value = tool.run(state, **call.parsed())
        result = ToolResult(json.dumps(value, ensure_ascii=False))
    except ToolError as error:
        result = error_result(error.kind, str(error))
    return Observation(call, result, Tier.LIVE, Kind.LIVE)
