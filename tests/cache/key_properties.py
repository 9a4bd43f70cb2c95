"""What holds for the keys of all calls, as properties for Hypothesis: 1,000 examples in the suite, 100,000 in
experiments/faults/keys.py. The references here are plain: fractions for numbers, jsonschema for validity."""

import json
import unicodedata
from fractions import Fraction

import jsonschema
from hypothesis import given
from hypothesis import strategies as st

from cacherl_jax.cache.key import call_key, canonical_arguments, canonical_call
from cacherl_jax.types import Effects, ToolCall, ToolSpec

# ---- documents: JSON values whose numbers keep sign, digits and exponent, to be written in several ways ---------------

ODD_TEXTS = ["", "1", "1.0", "-0", "NaN", "true", "null", "e\u0301", "\u00e9", "\ud800", "A", "a"]
TEXTS = st.text(max_size=5) | st.sampled_from(ODD_TEXTS)
NUMBERS = st.tuples(st.just("number"), st.sampled_from([1, -1]), st.integers(0, 9) | st.integers(0, 10**30), st.integers(-20, 400))
SMALL = st.tuples(st.just("number"), st.sampled_from([1, -1]), st.integers(0, 3), st.integers(-1, 1))
LEAVES = st.none() | st.booleans() | TEXTS | NUMBERS | SMALL
VALUES = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXTS, x, max_size=3), max_leaves=4)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=3)


def composed(text):
    return unicodedata.normalize("NFC", text)


def meaning(value):
    """A document's value by the rules of the canonical form, without a schema; None where two of its keys are one."""
    if isinstance(value, tuple):
        return ("number", value[1] * value[2] * Fraction(10) ** value[3])
    if isinstance(value, dict):
        return ("object", frozenset((composed(k), meaning(v)) for k, v in value.items()))
    if isinstance(value, list):
        return ("list", tuple(meaning(v) for v in value))
    return (type(value).__name__, composed(value) if isinstance(value, str) else value)


def twice_named(value):
    if isinstance(value, dict):
        return len({composed(k) for k in value}) < len(value) or any(map(twice_named, value.values()))
    return isinstance(value, list) and any(map(twice_named, value))


def written(value, random):
    """JSON text of a document in one of its many forms."""
    space = random.choice(["", " ", "\n\t"])
    if isinstance(value, tuple):
        _, sign, digits, exponent = value
        shift = random.randint(0, 3)
        forms = [f"{digits * 10**shift}e{exponent - shift}", f"{digits}.{'0' * shift}0E{exponent:+d}"]
        if exponent >= 0:
            forms += [str(digits * 10**exponent), f"{digits * 10**exponent}.0"]
        return ("-" if sign < 0 else "") + random.choice(forms)
    if isinstance(value, dict):
        items = random.sample(list(value.items()), len(value))
        return "{" + ",".join(f"{space}{written(k, random)}{space}:{written(v, random)}" for k, v in items) + space + "}"
    if isinstance(value, list):
        return "[" + f",{space}".join(written(v, random) for v in value) + "]"
    if isinstance(value, str):
        value = random.choice([composed, lambda t: unicodedata.normalize("NFD", t)])(value)
    return json.dumps(value, ensure_ascii=random.random() < 0.5)


# ---- schemas, each with valid documents ------------------------------------------------------------------------------


@st.composite
def schemas_with_values(draw, depth=2):
    """(schema, a valid plain value). Enums here hold values that differ by more than case or form."""
    kinds = ["string", "integer", "number", "boolean", "enum", "nullable", "union"] + (["array", "object"] if depth else [])
    kind = draw(st.sampled_from(kinds))
    if kind == "enum":
        members = draw(st.lists(st.sampled_from(["economy", "Business", "1", 2, "3.5", None, True]), min_size=1, unique_by=repr))
        return {"enum": members}, draw(st.sampled_from(members))
    if kind == "nullable":
        schema, value = draw(schemas_with_values(depth=0))
        return {"anyOf": [schema, {"type": "null"}]}, draw(st.sampled_from([value, None]))
    if kind == "union":
        return {"type": ["integer", "string"]}, draw(st.integers(-5, 5) | TEXTS)
    if kind == "array":
        schema, value = draw(schemas_with_values(depth=depth - 1))
        return {"type": "array", "items": schema}, [value] * draw(st.integers(0, 2))
    if kind == "object":
        return draw(object_schemas(depth=depth - 1))
    values = {"string": TEXTS, "integer": st.integers(-(2**70), 2**70), "boolean": st.booleans()}
    return {"type": kind}, draw(values.get(kind, st.floats(allow_nan=False, allow_infinity=False, width=32)))


