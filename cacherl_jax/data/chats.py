"""A user's own trajectory files, one record a line (JSON Lines) or one JSON list a file, compressed or not.

openai   {"messages": [...]} in the form of OpenAI's chat API, calls in `tool_calls`; or the bare list of messages
hermes   {"conversations": [{"from", "value"}]} or {"messages": [{"role", "content"}]}, calls and results in the text as
         <tool_call>{"name", "arguments"}</tool_call> and <tool_response>...</tool_response>, as Hermes and Qwen write them

A record may have `tools` (definitions, or their JSON text, or names), `id`, `task_id` and `agent`. Without an id a record is
named by its file and line. Tools without a definition get an inferred one. Of two definitions of one name the first holds.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cacherl_jax.config import ConfigError
from cacherl_jax.data.recorded import Recorded, Report, find, infer_specs, line_records, list_records, pair_results
from cacherl_jax.text.chat import TOOLS_HEAD, TOOLS_TAIL, MalformedCall, parse_turn
from cacherl_jax.types import Message, ToolCall, ToolSpec, Transcript

LICENCE = "not stated"  # the files are the user's
NO_PARAMETERS = {"type": "object", "properties": {}}
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_call": "assistant",
}  # fmt: skip

Chat = tuple[list[Message], list[Any]]  # messages and tool definitions of a record


def read_openai(path: Path) -> Recorded:
    """Opens a file or a folder of files in OpenAI's form. Raises ConfigError when there is none."""
    return _open(path, "openai", openai_chat)


def read_hermes(path: Path) -> Recorded:
    """Opens a file or a folder of files in the form of Hermes and Qwen. Raises ConfigError when there is none."""
    return _open(path, "hermes", hermes_chat)


def _open(path: Path, agent: str, chat_of: Callable[[Any, Report], Chat]) -> Recorded:
    files = (path,) if path.is_file() else tuple(sorted([*find(path, "*.jsonl"), *find(path, "*.json")], key=lambda p: p.name))
    if not files:
        raise ConfigError(f"{path} holds no *.jsonl or *.json (compressed or not); give a file of conversations or its folder")
    specs: dict[str, ToolSpec] = {}
    corpus = Recorded(
        files=files,
        specs=specs,
        records=_records,
        convert=lambda record, report: _transcript(record, agent, chat_of, specs, report),
        licence=LICENCE,
        attribution=path.name,
    )
    # One reading collects the definitions; tools that are called or named and never defined get what the calls show.
    named: dict[str, None] = {}

    def noting_names() -> Iterator[Transcript]:
        for transcript in corpus.transcripts():
            named.update(dict.fromkeys(transcript.tools))
            yield transcript

    inferred = infer_specs(noting_names())
    for name in named:
        specs.setdefault(name, inferred.get(name, ToolSpec(name, "", NO_PARAMETERS)))
    return corpus


def _records(file: Path) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Each record with the name it has if it brings none."""
    stem = file.name.removesuffix(".gz")
    lines = stem.endswith(".jsonl")
    for number, (name, record) in enumerate(line_records(file) if lines else list_records("record", "id")(file)):
        yield name, (f"{stem.partition('.')[0]}:{name.removeprefix('line ') if lines else number}", record)


def _transcript(
    record: tuple[str, Any],
    agent: str,
    chat_of: Callable[[Any, Report], Chat],
    specs: dict[str, ToolSpec],
    report: Report,
) -> Transcript:
    """One record; its tool definitions go into `specs`. Raises KeyError, TypeError or ValueError for a malformed one."""
    default, content = record
    content = json.loads(content) if isinstance(content, bytes) else content
    content = {"messages": content} if isinstance(content, list) else content
    if not isinstance(content, dict):
        raise TypeError(f"a record is {type(content).__name__}, expected an object")
    messages, defined = chat_of(content, report)
    if not any(message.role == "assistant" for message in messages):
        raise ValueError("the assistant says nothing")
    messages = pair_results(messages, report)
    tools = {name: None for tool in defined if (name := _define(tool, specs, report))}
    tools |= {call.name: None for message in messages for call in message.tool_calls}
    name = str(content.get("id") or default)
    return Transcript(name, str(content.get("task_id") or name), str(content.get("agent") or agent), tuple(tools), messages)


def _define(tool: Any, specs: dict[str, ToolSpec], report: Report) -> str | None:
    """The name of a tool, defined in `specs` from now on; None for a definition that cannot be read."""
    if isinstance(tool, str):
        return tool
    function = tool.get("function", tool) if isinstance(tool, dict) else {}
    function = function if isinstance(function, dict) else {}
    name, parameters = function.get("name"), function.get("parameters") or NO_PARAMETERS
    if not isinstance(name, str) or not name or not isinstance(parameters, dict):
        report(f"a tool's definition without a name or with parameters that are no schema: {str(tool)[:80]}")
        return None
    spec = ToolSpec(name, str(function.get("description") or ""), parameters)
    if specs.setdefault(name, spec) != spec:
        report(f"tool {name} is defined otherwise than before; the first definition holds")
    return name


def _tools(value: Any) -> list[Any]:
    """A record's `tools`: a list, its JSON text, or none."""
    value = json.loads(value) if isinstance(value, str) and value.strip() else value
    value = [value] if isinstance(value, dict) else value or []
    if not isinstance(value, list):
        raise TypeError(f"tools is {type(value).__name__}, expected a list")
    return value


