"""What makes two calls the same: canonical text of (tool, arguments), the writes that came before, and their SHA-256.

raw        name and arguments as recorded, keys sorted. For published figures.
canonical  by the tool's schema; see below.
state      canonical, plus the episode's successful earlier writes to resources which this call reads or writes: the same
           question before and after a write to the same state is two questions.

The canonical form of arguments is JSON text. Forms that it makes one:
* order of keys, spacing and escapes; Unicode in composed form (NFC), surrogate pairs joined;
* numbers by exact decimal value: 1, 1.0 and 10e-1; -0 and 0; 2**70 and 1e400 keep every digit;
* defaults of the schema are filled in, nested ones where their object is given;
* by the schema's type: numeric strings where it wants a number, numbers where it wants a string, "True" where it wants a
  boolean; of `anyOf`, `oneOf` and lists of types, the alternative that the value fits, else the only one it can be read as;
* letter case and number form of a value that the schema's enum admits in exactly one way become the enum's own.
Forms that it keeps apart: everything else. NaN and infinities stand as Python writes them, apart from the strings "NaN"
and "Infinity". A lone surrogate stays as it is. Text that is no JSON object, names a key twice or nests deeper than
MAX_DEPTH stands for itself, composed: what a parser would make of it is not known.

A key holds no version of the schema. After a change of the schema (a new default, another type) it is formed by the new
one: calls written alike under both keep their key, the others miss; a changed default never serves the old one's result.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring as _quoted
from typing import Any, Literal

from cacherl_jax.types import ToolCall, ToolSpec

KeyMode = Literal["raw", "canonical", "state"]
Write = tuple[frozenset[str], str]  # resources written, canonical call

MAX_DEPTH = 100  # of nested objects and lists
# Longer runs of combining marks are left as they are (UAX 15, stream-safe text): composing takes quadratic time.
MAX_MARKS = 30


def canonical_arguments(arguments: str, spec: ToolSpec | None) -> str:
    """The canonical text of a call's arguments; canonical text is its own canonical text. Never raises."""
    text = _object_text(arguments, spec)
    return _composed(arguments) if text is None else text


def canonical_call(call: ToolCall, spec: ToolSpec | None) -> str:
    """One line of text for all ways of writing the same call; what process accuracy compares. Different calls differ."""
    arguments = _object_text(call.arguments, spec)
    name = _composed(call.name)
    if not re.fullmatch(r'[^\s"]+', name):
        name = _quoted(name)
    return f"{name} {_quoted(_composed(call.arguments)) if arguments is None else arguments}"


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


# ---- parsing: numbers keep their text, keys are composed -------------------------------------------------------------


class _Number(str):
    """A number's text as it stands in the arguments."""


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = {_composed(name): value for name, value in pairs}
    if len(members) != len(pairs):
        raise ValueError("a key is given twice")
    return members


_decode = json.JSONDecoder(
    object_pairs_hook=_members, parse_int=_Number, parse_float=_Number, parse_constant=_Number
).decode  # fmt: skip


def _object_text(arguments: str, spec: ToolSpec | None) -> str | None:
    """Canonical text of a JSON object; None for text that stands for itself."""
    try:
        value = _decode(arguments)
        if type(value) is dict:
            schema = spec.parameters if spec else {}
            return _text(value, schema, schema, 1)
    except (ValueError, RecursionError):
        pass
    return None


# ---- writing, by the schema ------------------------------------------------------------------------------------------


