"""Python functions as tools: the schema comes from type hints, descriptions from the docstring.

    @tool(reads="orders")
    def get_order(order_id: str, detail: Literal["short", "full"] = "short") -> dict:
        \"\"\"Get an order.

        Args:
            order_id: as printed on the receipt
        \"\"\"

Hints are read by pydantic: Literal becomes an enum, Annotated[int, Field(ge=1)] a bound, dataclasses and models nested
objects, X | None a nullable type, defaults the schema's. A function with a state (a database, a client) takes it first:
`@tool(state=True)`; `FunctionTools(tools, state=make)` makes one an episode.
"""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pydantic

from cacherl_jax.tools.registry import Tool, ToolError, run_live
from cacherl_jax.types import Effects, Observation, Task, ToolCall, ToolSpec

_ANYTHING: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(Any)


def tool(
    *,
    reads: str | Iterable[str] = (),
    writes: str | Iterable[str] = (),
    stochastic: bool = False,
    time_dependent: bool = False,
    state: bool = False,
) -> Callable[[Callable[..., Any]], Tool]:
    """Makes a function a tool of its name. reads, writes: resources, as a list or one text with spaces between.

    Raises TypeError for a function whose parameters cannot be named in a schema (*args, **kwargs, positional-only), that has
    no hint for one, or that is async.
    """
    effects = Effects(_names(reads), _names(writes), stochastic, time_dependent)

    def make(function: Callable[..., Any]) -> Tool:
        name = function.__name__
        if inspect.iscoroutinefunction(function):
            raise TypeError(f"tool {name} is async; wrap it in a function that waits for it")
        description, about = _documentation(function)
        arguments = _arguments_model(function, state, about)
        properties = arguments.model_json_schema(by_alias=True)
        spec = ToolSpec(name, description, _schema(properties), effects)

        def run(given_state: Any, /, **given: Any) -> Any:
            try:
                checked = arguments.model_validate(given)
            except pydantic.ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                raise ToolError("schema_violation", f"{where}: {first['msg']}") from error
            values = {f.alias: getattr(checked, field) for field, f in arguments.model_fields.items() if f.alias}
            result = function(given_state, **values) if state else function(**values)
            return _ANYTHING.dump_python(result, mode="json")  # dataclasses, models, dates, sets as JSON

        return Tool(spec, run)

    return make


def _names(resources: str | Iterable[str]) -> tuple[str, ...]:
    return tuple(resources.split() if isinstance(resources, str) else resources)


def _arguments_model(function: Callable[..., Any], state: bool, about: Mapping[str, str]) -> type[pydantic.BaseModel]:
    """A model of the function's parameters, without the state. Its fields are numbered, since a parameter may have a name
    that models use themselves; the aliases are the parameters' names."""
    hints = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for i, parameter in enumerate(inspect.signature(function).parameters.values()):
        if i == 0 and state:
            continue
        name = parameter.name
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            kind = parameter.kind.description
            raise TypeError(f"parameter {name} of tool {function.__name__} is {kind}, which no schema can say")
        if name not in hints:
            raise TypeError(f"parameter {name} of tool {function.__name__} has no type hint")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[f"p{i}"] = (hints[name], pydantic.Field(default, alias=name, title=None, description=about.get(name)))
    return pydantic.create_model("Arguments", __config__=pydantic.ConfigDict(extra="forbid"), **fields)


def _schema(model: Mapping[str, Any]) -> dict[str, Any]:
    """Pydantic's schema in the order in which tool definitions are written, without the titles that it makes up."""
    order = ("type", "properties", "required", "additionalProperties", "$defs")
    schema = {"required": [], **model}
    return {name: _tidied(schema[name], name) for name in order if name in schema}


def _tidied(node: Any, name: str = "") -> Any:
    if isinstance(node, list):
        return [_tidied(child) for child in node]
    if not isinstance(node, dict):
        return node
    if name in ("properties", "$defs"):
        return {key: _tidied(child) for key, child in node.items()}
    first = [key for key in ("type", "description") if key in node]
    rest = [key for key in node if key not in (*first, "title")]
    return {key: node[key] if key in ("default", "enum", "const", "examples") else _tidied(node[key], key) for key in first + rest}


def _documentation(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The docstring's first paragraph, and what its Args section says of each parameter (or its ":param x:" lines)."""
    text = inspect.getdoc(function) or ""
    description = " ".join(text.split("\n\n")[0].split())
    about = {name: " ".join(said.split()) for name, said in re.findall(r":param (?:\S+ )?(\w+): *(.+(?:\n +.+)*)", text)}
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", text, re.MULTILINE)
    if section:
        entries = re.findall(r"^( +)(\w+)(?: \([^)]*\))?: *(.*(?:\n\1 +.*)*)", section[1], re.MULTILINE)
        about |= {name: " ".join(said.split()) for _, name, said in entries}
    return description, about


# ---- opened as a provider --------------------------------------------------------------------------------------------


class FunctionSession:
    """One episode's tools with its state."""

    def __init__(self, tools: Mapping[str, Tool], state: Any) -> None:
        self._tools, self._state = tools, state

    def execute(self, call: ToolCall, index: int) -> Observation:
        return run_live(self._tools[call.name], self._state, call)


class FunctionTools:
    """Tools as a provider; `state` makes the state of an episode, None where the tools have none."""

    blocking = True

    def __init__(self, tools: Iterable[Tool], state: Callable[[], Any] | None = None) -> None:
        self.tools = {t.spec.name: t for t in tools}
        self._state = state

    @property
    def specs(self) -> dict[str, ToolSpec]:
        return {name: t.spec for name, t in self.tools.items()}

    def start(self, task: Task | None, sample: int) -> FunctionSession:
        return FunctionSession(self.tools, self._state() if self._state else None)


def load_tools(path: str) -> FunctionTools:
    """The tools at "package.module:NAME": a FunctionTools, or a list or dict of tools; without a name, all of the module's.

    Raises ValueError naming what is wrong with the path.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: no module {error.name!r}; is its folder on PYTHONPATH?") from error
    found = getattr(module, name, None) if name else vars(module)
    if isinstance(found, FunctionTools):
        return found
    members = list(found.values()) if isinstance(found, Mapping) else found if isinstance(found, list | tuple) else []
    tools = [t for t in members if isinstance(t, Tool)]
    if not tools:
        wanted = "a FunctionTools, or a list or dict of tools made with @tool"
        raise ValueError(f"{path}: expected {wanted}; found {type(found).__name__}")
    return FunctionTools(tools)