def _role(name: Any) -> str:
    if name not in ROLES:
        raise ValueError(f"message of {name!r}, which is none of {', '.join(ROLES)}")
    return ROLES[name]


def _text(content: Any) -> str:
    """A message's content; of a list of parts, their texts."""
    if isinstance(content, list):
        kinds = {part.get("type", "text") for part in content}
        if kinds - {"text", "input_text", "output_text"}:
            raise ValueError(f"content has parts that are no text: {', '.join(sorted(kinds))}")
        return "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise TypeError(f"content is {type(content).__name__}, expected text")
    return content or ""


# ---- OpenAI's form ---------------------------------------------------------------------------------------------------


def openai_chat(record: Mapping[str, Any], report: Report) -> Chat:
    """Messages and tools of a record in OpenAI's form; `function_call` and `functions` of the older form as well."""
    del report
    messages = []
    for message in record["messages"]:
        calls = message.get("tool_calls") or [c for c in [message.get("function_call")] if c]
        role, content = _role(message.get("role")), _text(message.get("content"))
        messages.append(Message.from_json({**message, "role": role, "content": content, "tool_calls": calls}))
    return messages, _tools(record.get("tools") or record.get("functions"))


# ---- the form of Hermes and Qwen -------------------------------------------------------------------------------------

_RESPONSE = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>", re.DOTALL)
_TOOLS = re.compile(r"<tools>\s*([\[{].*?)\s*</tools>", re.DOTALL)


def hermes_chat(record: Mapping[str, Any], report: Report) -> Chat:
    """Messages and tools of a record whose calls and results stand in the text."""
    messages: list[Message] = []
    tools = _tools(record.get("tools"))
    if record.get("system"):
        messages.append(Message("system", _text(record["system"])))
    for turn in record["conversations"] if "conversations" in record else record["messages"]:
        role = _role(turn.get("from", turn.get("role")))
        text = _text(turn.get("value", turn.get("content")))
        blocks = _RESPONSE.findall(text)
        if role == "system":
            text, listed = _listed_tools(text)
            tools = tools or listed
            messages += [Message(role, text)] if text else []
        elif turn.get("from") == "function_call":  # the call alone, without tags
            messages.append(_assistant(f"<tool_call>\n{text}\n</tool_call>", report))
        elif role == "assistant":
            messages.append(_assistant(text, report))
        elif blocks and (role == "tool" or not _RESPONSE.sub("", text).strip()):
            messages += [Message("tool", block) for block in blocks]
        else:
            messages.append(Message(role, text))
    return messages, tools


def _listed_tools(text: str) -> tuple[str, list[Any]]:
    """A system message and the tools that it lists. What Qwen's template writes around them is taken out, for it is
    written again; any other text is kept."""
    before, head, rest = text.partition(TOOLS_HEAD)
    inside, tail, after = rest.partition(TOOLS_TAIL)
    if head and tail:
        return (before + after).strip("\n"), [json.loads(line) for line in inside.splitlines() if line]
    for listed in _TOOLS.findall(text):
        try:
            return text, _tools(listed)
        except ValueError:
            lines = [line for line in listed.splitlines() if line.strip()]
            return text, [json.loads(line) for line in lines]
    return text, []


def _assistant(text: str, report: Report) -> Message:
    thinks = text.lstrip().startswith("<think>")
    turn = parse_turn(text.lstrip().removeprefix("<think>") if thinks else f"</think>{text}")
    if not turn.thinking_closed:
        raise ValueError("a thinking block is not closed")
    calls = tuple(_repaired(call, report) if isinstance(call, MalformedCall) else call for call in turn.calls)
    return Message("assistant", turn.content, turn.reasoning if thinks and turn.reasoning else None, calls)


def _repaired(call: MalformedCall, report: Report) -> ToolCall:
    """A call written as a Python dict, as some of Hermes' data has it. Of any other, a call without a name, which is left
    out together with its result."""
    try:
        value = ast.literal_eval(call.text)
        if set(value) == {"name", "arguments"} and isinstance(value["name"], str) and isinstance(value["arguments"], dict):
            return ToolCall(value["name"], json.dumps(value["arguments"], ensure_ascii=False))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        pass
    report(f"a call is left out: {call.problem}: {call.text[:80]!r}")
    return ToolCall("", call.text)