def _text(value: Any, schema: Any, root: Mapping[str, Any], depth: int) -> str:
    """Canonical text of a parsed value, or of a plain Python one from the schema. Raises ValueError where too deep."""
    if not schema or not isinstance(schema, Mapping):
        return _container(value, {}, root, depth) if isinstance(value, dict | list) else _scalar(value)
    kind = schema.get("type")
    if isinstance(kind, list) or not _UNIONS.isdisjoint(schema):
        return _text_of_union(value, _alternatives(schema, root), root, depth)
    admitted = schema.get("enum")
    if admitted is None and "const" in schema:
        admitted = [schema["const"]]
    if admitted is not None and (text := _enum_text(value, admitted)) is not None:
        return text
    if isinstance(value, dict | list):
        return _container(value, schema, root, depth)
    if type(value) is str:
        if kind in ("integer", "number") and _NUMBER.fullmatch(value):
            return _number_text(value)
        if kind == "boolean" and value.lower() in ("true", "false"):
            return value.lower()
    elif kind == "string" and _is_number(value):
        text = _scalar(value)
        return text if text in _NON_FINITE else f'"{text}"'
    return _scalar(value)


def _container(value: dict[str, Any] | list[Any], schema: Mapping[str, Any], root: Mapping[str, Any], depth: int) -> str:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")
    if isinstance(value, list):
        first, items = schema.get("prefixItems", ()), schema.get("items")
        children = itertools.chain(first, itertools.repeat(items))
        return f"[{','.join(_text(v, child, root, depth + 1) for v, child in zip(value, children, strict=False))}]"
    properties, others = schema.get("properties", {}), schema.get("additionalProperties")
    texts = {name: _text(v, properties.get(name, others), root, depth + 1) for name, v in value.items()}
    for name, child in properties.items():
        if name not in texts and isinstance(child, Mapping) and "default" in child:
            texts[name] = _text(child["default"], child, root, depth + 1)
    return "{" + ",".join([f"{_quoted(name)}:{texts[name]}" for name in sorted(texts)]) + "}"


