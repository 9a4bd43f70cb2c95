"""Python functions as tools: their schema says what their hints say, and they run with everything else."""

import dataclasses
import datetime
import hashlib
import json
from typing import Annotated, Literal

import pytest
from pydantic import Field

from cacherl_jax.tools.functions import FunctionTools, load_tools, tool
from cacherl_jax.tools.registry import ToolError, check_call
from cacherl_jax.tools.world import tool_specs
from cacherl_jax.types import Effects, ToolCall


@dataclasses.dataclass
class Passenger:
    name: str
    age: int = 30


@tool(reads="flights", writes=["bookings", "flights"], state=True)
def book(
    db: dict,
    flight: str,
    passengers: list[Passenger],
    cabin: Literal["economy", "business"] = "economy",
    seats: Annotated[int, Field(ge=1)] = 1,
    schema: str | None = None,
    day: datetime.date | None = None,
) -> dict:
    """Book a
    flight.

    Longer text is not for the agent.

    Args:
        flight: its number,
            such as f123
        cabin (str): where to sit
    Returns:
        the booking
    """
    if flight not in db:
        raise ToolError("not_found", f"no flight {flight}")
    db[flight] -= seats
    return {"names": [p.name for p in passengers], "left": db[flight], "day": day, "who": passengers[0]}


@tool(stochastic=True, time_dependent=True)
def now() -> datetime.date:
    """Today."""
    return datetime.date(2026, 1, 2)


@tool()
def add(a: float, b: float) -> float:
    """Add.

    :param a: one
    """
    return a + b


def test_the_schema_says_what_the_hints_say():
    assert (book.spec.name, book.spec.description) == ("book", "Book a flight.")
    assert book.spec.effects == Effects(("flights",), ("bookings", "flights"))
    assert now.spec.effects == Effects(stochastic=True, time_dependent=True)
    assert book.spec.parameters == {
        "type": "object",
        "properties": {
            "flight": {"type": "string", "description": "its number, such as f123"},
            "passengers": {"type": "array", "items": {"$ref": "#/$defs/Passenger"}},
            "cabin": {"type": "string", "description": "where to sit", "enum": ["economy", "business"], "default": "economy"},
            "seats": {"type": "integer", "default": 1, "minimum": 1},
            "schema": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
            "day": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}], "default": None},
        },
        "required": ["flight", "passengers"],
        "additionalProperties": False,
        "$defs": {
            "Passenger": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "age": {"type": "integer", "default": 30}},
                "required": ["name"],
                "additionalProperties": False,
            }
        },
    }
    assert list(book.spec.parameters["properties"]["cabin"])[:2] == ["type", "description"]
    assert now.spec.parameters == {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
    assert add.spec.parameters["properties"]["a"] == {"type": "number", "description": "one"}


def test_a_function_runs_as_a_live_tool_with_a_state_of_its_episode():
    provider = FunctionTools([book, now, add], state=lambda: {"f1": 9})
    call = ToolCall.of("book", flight="f1", passengers=[{"name": "Ann"}], seats=2, day="2026-03-04")
    assert check_call(provider.specs, call) is None
    session = provider.start(None, 0)
    first = json.loads(session.execute(call, 0).result.content)
    assert first == {"names": ["Ann"], "left": 7, "day": "2026-03-04", "who": {"name": "Ann", "age": 30}}
    assert json.loads(session.execute(call, 0).result.content)["left"] == 5
    assert json.loads(provider.start(None, 0).execute(call, 0).result.content)["left"] == 7
    missing = session.execute(ToolCall.of("book", flight="f2", passengers=[]), 0).result
    assert missing.error == "not_found"
    assert session.execute(ToolCall.of("now"), 0).result.content == '"2026-01-02"'
    assert session.execute(ToolCall.of("add", a=1, b="x"), 0).result.error == "schema_violation"


def test_the_worlds_definitions_stay_as_models_were_trained_on_them():
    text = json.dumps([dataclasses.asdict(spec) for spec in tool_specs().values()])
    assert hashlib.sha256(text.encode()).hexdigest() == "c4fcb3d2427cf13a0240f401f16d66992ea7a57c3167f842728188940a8bb12c"


def test_functions_that_no_schema_can_describe_are_refused():
    def no_hint(a):
        pass

    def many(*values: int):
        pass

    async def later(a: int):
        pass

    for function, said in ((no_hint, "a .*no type hint"), (many, "values .*variadic"), (later, "async")):
        with pytest.raises(TypeError, match=said):
            tool()(function)


def test_tools_are_found_by_their_path(tmp_path, monkeypatch):
    (tmp_path / "my_tools.py").write_text(
        "from cacherl_jax.tools.functions import FunctionTools, tool\n"
        "@tool()\ndef f(a: int) -> int:\n    return a\n"
        "TOOLS = [f]\nPROVIDER = FunctionTools(TOOLS)\nOTHER = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for path in ("my_tools", "my_tools:TOOLS", "my_tools:PROVIDER"):
        assert list(load_tools(path).specs) == ["f"]
    wrong = {"my_tools:OTHER": "found int", "my_tools:ABSENT": "found NoneType", "absent_module:x": "absent_module"}
    for path, said in wrong.items():
        with pytest.raises(ValueError, match=said):
            load_tools(path)
