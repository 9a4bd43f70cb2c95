"""Keys: what makes two calls the same, and what must not."""

import json
import time

import pytest
from hypothesis import settings
from key_properties import PROPERTIES

from cacherl_jax.cache.key import MAX_DEPTH, call_key, canonical_arguments
from cacherl_jax.types import Effects, ToolCall, ToolSpec

PARAMETERS = {
    "type": "object",
    "properties": {
        "source": {"type": "string"},
        "target": {"type": "string"},
        "amount": {"type": "integer"},
        "rate": {"type": "number"},
        "currency": {"type": "string", "default": "EUR"},
        "urgent": {"type": "boolean"},
        "cabin": {"type": "string", "enum": ["economy", "Business", "1"]},
        "size": {"enum": ["m", "M", 3, "true"]},
        "level": {"enum": ["ok", "OK"]},
        "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
        "mixed": {"type": ["integer", "string"]},
        "when": {"$ref": "#/$defs/When"},
        "rooms": {"type": "array", "items": {"type": "object", "properties": {"beds": {"type": "integer", "default": 2}}}},
    },
    "$defs": {"When": {"type": "object", "properties": {"day": {"type": "integer"}, "zone": {"type": "string", "default": "UTC"}}}},
}
SPEC = ToolSpec("transfer", "", PARAMETERS, Effects(reads=("balances",), writes=("balances",)))
READ = ToolSpec("get_balance", "", {"type": "object"}, Effects(reads=("balances",)))
PURE = ToolSpec("get_weather", "", {"type": "object"})
WRITE = (frozenset({"balances"}), 'transfer {"amount":1}')