def _scalar(value: Any) -> str:
    if type(value) is str:
        return _quoted(_composed(value))
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return _number_text(value if isinstance(value, _Number) else json.dumps(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, _Number | int | float) and not isinstance(value, bool)


_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(?:\.([0-9]+))?(?:[eE]([+-]?[0-9]{1,18}))?", re.ASCII)
_NON_FINITE = ("NaN", "Infinity", "-Infinity")


def _number_text(text: str) -> str:
    """One text for each decimal value. Positional between 1e-6 and 1e309, else scientific."""
    if len(text) < 16 and text.isdigit():
        return str(text)
    found = _NUMBER.fullmatch(text)
    if found is None:  # NaN, an infinity, or an exponent of more than 18 digits
        return str(text)
    whole, fraction = found[1], found[2] or ""
    digits = (whole + fraction).lstrip("0")
    point = len(whole) - (len(whole) + len(fraction) - len(digits)) + int(found[3] or 0)
    digits = digits.rstrip("0")
    if not digits:
        return "0"
    if -6 < point <= 0:
        body = "0." + "0" * -point + digits
    elif 0 < point <= 309:
        body = digits[:point].ljust(point, "0") + ("." + digits[point:] if len(digits) > point else "")
    else:
        body = digits[0] + ("." + digits[1:] if len(digits) > 1 else "") + f"e{point - 1}"
    return "-" + body if text[0] == "-" else body


def _composed(text: str) -> str:
    if text.isascii():
        return text
    if re.search("[\ud800-\udfff]", text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    if len(text) > 4096:
        runs = itertools.groupby(map(unicodedata.combining, text), bool)
        if any(marks and sum(1 for _ in run) > MAX_MARKS for marks, run in runs):
            return text
    return unicodedata.normalize("NFC", text)


# ---- enums and alternatives ------------------------------------------------------------------------------------------


def _enum_text(value: Any, admitted: Sequence[Any]) -> str | None:
    """The text of the enum's member that the value is, or of the only one that it is but for case or number form."""
    if type(value) is str and value in admitted:
        return _scalar(value)
    if isinstance(value, dict | list):
        return None
    own = _scalar(value)
    members = [_scalar(member) for member in admitted if not isinstance(member, dict | list)]
    if own in members:
        return own
    folded = _folded(own)
    near = {text for text in members if _folded(text) == folded}
    return near.pop() if len(near) == 1 else None


def _folded(text: str) -> str:
    """A scalar's canonical text without its quotes, case and, for numbers, form. null stays apart from "null"."""
    if not text.startswith('"'):
        return text if text == "null" else text.casefold()
    inner = text[1:-1]
    if inner == "null":
        return text
    return _number_text(inner) if _NUMBER.fullmatch(inner) else inner.casefold()


_UNIONS = frozenset({"$ref", "anyOf", "oneOf", "allOf"})


def _alternatives(schema: Mapping[str, Any], root: Mapping[str, Any], depth: int = 0) -> list[Mapping[str, Any]]:
    """The schemas without unions of which a value may satisfy one. References that lead nowhere admit anything."""
    if depth > 16:
        return [{}]
    rest: dict[str, Any] = {name: part for name, part in schema.items() if name not in _UNIONS}
    if isinstance(reference := schema.get("$ref"), str):
        return _alternatives(rest | _referenced(reference, root), root, depth + 1)
    if parts := [part for part in schema.get("allOf", ()) if isinstance(part, Mapping)]:
        merged: dict[str, Any] = rest | {name: schema[name] for name in ("anyOf", "oneOf") if name in schema}
        for part in parts:
            if "$ref" in part:
                part = {k: v for k, v in part.items() if k != "$ref"} | _referenced(str(part["$ref"]), root)
            properties = {**merged.get("properties", {}), **part.get("properties", {})}
            merged = {**merged, **part} | ({"properties": properties} if properties else {})
        return _alternatives(merged, root, depth + 1)
    for name in ("anyOf", "oneOf"):
        if options := [option for option in schema.get(name, ()) if isinstance(option, Mapping)]:
            return [simple for option in options for simple in _alternatives({**rest, **option}, root, depth + 1)]
    if isinstance(kinds := schema.get("type"), list):
        return [{**rest, "type": kind} for kind in kinds]
    return [rest]


def _referenced(reference: str, root: Mapping[str, Any]) -> dict[str, Any]:
    node: Any = root
    for part in reference.removeprefix("#/").split("/") if reference.startswith("#/") else ("",):
        node = node.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(node, Mapping) else None
    return dict(node) if isinstance(node, Mapping) else {}


def _text_of_union(value: Any, options: Sequence[Mapping[str, Any]], root: Mapping[str, Any], depth: int) -> str:
    fitting = [option for option in options if _fits(value, option)]
    if isinstance(value, dict | list):
        # Of several shapes that the value fits, none is taken: their defaults may differ.
        return _text(value, fitting[0] if len(fitting) == 1 else {}, root, depth)
    if fitting:
        return _text(value, fitting[0], root, depth)
    own = _scalar(value)
    others = {_text(value, option, root, depth) for option in options} - {own}
    return others.pop() if len(others) == 1 else own


_JSON_TYPES = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value is of a schema's type, enum and, for objects, required and constant members; no more is asked."""
    kind = schema.get("type")
    if _is_number(value):
        text = _scalar(value)
        if kind not in (None, "number") and not (kind == "integer" and text.lstrip("-").isdigit()):
            return False
    elif kind is not None and kind != _JSON_TYPES[type(value)]:
        return False
    if isinstance(value, dict):
        members = [(value[name], part) for name, part in schema.get("properties", {}).items() if name in value]
        fixed = [(v, part) for v, part in members if isinstance(part, Mapping) and ("const" in part or "enum" in part)]
        return set(schema.get("required", ())) <= set(value) and all(_fits(v, part) for v, part in fixed)
    admitted = [schema["const"]] if "const" in schema else schema.get("enum")
    if admitted is None:
        return True
    return not isinstance(value, list) and _scalar(value) in [_scalar(m) for m in admitted if not isinstance(m, dict | list)]
