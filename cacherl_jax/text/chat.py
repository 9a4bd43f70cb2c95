"""Qwen3's chat format: messages to ids with the writer of every token, and a sampled turn back to thought, text and calls.

Two renderings. `render_official` writes a whole conversation as Qwen's template does (which drops earlier reasoning); it
serves parity and first turns. An *episode* is a concatenation of suffixes that never rewrites what stands before: opening,
then for each assistant turn a generation prompt (injected), the sampled tokens up to and with <|im_end|>, the newline that
is never sampled, and the tool results or the next user turn (injected). Rollouts, SFT and evaluation share these functions.

A turn without reasoning is sampled as "\\n</think>\\n\\n" after the injected "<think>\\n": an empty block, as the template has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cacherl_jax.text.tokenizer import IM_END, IM_START, Tokenizer
from cacherl_jax.trajectory import Segment, Source
from cacherl_jax.types import Message, ToolCall, ToolSpec, Transcript

Piece = tuple[Source, list[int], int | None]

TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
GENERATION_PROMPT = f"{IM_START}assistant\n<think>\n"
END_THINK = "\n</think>\n\n"
CALL_OPEN = '<tool_call>\n{"name": "'
CALL_MIDDLE = '", "arguments": '
CALL_CLOSE = "}\n</tool_call>"
TOOL_TURN = f"{IM_START}user\n<tool_response>\n"


def tool_line(spec: ToolSpec) -> str:
    """A tool's definition as the template writes it."""
    return "\n" + json.dumps(spec.to_function(), ensure_ascii=False)


# ---- the official template -------------------------------------------------------------------------------------------


def render_official(
    messages: Sequence[Message], tools: Sequence[ToolSpec], *, thinking_model: bool, add_generation_prompt: bool
) -> str:
    """The text that Qwen3's Jinja template gives. thinking_model: the 2507 thinking release, whose prompt opens <think>."""
    return "".join(text for text, _ in _official_parts(messages, tools, thinking_model, add_generation_prompt))


def official_ids(
    tok: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[ToolSpec],
    *,
    thinking_model: bool,
    add_generation_prompt: bool,
) -> list[int]:
    """Ids of the official rendering, in which no message can forge a control token."""
    return tok.encode_parts(_official_parts(messages, tools, thinking_model, add_generation_prompt))


def _official_parts(
    messages: Sequence[Message], tools: Sequence[ToolSpec], thinking_model: bool, add_generation_prompt: bool
) -> list[tuple[str, bool]]:
    parts = _system_parts(messages, tools)
    last_user = max((i for i, m in enumerate(messages) if m.role == "user" and not _is_result(m)), default=len(messages) - 1)
    for i, message in enumerate(map(_with_reasoning_apart, messages)):
        if message.role == "user" or (message.role == "system" and i):
            parts += [(f"{IM_START}{message.role}\n", False), (message.content, True), (f"{IM_END}\n", False)]
        elif message.role == "assistant":
            parts.append((f"{IM_START}assistant\n", False))
            reasoning = (message.reasoning or "").strip("\n")
            if i > last_user and (i == len(messages) - 1 or message.reasoning):
                parts += [("<think>\n", False), (reasoning, True), (END_THINK, False)]
                parts.append((message.content.lstrip("\n"), True))
            else:
                parts.append((message.content, True))
            parts += [*_call_parts(message), (f"{IM_END}\n", False)]
        elif message.role == "tool":
            first = i == 0 or messages[i - 1].role != "tool"
            last = i == len(messages) - 1 or messages[i + 1].role != "tool"
            parts += _tool_parts(message.content, first, last)
    if add_generation_prompt:
        parts.append((GENERATION_PROMPT if thinking_model else f"{IM_START}assistant\n", False))
    return parts


def _is_result(message: Message) -> bool:
    return message.content.startswith("<tool_response>") and message.content.endswith("</tool_response>")


def _with_reasoning_apart(message: Message) -> Message:
    """A turn whose thinking block stands in its content, as the template reads it."""
    if message.role != "assistant" or message.reasoning is not None or "</think>" not in message.content:
        return message
    before, *_, after = message.content.split("</think>")
    return replace(message, content=after.lstrip("\n"), reasoning=before.rstrip("\n").split("<think>")[-1].lstrip("\n"))