def key(arguments, mode="canonical"):
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return call_key(ToolCall("transfer", text), SPEC, mode)


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda p: p.__name__)
def test_properties(holds):
    settings(max_examples=1000 // len(PROPERTIES) + 1, deadline=None, database=None, derandomize=True)(holds)()


@pytest.mark.parametrize(
    "forms",
    [
        ['{"amount": 1}', '{"amount": 1.0}', '{"amount": 1e0}', '{"amount": "1"}', '{"amount": "1.0"}', '{"amount": 10e-1}'],
        ['{"rate": -0.0}', '{"rate": 0}', '{"rate": -0}', '{"rate": "-0"}'],
        ['{"source": "1"}', '{"source": 1}', '{"source": 1.0}'],  # a number where text is wanted
        ['{"urgent": true}', '{"urgent": "True"}', '{"urgent": "true"}'],
        ['{"cabin": "business"}', '{"cabin": "Business"}', '{"cabin": "BUSINESS"}'],
        ['{"cabin": 1}', '{"cabin": "1"}', '{"cabin": 1.0}'],
        ['{"size": "3.0"}', '{"size": 3}'],
        ['{"size": true}', '{"size": "true"}', '{"size": "TRUE"}'],
        ["{}", '{"currency": "EUR"}', '{"limit": null}', '{"limit": null, "currency": "EUR"}'],
        ['{"limit": "5"}', '{"limit": 5}', '{"limit": 5.0}'],
        ['{"when": {"day": "3"}}', '{"when": {"zone": "UTC", "day": 3}}'],
        ['{"rooms": [{}, {"beds": "1"}]}', '{"rooms": [{"beds": 2}, {"beds": 1}]}'],
        ['{"source": "e\\u0301"}', '{"source": "\u00e9"}', '{"source": "\\u00e9"}'],
        ['{"source": "\U0001f600"}', '{"source": "\\ud83d\\ude00"}', '{"source": "\ud83d\ude00"}'],
        ['{"rate": 1e400}', '{"rate": 10e399}', '{"rate": "1E+400"}', f'{{"rate": 1{"0" * 400}}}'],
    ],
    ids=lambda forms: forms[0],
)
def test_forms_of_one_call(forms):
    assert len({key(form) for form in forms}) == 1


@pytest.mark.parametrize(
    "calls",
    [
        ['{"amount": 1}', '{"amount": 1.5}', '{"amount": true}', '{"amount": "one"}', '{"amount": "01"}', '{"amount": null}'],
        ['{"source": "1"}', '{"source": "1.0"}', '{"source": true}', '{"source": "true"}', '{"source": null}'],
        ['{"urgent": true}', '{"urgent": 1}', '{"urgent": "yes"}', '{"urgent": false}'],
        ['{"size": "m"}', '{"size": "M"}', '{"size": "S"}', '{"size": 1}'],  # both spellings are the enum's own
        ['{"level": "ok"}', '{"level": "OK"}', '{"level": "Ok"}'],  # the last could be either
        ['{"mixed": "5"}', '{"mixed": 5}'],  # each is admitted as it stands
        ['{"rate": NaN}', '{"rate": "NaN"}', '{"rate": Infinity}', '{"rate": -Infinity}', '{"rate": 1e400}', '{"rate": 1e401}'],
        ['{"amount": 1180591620717411303424}', '{"amount": 1180591620717411303425}', f'{{"amount": {"9" * 6000}}}'],
        ['{"rate": 1e999999999999999999999}', '{"rate": 1e999999999999999999998}'],
        ['{"rate": 0.1}', '{"rate": 0.10000000000000001}'],
        ['{"source": "\ud800"}', '{"source": "\ud801"}', '{"source": "?"}', '{"source": "\ufffd"}'],
        ["not json", "{", '"not json"', "[]", "null", "", "{}", "[" * 100_000, '{"a":' * 100_000],
        ['{"amount": 1, "amount": 2}', '{"amount": 2}', '{"amount": 1}', '{"amount": 2, "amount": 1}'],
        ['{"x": {"\u00e9": 1, "e\u0301": 2}}', '{"x": {"\u00e9": 2}}', '{"x": {"\u00e9": 1}}'],
        ['{"rooms": [{"beds": 1}, {}]}', '{"rooms": [{}, {"beds": 1}]}'],
    ],
    ids=lambda calls: calls[0][:40],
)
def test_different_calls(calls):
    assert len({key(call) for call in calls}) == len(calls)


def test_raw_keys_follow_the_text():
    forms = ["{}", '{"currency": "EUR"}', '{"amount": 1}', '{"amount": 1.0}', '{"amount": "1"}', '{"source": "\u00e9"}', "x"]
    assert len({key(form, "raw") for form in forms}) == len(forms)
    assert key('{"amount":1,"rate":2}', "raw") == key('{"rate": 2, "amount": 1}', "raw")


def test_text_that_no_parser_agrees_on_stands_for_itself():
    for text in ("not json", '{"amount": 1, "amount": 2}', '{"a":' * MAX_DEPTH + "{}" + "}" * MAX_DEPTH, "[1.0]"):
        assert canonical_arguments(text, SPEC) == text
    text = '{"a":' * (MAX_DEPTH - 1) + "{}" + "}" * (MAX_DEPTH - 1)
    assert canonical_arguments(text.replace(":", " : "), None) == text


def test_ten_megabytes_cost_seconds():
    began = time.process_time()
    size = 10_000_000  # characters of JSON
    marks = "a" + "\u0301\u0323" * (size // 4)  # composing these takes hours
    texts = [json.dumps({"source": "x" * size}), f'{{"source": "{marks}"}}', f'{{"rate": {"1" * size}}}', "x" * size]
    texts.append('{"source": [' + "1.50," * (size // 20) + "1]}")
    assert len({key(text) for text in texts}) == len(texts)
    assert time.process_time() - began < 30


def test_unknown_tools_are_keyed_without_a_schema():
    def unknown(text):
        return call_key(ToolCall("new", text), None, "canonical")

    assert unknown('{"b": 1.0, "a": "e\u0301"}') == unknown('{"a":"\u00e9","b":1}')
    assert len({unknown('{"a": 1}'), unknown('{"a": "1"}'), unknown("{}"), unknown('{"a": null}')}) == 4
    call = ToolCall("new", "{}")  # nothing is known of its effects: every earlier write counts
    assert call_key(call, None, "state") != call_key(call, None, "state", [WRITE])


def test_a_changed_schema_misses_and_never_lies():
    def with_unit(unit):
        schema = {"type": "object", "properties": {"city": {"type": "string"}, "unit": unit}}
        return ToolSpec("weather", "", schema)

    def weather(text, unit):
        return call_key(ToolCall("weather", text), with_unit(unit), "canonical")

    plain, celsius, kelvin = {"type": "string"}, {"type": "string", "default": "C"}, {"type": "string", "default": "K"}
    assert weather('{"city": "Oslo", "unit": "C"}', plain) == weather('{"city": "Oslo", "unit": "C"}', kelvin)  # alike in both
    assert weather('{"city": "Oslo"}', celsius) != weather('{"city": "Oslo"}', kelvin)  # another default, another question
    assert weather('{"city": "Oslo"}', plain) != weather('{"city": "Oslo"}', celsius)
    assert weather('{"city": "Oslo", "unit": "3"}', {"type": "integer"}) != weather('{"city": "Oslo", "unit": "3"}', plain)


def test_unions_take_the_alternative_that_fits():
    fee = {"type": "number", "default": 1}
    card = {"type": "object", "required": ["card"], "properties": {"card": {"type": "string"}, "fee": fee}}
    cash = {"type": "object", "required": ["cash"], "properties": {"cash": {"type": "integer"}}}
    dog = {"type": "object", "properties": {"kind": {"const": "dog"}, "age": {"type": "integer", "default": 3}}}
    cat = {"type": "object", "properties": {"kind": {"const": "cat"}, "age": {"type": "integer", "default": 9}}}
    schema = {"properties": {"pay": {"oneOf": [card, cash]}, "pet": {"anyOf": [dog, cat]}, "n": {"allOf": [{"type": "integer"}]}}}
    spec = ToolSpec("f", "", {"type": "object", **schema})

    def text(arguments):
        return canonical_arguments(json.dumps(arguments), spec)

    assert text({"pay": {"card": 12}}) == '{"pay":{"card":"12","fee":1}}'
    assert text({"pay": {"cash": "5"}}) == '{"pay":{"cash":5}}'
    assert text({"pay": {"other": "5"}}) == '{"pay":{"other":"5"}}'  # fits neither: nothing is assumed
    assert text({"pet": {"kind": "cat"}}) == '{"pet":{"age":9,"kind":"cat"}}'
    assert text({"pet": {"age": "1"}}) == '{"pet":{"age":"1"}}'  # fits both
    assert text({"n": "7"}) == '{"n":7}'
    loop = ToolSpec("f", "", {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}, "b": {"$ref": "nowhere"}}})
    assert canonical_arguments('{"a": "1", "b": 1.0}', loop) == '{"a":"1","b":1}'


def test_earlier_writes_count_only_where_they_touch_what_is_read():
    call = ToolCall("get_balance", '{"account_id": "a1"}')
    before, after = call_key(call, READ, "state"), call_key(call, READ, "state", [WRITE])
    assert before != after == call_key(call, READ, "state", [(frozenset({"orders"}), "x"), WRITE])
    assert before == call_key(call, READ, "state", [(frozenset({"orders"}), "x")])
    weather = ToolCall("get_weather", "{}")
    assert call_key(weather, PURE, "state") == call_key(weather, PURE, "state", [WRITE])
    assert call_key(call, READ, "canonical") == call_key(call, READ, "canonical", [WRITE])
