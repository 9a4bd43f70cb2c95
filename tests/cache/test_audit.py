"""The audit against counts made by hand, and swaps that a cache notices or does not."""

import json

import pytest

from cacherl_jax.cache import audit, fit
from cacherl_jax.cache.adapt import Rule
from cacherl_jax.cache.entries import Recording
from cacherl_jax.cache.fidelity import Fidelity
from cacherl_jax.cache.key import call_key
from cacherl_jax.cache.lookup import CachedTools
from cacherl_jax.cache.store import MemoryStore
from cacherl_jax.config import CacheConfig
from cacherl_jax.types import Effects, ToolCall, ToolResult, ToolSpec

SPECS = {
    "find": ToolSpec("find", "", {"type": "object", "properties": {"city": {}, "day": {}}}),
    "pay": ToolSpec("pay", "", {"type": "object", "properties": {"amount": {}}}, Effects(writes=("money",))),
}
CONFIG = CacheConfig(fuzzy_threshold=0.3)


def recording(call, result, episode):
    return Recording(call_key(call, SPECS[call.name], "state"), call.name, call.arguments, "", ToolResult(result), episode)


def filled(*rows):
    store = MemoryStore()
    for r in rows:
        store.add(r)
    return store


OSLO = ToolCall("find", '{"city":"Oslo","day":"1"}')
ROME = ToolCall("find", '{"city":"Rome","day":"1"}')
PAY = ToolCall("pay", '{"amount":5}')


def test_counts_by_hand():
    store = filled(recording(OSLO, '[{"hotel": "A", "price": 9}, {"hotel": "B", "price": 7}]', "s1"), recording(PAY, "{}", "s2"))
    held = [
        recording(OSLO, '[{"price": 7, "hotel": "B"}, {"hotel": "A", "price": 9}]', "h1"),  # the same, in another order
        recording(OSLO, '[{"hotel": "A", "price": 8}]', "h1"),  # 1 of 4 served and 2 true facts
        recording(ROME, '[{"hotel": "A", "price": 9}, {"hotel": "B", "price": 7}]', "h2"),
        recording(ToolCall("pay", '{"amount":6}'), '{"ok": true}', "s2"),  # another dialogue of a stored name
    ]
    found = audit.audit(store, held, SPECS, CONFIG)
    json.dumps(found)
    assert (found["calls"], found["dialogues"], found["dialogues_in_store"]) == (4, 3, 0)
    assert audit.audit(store, store.recordings(), SPECS, CONFIG)["dialogues_in_store"] == 2
    exact = found["tiers"]["exact"]["all"]
    assert (exact["served"], exact["right"], exact["f1"]) == (2, 1, 2 * 5 / (8 + 6))
    fuzzy = found["tiers"]["fuzzy"]
    assert [fuzzy[part]["served"] for part in ("all", "reads", "writes")] == [1, 1, 0]
    assert fuzzy["writes"]["precision"] is None and fuzzy["writes"]["f1"] is None
    # An empty stored result answers no other call, so the write is a miss.
    assert found["tiers"]["miss"]["writes"] == {"served": 1, "right": 0, "precision": [0.0, 0.0, 0.0], "f1": 0.0}
    assert found["tools"]["find"]["exact"]["served"] == 2 and list(found["tiers"]) == ["exact", "fuzzy", "miss"]
    assert found["fidelity"]["brier"] == pytest.approx((0 + 1 + 0.7**2) / 3)
    assert found["fidelity"]["brier_of_tiers"] == pytest.approx((0.25 + 0.25 + 0) / 3)


def test_precision_is_bootstrapped_over_dialogues():
    """Ten calls of a dialogue that fall together say no more than one."""

    def answer(episode, right):
        return audit.Answer(episode, "t", "exact", False, right, 1.0, 0, 0, 0)

    alone = [answer(f"d{i}", i % 2 == 0) for i in range(100)]
    together = [answer(f"d{i // 10}", (i // 10) % 2 == 0) for i in range(100)]
    (mean, low, high), (mean_10, low_10, high_10) = audit.interval(alone), audit.interval(together)
    assert mean == mean_10 == 0.5
    assert high - low == pytest.approx(2 * 1.96 * 0.05, rel=0.1)
    assert high_10 - low_10 == pytest.approx(2 * 1.96 * 0.05 * 10**0.5, rel=0.15)


@pytest.mark.parametrize(
    ("kind", "arguments", "swapped"),
    [
        ("number", {"n": 3, "b": True, "s": "x"}, [{"n": 4, "b": True, "s": "x"}]),
        ("number", {"n": "41", "d": "2019-03-01"}, [{"n": "42", "d": "2019-03-01"}]),
        ("date", {"n": "41", "d": "2019-02-28"}, [{"n": "41", "d": "2019-03-01"}]),
        ("id", {"order": "o-49", "d": "2019-02-28", "n": "7"}, [{"order": "o-40", "d": "2019-02-28", "n": "7"}]),
        ("id", {"city": "Oslo", "text": "room 4"}, []),
        ("polarity", {"wifi": "True", "pets": False}, [{"wifi": "True", "pets": True}, {"wifi": "False", "pets": False}]),
        ("arguments", {"a": "x", "b": "y", "n": 1}, [{"a": "y", "b": "x", "n": 1}]),
        ("arguments", {"a": "x", "b": "x"}, []),
    ],
)  # fmt: skip
def test_what_a_swap_changes(kind, arguments, swapped):
    assert [json.loads(text) for text in audit._swapped(json.dumps(arguments), kind)] == swapped


def test_swaps_go_unnoticed_by_a_fuzzy_cache_and_not_by_an_adapting_one():
    calls = [ToolCall("pay", json.dumps({"amount": 10 * i, "to": "Ann"})) for i in range(20)]
    store = filled(*(recording(c, json.dumps({"paid": 10 * i}), f"d{i}") for i, c in enumerate(calls)))
    cache = CachedTools(store, SPECS, CONFIG, seed=0)
    found = audit.planted_swaps(store, cache)["number"]
    assert found["asked"] == 20 and found["tiers"]["fuzzy"]["served"] == 20
    assert found["tiers"]["fuzzy"]["unswapped"] == 1  # all are equally near: the one that is served is one's own
    rule = Rule("pay", (("amount", "change", "echo"),), 99, 99, 0.0)
    fit.write(store, fit.Fitted((rule,), Fidelity({}, {}, {}), 0))
    adapting = CachedTools(store, SPECS, CONFIG, seed=0)
    assert audit.planted_swaps(store, adapting)["number"] == {"asked": 20, "tiers": {"adapted": {"served": 20, "unswapped": 0}}}
    strict = CachedTools(store, SPECS, CacheConfig(adapted=False, fuzzy_threshold=2, best_effort="off"), seed=0)
    assert audit.planted_swaps(store, strict)["number"] == {"asked": 20, "tiers": {"miss": {"served": 20, "unswapped": 0}}}


def test_a_swap_that_is_stored_itself_is_not_asked():
    calls = [ToolCall("pay", json.dumps({"amount": i})) for i in range(5)]
    store = filled(*(recording(c, f'{{"paid": {i}}}', f"d{i}") for i, c in enumerate(calls)))
    assert audit.planted_swaps(store, CachedTools(store, SPECS, CONFIG, seed=0))["number"]["asked"] == 1