def _system_parts(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[tuple[str, bool]]:
    system = messages[0].content if messages and messages[0].role == "system" else None
    if tools:
        head = [] if system is None else [(system, True), ("\n\n", False)]
        lines = [(tool_line(spec), False) for spec in tools]
        return [(f"{IM_START}system\n", False), *head, (TOOLS_HEAD, False), *lines, (f"{TOOLS_TAIL}{IM_END}\n", False)]
    if system is not None:
        return [(f"{IM_START}system\n", False), (system, True), (f"{IM_END}\n", False)]
    return []


def _call_parts(message: Message) -> list[tuple[str, bool]]:
    parts: list[tuple[str, bool]] = []
    for i, call in enumerate(message.tool_calls):
        if i or message.content:
            parts.append(("\n", False))
        parts += [(CALL_OPEN, False), (call.name, True), (CALL_MIDDLE, False), (call.arguments, True), (CALL_CLOSE, False)]
    return parts


def _tool_parts(content: str, first: bool, last: bool) -> list[tuple[str, bool]]:
    opening = f"{IM_START}user\n<tool_response>\n" if first else "\n<tool_response>\n"
    closing = f"\n</tool_response>{IM_END}\n" if last else "\n</tool_response>"
    return [(opening, False), (content, True), (closing, False)]


# ---- suffixes of an episode ------------------------------------------------------------------------------------------


def opening(tok: Tokenizer, messages: Sequence[Message], specs: Sequence[ToolSpec]) -> list[Piece]:
    """System message with tools, and the first user message."""
    pieces: list[Piece] = []
    if parts := _system_parts(messages, specs):
        pieces.append((Source.PROMPT, tok.encode_parts(parts), None))
    for message in messages:
        if message.role != "system":
            pieces += user_turn(tok, message.content)
    return pieces


def user_turn(tok: Tokenizer, text: str) -> list[Piece]:
    ids = tok.encode_parts([(f"{IM_START}user\n", False), (text, True), (f"{IM_END}\n", False)])
    return [(Source.USER, ids, None)]


def generation_prompt(tok: Tokenizer) -> list[Piece]:
    """Opens an assistant turn inside its thinking block."""
    return [(Source.TEMPLATE, tok.encode(GENERATION_PROMPT), None)]


def assistant_turn(tok: Tokenizer, message: Message) -> list[Piece]:
    """What the policy would have sampled to say `message`, up to and with <|im_end|>."""
    parts = [(message.reasoning or "", True), (END_THINK, False), (message.content, True)]
    return [(Source.SAMPLED, tok.encode_parts([*parts, *_call_parts(message), (IM_END, False)]), None)]


def after_turn(tok: Tokenizer) -> list[Piece]:
    """The newline after <|im_end|>, which the policy never samples."""
    return [(Source.TEMPLATE, tok.encode("\n"), None)]


def close_thinking(tok: Tokenizer) -> list[Piece]:
    """Ends a turn that was cut inside its thinking block."""
    return [(Source.TEMPLATE, tok.encode(f"{END_THINK}{IM_END}\n"), None)]


def tool_results(tok: Tokenizer, contents: Sequence[str]) -> list[Piece]:
    """One user turn with a <tool_response> block a result, in call order. Long results are `cut` before."""
    pieces: list[Piece] = []
    for i, content in enumerate(contents):
        parts = _tool_parts(content, i == 0, i == len(contents) - 1)
        pieces.append((Source.TOOL, tok.encode_parts(parts), i))
    return pieces


# Bounds the work on results of megabytes. Tokens of more characters, long runs of one, shorten the beginning that is kept.
_CHARACTERS_PER_TOKEN = 32


def cut(tok: Tokenizer, content: str, max_tokens: int) -> str:
    """`content`, or a beginning of it of at most `max_tokens` tokens that ends on a whole character."""
    beginning = content[: (max_tokens + 1) * _CHARACTERS_PER_TOKEN]
    ids = tok.encode_content(beginning)
    return beginning if len(ids) <= max_tokens else tok.decode(ids[:max_tokens]).rstrip("\ufffd")


def transcript_tokens(
    tok: Tokenizer, transcript: Transcript, specs: Mapping[str, ToolSpec], max_tool_tokens: int
) -> tuple[np.ndarray, np.ndarray, tuple[Segment, ...]]:
    """A recorded episode as its concatenated suffixes: tokens_T int32, sampled_T bool, segments.

    Raises KeyError naming a tool of the transcript that `specs` lacks.
    """
    messages = transcript.messages
    first_turn = next((i for i, m in enumerate(messages) if m.role == "assistant"), len(messages))
    pieces = opening(tok, messages[:first_turn], [specs[name] for name in transcript.tools])
    results: list[str] = []
    answered = 0
    for i, message in enumerate(messages[first_turn:], first_turn):
        if message.role == "tool":
            results.append(message.content)
            if i + 1 == len(messages) or messages[i + 1].role != "tool":
                turn = tool_results(tok, [cut(tok, result, max_tool_tokens) for result in results])
                pieces += [(source, ids, answered + (index or 0)) for source, ids, index in turn]
                answered, results = answered + len(results), []
        elif message.role == "assistant":
            pieces += generation_prompt(tok) + assistant_turn(tok, message)
            if i + 1 < len(messages):
                pieces += after_turn(tok)
        else:
            pieces += user_turn(tok, message.content)
    return join(pieces)


def join(pieces: Iterable[Piece]) -> tuple[np.ndarray, np.ndarray, tuple[Segment, ...]]:
    """Pieces in order as tokens_T, sampled_T and segments."""
    ids: list[int] = []
    sampled: list[bool] = []
    segments: list[Segment] = []
    for source, piece, observation in pieces:
        segments.append(Segment(len(ids), len(ids) + len(piece), source, observation))
        ids += piece
        sampled += [source is Source.SAMPLED] * len(piece)
    return np.asarray(ids, np.int32), np.asarray(sampled, bool), tuple(segments)


# ---- parsing a sampled turn ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MalformedCall:
    """A <tool_call> block that cannot be executed, and why."""

    text: str
    problem: str


@dataclass(frozen=True)
class ParsedTurn:
    """A turn's parts. thinking_closed False: everything is reasoning, and nothing in it is a call. leaked: the text outside
    the block holds a think marker."""

    reasoning: str
    thinking_closed: bool
    content: str
    calls: tuple[ToolCall | MalformedCall, ...]
    leaked: bool


def parse_turn(text: str) -> ParsedTurn:
    """Reads what was sampled after the injected "<think>\\n", with or without its final <|im_end|>. Never raises."""
    text = text.removesuffix(IM_END)
    reasoning, closed, rest = text.partition("</think>")
    if not closed:
        return ParsedTurn(text.strip("\n"), False, "", (), False)
    outside, calls, position = [], [], 0
    while (start := rest.find("<tool_call>", position)) >= 0:
        outside.append(rest[position:start])
        call, position = _parse_call(rest, start + len("<tool_call>"))
        calls.append(call)
    outside.append(rest[position:])
    content = "\n".join(part for part in (piece.strip("\n") for piece in outside) if part.strip())
    return ParsedTurn(reasoning.strip("\n"), True, content, tuple(calls), "<think>" in content or "</think>" in content)


def _parse_call(text: str, start: int) -> tuple[ToolCall | MalformedCall, int]:
    """The call whose body begins at `start`, and where the text after its block begins."""
    try:
        spans, end = _object_spans(text, _skip_space(text, start))
        end = _skip_space(text, end)
        if not text.startswith("</tool_call>", end):
            raise ValueError("no </tool_call> after the JSON object")
        if surplus := spans.keys() - {"name", "arguments"}:
            raise ValueError(f"unexpected field {min(surplus)!r}; a call has name and arguments")
        name = json.loads(spans.get("name", "null"))
        arguments = spans.get("arguments", "null")
        if not isinstance(name, str) or not name:
            raise ValueError("name is missing or not a string")
        if not isinstance(json.loads(arguments, object_pairs_hook=_no_duplicates), dict):
            raise ValueError("arguments is missing or not an object")
        return ToolCall(name, arguments), end + len("</tool_call>")
    except (ValueError, RecursionError) as error:
        close = text.find("</tool_call>", start)
        body = text[start:] if close < 0 else text[start:close]
        after = len(text) if close < 0 else close + len("</tool_call>")
        return MalformedCall(body.strip(), str(error)), after


_DECODER = json.JSONDecoder()


def _object_spans(text: str, start: int) -> tuple[dict[str, str], int]:
    """The exact source text of each member of the JSON object at `start`, and the position after the object."""
    if not text.startswith("{", start):
        raise ValueError("no JSON object after <tool_call>")
    spans: dict[str, str] = {}
    position = _skip_space(text, start + 1)
    while not text.startswith("}", position):
        if spans:
            if not text.startswith(",", position):
                raise ValueError("expected , or } in the call's object")
            position = _skip_space(text, position + 1)
        key, position = _DECODER.raw_decode(text, position)
        position = _skip_space(text, position)
        if not isinstance(key, str) or not text.startswith(":", position):
            raise ValueError("expected a field name and :")
        if key in spans:
            raise ValueError(f"field {key!r} appears twice")
        position = _skip_space(text, position + 1)
        _, end = _DECODER.raw_decode(text, position)
        spans[key], position = text[position:end], _skip_space(text, end)
    return spans, position + 1


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a field appears twice")
    return value


# ---- runs for a small tokenizer --------------------------------------------------------------------------------------


def template_runs(specs: Sequence[ToolSpec]) -> list[str]:
    """Stretches of fixed text for `train_tokenizer`: the template's own, each tool's definition, a call's opening with the
    tool's name, argument names with their quotes. None crosses from sampled to injected text."""
    runs = [
        f"{IM_START}system\n{TOOLS_HEAD}",
        TOOLS_TAIL,
        f"{IM_START}user\n",
        GENERATION_PROMPT,
        TOOL_TURN,
        "\n</tool_response>",
        "\n<tool_response>\n",
        END_THINK,
        END_THINK + CALL_OPEN,
        CALL_OPEN,
        '"' + CALL_CLOSE,
        '"}' + CALL_CLOSE,
        "}" + CALL_CLOSE,
    ]
    for spec in specs:
        runs += [tool_line(spec), spec.name, f"{spec.name}{CALL_MIDDLE}{{"]
        for i, (name, schema) in enumerate(spec.parameters.get("properties", {}).items()):
            quote = '"' if schema.get("type", "string") == "string" else ""
            if i == 0:
                runs.append(f'{spec.name}{CALL_MIDDLE}{{"{name}": {quote}')
            runs += [f'"{name}": {quote}', f', "{name}": {quote}', f'", "{name}": {quote}']
    return list(dict.fromkeys(runs))
