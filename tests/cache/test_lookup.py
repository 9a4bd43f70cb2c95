"""Serving: tiers in order, provenance, state, draws; and the counts of a real corpus."""

import dataclasses
from collections import Counter

import pytest

from cacherl_jax.cache.imports import import_transcripts, lookup_transcripts
from cacherl_jax.cache.lookup import CachedTools, record_transcript
from cacherl_jax.cache.store import MemoryStore, SQLiteStore
from cacherl_jax.config import CacheConfig
from cacherl_jax.types import Effects, Kind, Message, Task, Tier, ToolCall, ToolSpec, Transcript


def spec(name, *properties, **effects):
    schema = {"type": "object", "properties": {p: {"type": "string"} for p in properties}}
    return ToolSpec(name, "", schema, Effects(**effects))


SPECS = {
    s.name: s
    for s in (
        spec("find", "city", "day"),
        spec("balance", "account", reads=("money",)),
        spec("pay", "account", "amount", reads=("money",), writes=("money",)),
        spec("note", "text", writes=("notes",)),
        spec("unrecorded"),
    )
}
TASK = Task("t", "family", "train", tuple(SPECS), (), ((),))


def transcript(*steps):
    messages = []
    for call, content, error in steps:
        messages += [Message("assistant", tool_calls=(call,)), Message("tool", content, error=error)]
    return Transcript("x", "t", "a", tuple(SPECS), tuple(messages))


FIND = ToolCall.of("find", city="Oslo", day="monday")
BALANCE = ToolCall.of("balance", account="a1")
PAY = ToolCall.of("pay", account="a1", amount="5")


@pytest.fixture
def cache():
    store = MemoryStore()
    record_transcript(
        store, transcript((FIND, "rain", None), (BALANCE, "90", None), (PAY, "ok", None), (BALANCE, "85", None)), SPECS, "state"
    )
    record_transcript(store, transcript((ToolCall.of("pay", account="a2", amount="9"), "{}", "too_little")), SPECS, "state")
    return CachedTools(store, SPECS, CacheConfig(), seed=0)


def test_tiers_in_order_with_provenance(cache):
    session = cache.start(TASK, 0)
    exact = session.execute(ToolCall("find", '{"day":"monday","city":"Oslo"}'))
    assert (exact.tier, exact.kind, exact.score, exact.fidelity) == (Tier.EXACT, Kind.RECORDED, 1.0, 1.0)
    assert exact.result.content == "rain" and len(exact.entry) == 64
    fuzzy = session.execute(ToolCall.of("find", city="Oslo"))
    assert (fuzzy.tier, fuzzy.score, fuzzy.fidelity, fuzzy.entry) == (Tier.FUZZY, 0.5, 0.3, exact.entry)
    best = session.execute(ToolCall.of("find", city="Rome", day="friday"))
    assert (best.tier, best.score, best.fidelity, best.result) == (Tier.BEST_EFFORT, 0.0, 0.1, exact.result)
    miss = session.execute(ToolCall.of("unrecorded"))
    assert (miss.tier, miss.kind, miss.fidelity, miss.entry) == (Tier.MISS, Kind.SIMULATED, 0.0, "")
    assert miss.result.error == "cache_miss"


def test_a_read_after_a_write_is_another_question(cache):
    session = cache.start(TASK, 0)
    assert session.execute(BALANCE).result.content == "90"
    assert session.execute(PAY).tier is Tier.EXACT
    after = session.execute(BALANCE)
    assert (after.tier, after.result.content) == (Tier.EXACT, "85")
    assert cache.start(TASK, 1).execute(BALANCE).result.content == "90"  # an episode's writes are its own


def test_failed_writes_change_nothing_and_other_resources_do_not_matter(cache):
    session = cache.start(TASK, 0)
    assert session.execute(ToolCall.of("pay", account="a2", amount="9")).result.error == "too_little"
    session.execute(ToolCall.of("note", text="hi"))
    assert session.execute(BALANCE).result.content == "90"


def test_without_state_in_the_key_the_cache_lies():
    store = MemoryStore()
    record_transcript(store, transcript((BALANCE, "90", None), (PAY, "ok", None), (BALANCE, "85", None)), SPECS, "canonical")
    assert len(store.get(next(store.entries()).key)) == 2  # one question, two recorded answers


def test_several_results_are_drawn_by_count_and_by_rollout():
    store = MemoryStore()
    for content, count in (("a", 30), ("b", 10)):
        for _ in range(count):
            record_transcript(store, transcript((FIND, content, None)), SPECS, "state")
    cache = CachedTools(store, SPECS, CacheConfig(), seed=1)
    drawn = [cache.start(TASK, sample).execute(FIND).result.content for sample in range(400)]
    assert drawn == [cache.start(TASK, sample).execute(FIND).result.content for sample in range(400)]
    assert 0.65 < Counter(drawn)["a"] / 400 < 0.85


def test_policy_without_best_effort_and_threshold(cache):
    store = MemoryStore()
    record_transcript(store, transcript((FIND, "rain", None)), SPECS, "state")
    strict = CachedTools(store, SPECS, dataclasses.replace(CacheConfig(), best_effort="off", fuzzy_threshold=0.6), seed=0)
    assert strict.start(TASK, 0).execute(ToolCall.of("find", city="Oslo")).tier is Tier.MISS


def test_published_figures_of_sgd(shared_data, tmp_path):
    from cacherl_jax.data import sgd

    with SQLiteStore(tmp_path / "store.sqlite", mode="rw") as store:
        train = sgd.read(shared_data / "sgd" / "train")
        assert import_transcripts(store, train.transcripts(), train.specs, "raw") == {
            "calls": 33_963, "distinct": 21_177, "conflicting": 749, "hits_while_filling": 12_786,
        }  # fmt: skip
        dev = sgd.read(shared_data / "sgd" / "dev")
        assert lookup_transcripts(store, dev.transcripts(), dev.specs, "raw") == {
            "calls": 6_027, "distinct": 4_498, "conflicting": 95, "exact_hits": 1_304,
            "recorded_among_stored": 1_134, "recorded_is_most_frequent": 1_089,
        }  # fmt: skip
    assert not train.problems and not dev.problems