@st.composite
def object_schemas(draw, depth=2):
    properties, value, required = {}, {}, []
    for name in draw(st.lists(st.sampled_from("abcde"), max_size=3, unique=True)):
        schema, member = draw(schemas_with_values(depth=depth))
        place = draw(st.sampled_from(["required", "given", "absent", "default"]))
        if place == "default":
            schema = {**schema, "default": member}
        elif place != "absent":
            value[name] = member
        required += [name] if place == "required" else []
        properties[name] = schema
    return {"type": "object", "properties": properties, "required": required}, value


def filled(value, schema):
    """The value with the schema's defaults, as its reader sees it."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        defaults = {n: p["default"] for n, p in properties.items() if "default" in p and n not in value}
        return {n: filled(v, properties.get(n, {})) for n, v in (value | defaults).items()}
    if isinstance(value, list):
        return [filled(v, schema.get("items", {})) for v in value]
    if isinstance(value, str):
        return composed(value)
    return Fraction(repr(value)) if isinstance(value, float) else value


def spec(schema):
    return ToolSpec("f", "", schema, Effects())


def key(arguments, schema=None):
    return call_key(ToolCall("f", arguments), spec(schema) if schema else None, "canonical")


# ---- properties ------------------------------------------------------------------------------------------------------


@given(OBJECTS, st.randoms(use_true_random=False))
def one_key_for_all_ways_of_writing(document, random):
    if not twice_named(document):
        assert key(written(document, random)) == key(written(document, random))


@given(OBJECTS, OBJECTS, st.randoms(use_true_random=False))
def calls_share_a_key_only_if_they_mean_the_same(a, b, random):
    if not twice_named(a) and not twice_named(b):
        assert (key(written(a, random)) == key(written(b, random))) == (meaning(a) == meaning(b))


@given(TEXTS, VALUES, VALUES, st.randoms(use_true_random=False))
def swapped_values_share_a_key_only_if_they_are_equal(name, a, b, random):
    x, y = composed(name) + "x", composed(name) + "y"
    if not twice_named([a, b]):
        same = key(written({x: a, y: b}, random)) == key(written({x: b, y: a}, random))
        assert same == (meaning(a) == meaning(b))


@given(object_schemas(), st.one_of(OBJECTS, st.text()), st.randoms(use_true_random=False))
def canonical_text_is_its_own(schema_and_value, document, random):
    schema, _ = schema_and_value
    text = document if isinstance(document, str) else written(document, random)
    once = canonical_arguments(text, spec(schema))
    assert canonical_arguments(once, spec(schema)) == once
    assert "\n" not in canonical_call(ToolCall("f", text), spec(schema))


@given(object_schemas(), st.randoms(use_true_random=False))
def a_valid_call_keeps_its_meaning(schema_and_value, random):
    schema, value = schema_and_value
    jsonschema.validate(value, schema)
    text = canonical_arguments(json.dumps(value), spec(schema))
    assert json.loads(text, parse_float=Fraction) == filled(value, schema)
    jsonschema.validate(json.loads(text), schema)
    items = list(json.loads(text).items())
    random.shuffle(items)
    assert key(json.dumps(dict(items), indent=1), schema) == key(json.dumps(value), schema)


@given(st.text(max_size=4), st.text(max_size=4), st.text(max_size=8), st.text(max_size=8))
def names_and_arguments_do_not_run_into_each_other(name, other, arguments, others):
    a, b = ToolCall(name, arguments), ToolCall(other, others)
    same = (composed(name), canonical_arguments(arguments, None)) == (composed(other), canonical_arguments(others, None))
    assert (canonical_call(a, None) == canonical_call(b, None)) == same
    crossed = ToolCall(f"{name} {arguments}", others), ToolCall(name, f"{arguments} {others}")
    assert canonical_call(crossed[0], None) != canonical_call(crossed[1], None)


PROPERTIES = (
    one_key_for_all_ways_of_writing,
    calls_share_a_key_only_if_they_mean_the_same,
    swapped_values_share_a_key_only_if_they_are_equal,
    canonical_text_is_its_own,
    a_valid_call_keeps_its_meaning,
    names_and_arguments_do_not_run_into_each_other,
)
