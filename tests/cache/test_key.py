"""Keys: what makes two calls the same, and what must not."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from cacherl_jax.cache.key import call_key, canonical_arguments
from cacherl_jax.types import Effects, ToolCall, ToolSpec

PARAMETERS = {
    "type": "object",
    "properties": {
        "source": {"type": "string"},
        "target": {"type": "string"},
        "amount": {"type": "integer"},
        "rate": {"type": "number"},
        "currency": {"type": "string", "default": "EUR"},
    },
}
SPEC = ToolSpec("transfer", "", PARAMETERS, Effects(reads=("balances",), writes=("balances",)))
READ = ToolSpec("get_balance", "", {"type": "object"}, Effects(reads=("balances",)))
PURE = ToolSpec("get_weather", "", {"type": "object"})
WRITE = (frozenset({"balances"}), 'transfer {"amount":1}')


def key(arguments, mode="canonical"):
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return call_key(ToolCall("transfer", text), SPEC, mode)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda x: st.lists(x, max_size=3))


@settings(max_examples=1000, deadline=None)
@given(st.dictionaries(st.text(max_size=6), json_values, min_size=2, max_size=4), st.randoms())
def test_order_of_keys_and_spacing_never_matter(arguments, random):
    items = list(arguments.items())
    random.shuffle(items)
    for mode in ("raw", "canonical", "state"):
        assert key(json.dumps(arguments), mode) == key(json.dumps(dict(items), indent=2, ensure_ascii=False), mode)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=8), st.text(max_size=8))
def test_swapped_values_never_share_a_key(a, b):
    import unicodedata

    same = unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)
    assert (key({"source": a, "target": b}) == key({"source": b, "target": a})) == same


def test_numbers_follow_the_schema():
    forms = ["1", "1.0", "1e0", '"1"', '"1.0"']
    assert len({key(f'{{"amount": {form}}}') for form in forms}) == 1
    assert key('{"rate": -0.0}') == key('{"rate": 0}')
    assert key('{"source": "1"}') == key('{"source": 1}') != key('{"source": "1.0"}')
    assert key('{"amount": 1}') != key('{"amount": 1.5}') != key('{"amount": true}')


def test_defaults_unicode_and_raw():
    assert key({"amount": 1}) == key({"amount": 1, "currency": "EUR"}) != key({"amount": 1, "currency": "USD"})
    assert key({"source": "e\u0301"}) == key({"source": "\u00e9"})
    assert key({"amount": 1}, "raw") != key({"amount": 1, "currency": "EUR"}, "raw")
    assert key({"amount": 1}, "raw") != key({"amount": 1.0}, "raw")


def test_text_that_is_no_json_has_a_key_of_its_own():
    assert canonical_arguments("not json", SPEC) == "not json"
    assert len({key("not json"), key("{"), key("[" * 100_000), key('{"rate": NaN}')}) == 4


def test_earlier_writes_count_only_where_they_touch_what_is_read():
    call = ToolCall("get_balance", '{"account_id": "a1"}')
    before, after = call_key(call, READ, "state"), call_key(call, READ, "state", [WRITE])
    assert before != after == call_key(call, READ, "state", [(frozenset({"orders"}), "x"), WRITE])
    assert before == call_key(call, READ, "state", [(frozenset({"orders"}), "x")])
    weather = ToolCall("get_weather", "{}")
    assert call_key(weather, PURE, "state") == call_key(weather, PURE, "state", [WRITE])
    assert call_key(call, READ, "canonical") == call_key(call, READ, "canonical", [WRITE])
