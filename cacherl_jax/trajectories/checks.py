"""What reasoning must be before it goes into a transcript, and what may not have changed there. Each check is a pure function."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from cacherl_jax.config import TeacherConfig
from cacherl_jax.types import Message, Transcript

# Text that a rendering or a reader would take for the chat format's own.
MARKS = re.compile(r"</?think>|</?tool_call>|</?tool_response>|<\|\w+\|>")
THINK_MARK = re.compile(r"</?think>")
THINK_BLOCK = re.compile(
    r"\s*(?:<think>)?(.*?)</think>\s*(.*)", re.DOTALL
)  # a turn as models without a field for reasoning write it
REPEATED = 12  # words in a row that the reasoning and the text to the user may not share
_WORD = re.compile(r"\w+(?:[.@:/-]\w+)*")
_NAME = re.compile(r"(?<=[a-z,] )[A-Z]\w+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_DECIMAL = re.compile(r"\d+\.\d+")


def problem(reasoning: str, messages: Sequence[Message], i: int, config: TeacherConfig) -> str:
    """Why the reasoning written for `messages[i]` is rejected, in a word; "" if it is not.

    empty · marks: markers of the chat format · short, long: outside the bounds, in words · repeated: see `repeats` · leak: see
    `leaks`.
    """
    message = messages[i]
    words = len(reasoning.split())
    if not words:
        return "empty"
    if MARKS.search(reasoning):
        return "marks"
    if not config.min_words <= words <= config.max_words:
        return "short" if words < config.min_words else "long"
    if repeats(reasoning, message.content):
        return "repeated"
    return "leak" if leaks(reasoning, messages[:i], message, messages[i + 1 :]) else ""


def repeats(reasoning: str, content: str) -> bool:
    """Whether the two share `REPEATED` words in a row, reasoning that ran over into the text to the user; or are the same."""
    said, told = _WORD.findall(reasoning.lower()), _WORD.findall(content.lower())
    if said == told:
        return bool(said)
    runs = {tuple(said[at : at + REPEATED]) for at in range(len(said) - REPEATED + 1)}
    return any(tuple(told[at : at + REPEATED]) in runs for at in range(len(told) - REPEATED + 1)) if runs else False


def check_unchanged(before: Transcript, after: Transcript) -> None:
    """Raises ValueError naming the first call, result, error or user text that differs."""
    if len(before.messages) != len(after.messages):
        raise ValueError(f"{before.id}: {len(before.messages)} messages became {len(after.messages)}")
    for i, (a, b) in enumerate(zip(before.messages, after.messages, strict=True)):
        if a.role == "assistant":
            a, b = (dataclasses.replace(m, content="", reasoning=None) for m in (a, b))
        if a != b:
            raise ValueError(f"{before.id}, message {i}: {a} became {b}")


def leaks(reasoning: str, past: Sequence[Message], message: Message, future: Sequence[Message]) -> bool:
    """Whether the reasoning names a value that stands in a later tool result and nowhere up to the message itself.

    Values are the scalars of JSON, of one word or several. Of text, also inside JSON, they are words with digits or marks
    inside, and names: words with a capital inside a sentence, which the reasoning must spell so too. The rest of a text is
    language. 1,250.50 is 1250.5.
    """
    said = _words(reasoning)
    spelt = set(_WORD.findall(reasoning))
    named = set()
    for content in (m.content for m in future if m.role == "tool"):
        try:
            values, texts = _leaves(json.loads(content))
        except (ValueError, RecursionError):
            values, texts = [], [content]
        for text in texts:
            values += (word for word in _WORD.findall(_THOUSANDS.sub("", text)) if not word.isalpha())
            values += spelt.intersection(_NAME.findall(text))
        named.update(value for value in map(_words, values) if value.strip() and value in said)
    if not named:
        return False
    calls = [c for m in (*past, message) for c in m.tool_calls]
    text = " ".join([*(m.content for m in (*past, message)), *(f"{c.name} {c.arguments}" for c in calls)])
    known = _words(text) + _words(text.replace(",", " "))  # 1,250 may be one number or two
    return any(value not in known for value in named)


def _words(text: str) -> str:
    """The words and numbers of a text in one form, each between spaces, so that a run of words is found as a substring."""
    words = _WORD.findall(_THOUSANDS.sub("", text.lower()))
    return f" {' '.join(w.rstrip('0').rstrip('.') if _DECIMAL.fullmatch(w) else w for w in words)} "


def _leaves(value: Any) -> tuple[list[str], list[str]]:
    """The scalars inside a JSON value, texts as they are, the others as JSON writes them; and the texts alone."""
    stack, leaves = [value], []
    texts: list[str] = []
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list):
            stack += value
        else:
            leaves.append(value if isinstance(value, str) else json.dumps(value))
            texts += [value] * isinstance(value, str)
    return leaves, texts
