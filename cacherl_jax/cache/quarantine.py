"""Entries that would poison a policy: failures stored as if they were answers, and control tokens inside payloads.

The rules read shapes, not words: a payload that merely contains "500", "error" or a quoted traceback is a success. What they
find is listed with the reason; setting it aside is asked for, changes the snapshot's id, and can be undone.
"""

from __future__ import annotations

import http
import json
import re
from collections import Counter
from collections.abc import Collection
from typing import Any

from cacherl_jax.cache.entries import Entry
from cacherl_jax.cache.store import Store, StoreError

# Tokens of chat templates: the policy would read them as the end of the tool's turn, or as a turn of its own.
CONTROL_TOKEN = re.compile(r"<\|[A-Za-z][A-Za-z0-9_]*\|>|</?(?:tool_response|tool_call|think|tools)>")
# "Error: no such user", "requests.exceptions.ConnectionError: refused", "Error executing tool: ..."
FAILURE_TEXT = re.compile(
    r"(?:[A-Za-z_]\w*\.)*(?:[A-Z]\w*)?(?:Error|ERROR|Exception|EXCEPTION)(?: (?:calling|executing|running) [^\n:]{1,80})?: "
)
TRACEBACK = re.compile(r"^Traceback \(most recent call last\):$", re.MULTILINE)
EXCEPTION_LINE = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Warning)(?:: .*)?")
HTTP_ERRORS = {status.value: status.phrase.lower() for status in http.HTTPStatus if status >= 400}
HTTP_TEXT = re.compile(r"(?:HTTP(?:/\d(?:\.\d)?)?(?: error)?:? )?([45]\d\d)[:,]? (?:- )?([A-Za-z' -]+?)\.?", re.IGNORECASE)
HTML_TITLE = re.compile(r"<title>\s*([^<]{1,80}?)\s*</title>", re.IGNORECASE)
# How a client of the Model Context Protocol prints a result, when its text was not taken out.
PRINTED_RESULT = re.compile(r"meta=None content=\[TextContent\(type='text', text=['\"]")


def reason(entry: Entry) -> str | None:
    """Why an entry should not be served as it is; None for one that looks right."""
    content = entry.result.content
    if found := CONTROL_TOKEN.search(content):
        return f"control token {found[0]}"
    return None if entry.result.error is not None else failure_shape(content)


def failure_shape(content: str) -> str | None:
    """How a payload says that the call failed; None where it does not."""
    text = content.strip()
    if text[:1] in ("{", "[", '"'):
        try:
            return _value_shape(json.loads(text))
        except (ValueError, RecursionError):
            pass
    return _text_shape(text)


def _value_shape(value: Any) -> str | None:
    if isinstance(value, str):
        return _text_shape(value.strip())
    if not isinstance(value, dict):
        return None
    for name in ("error", "errors", "exception", "Error"):
        # {"error": null} and {"error": ""} say that all went well; {"error": 0.02} is a measurement.
        if value.get(name) and isinstance(value[name], (str, dict, list, bool)):
            return f'object with "{name}"'
    for name, failed in (("isError", True), ("is_error", True), ("success", False), ("ok", False), ("status", "error")):
        if value.get(name) is failed or (value.get(name) == failed and isinstance(failed, str)):
            return f'object with "{name}": {json.dumps(failed)}'
    says = [value[name] for name in ("message", "detail", "title", "reason") if isinstance(value.get(name), str)]
    for name in ("status", "statusCode", "status_code", "code"):
        # A code alone may be anything: {"code": 404, "city": "Oslo"}.
        if value.get(name) in HTTP_ERRORS and type(value[name]) is int and says:
            return f'HTTP status object with "{name}": {value[name]}'
    if len(value) == len(says) == 1 and says[0].lower().strip(" .") in HTTP_ERRORS.values():
        return f"HTTP status object {says[0]!r}"
    parts = value.get("content")
    if isinstance(parts, list) and len(parts) == 1 and isinstance(parts[0], dict) and isinstance(parts[0].get("text"), str):
        return failure_shape(parts[0]["text"])  # a result of the Model Context Protocol
    return None


def _text_shape(text: str) -> str | None:
    if printed := PRINTED_RESULT.match(text):
        text = text[printed.end() :]
    if FAILURE_TEXT.match(text):
        return "text that opens with an error"
    # A traceback that is followed by more is quoted, as in a page about it.
    if TRACEBACK.search(text) and EXCEPTION_LINE.fullmatch(text.rpartition("\n")[2].strip()):
        return "traceback"
    title = HTML_TITLE.search(text[:2000]) if text[:1] == "<" else None
    line = HTTP_TEXT.fullmatch(title[1] if title else text[:100])
    if line and HTTP_ERRORS.get(int(line[1])) == line[2].lower():
        return f"HTTP error {line[1]}"
    return None


def quarantine(store: Store, *, move: bool = False, examples: int = 20) -> dict[str, Any]:
    """Lists the entries that have a `reason`, and sets them aside where `move` is true.

    found: how many, by_reason and by_tool. listed: the first `examples` by calls. aside: how many are in quarantine now.
    Raises StoreError where `move` is asked of a frozen store.
    """
    with store.transaction() if move else store.reading():
        found = [(entry, why) for entry in store.entries() if (why := reason(entry)) is not None]
        found.sort(key=lambda pair: (-pair[0].count, pair[0].hash))
        for entry, why in found if move else ():
            store.set_aside(entry, why)
        aside = len(store.quarantined())
    return {
        "found": len(found),
        "moved": move,
        "aside": aside,
        "by_reason": dict(sorted(Counter(why for _, why in found).items(), key=lambda item: (-item[1], item[0]))),
        "by_tool": dict(sorted(Counter(entry.tool for entry, _ in found).items(), key=lambda item: (-item[1], item[0]))),
        "listed": [_listed(entry, why) for entry, why in found[:examples]],
    }


def restore(store: Store, entries: Collection[str] | None = None) -> int:
    """Takes entries, named by their hashes, or all of them out of quarantine; returns how many. Raises StoreError for a hash
    that is not there, with nothing restored."""
    with store.transaction():
        aside = {entry.hash: entry for entry, _ in store.quarantined()}
        for name in entries or ():
            if name not in aside:
                raise StoreError(f"entry {name} is not in quarantine; {len(aside)} others are")
        chosen = [aside[name] for name in (aside if entries is None else dict.fromkeys(entries))]
        for entry in chosen:
            store.restore(entry)
    return len(chosen)


def _listed(entry: Entry, why: str) -> dict[str, Any]:
    content = entry.result.content
    # The place that gave the reason, of a payload of any length.
    start = max(0, found.start() - 80) if (found := CONTROL_TOKEN.search(content)) else 0
    return {
        "entry": entry.hash,
        "tool": entry.tool,
        "arguments": entry.arguments,
        "count": entry.count,
        "reason": why,
        "content": content[start : start + 200],
    }
