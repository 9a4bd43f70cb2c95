"""Serving: tiers in order, provenance, state, draws; and the counts of a real corpus."""

import dataclasses
import hashlib
import itertools
import json
import unicodedata
from collections import Counter
from typing import NamedTuple

import pytest

from cacherl_jax.cache.imports import import_transcripts, lookup_transcripts
from cacherl_jax.cache.lookup import CachedTools, record_transcript
from cacherl_jax.cache.store import MemoryStore, SQLiteStore
from cacherl_jax.config import PAPER_CACHE, CacheConfig, ConfigError, SimulatorConfig
from cacherl_jax.data import sgd
from cacherl_jax.tools.registry import LiveToolError, forbid_live, live_call_count
from cacherl_jax.tools.world import LiveTools, tool_specs
from cacherl_jax.tools.world.database import database
from cacherl_jax.types import Effects, Kind, Message, Task, Tier, ToolCall, ToolFailure, ToolSpec, Transcript


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
    exact = session.execute(ToolCall("find", '{"day":"monday","city":"Oslo"}'), 0)
    assert (exact.tier, exact.kind, exact.score, exact.fidelity) == (Tier.EXACT, Kind.RECORDED, 1.0, 1.0)
    assert exact.result.content == "rain" and len(exact.entry) == 64
    fuzzy = session.execute(ToolCall.of("find", city="Oslo"), 0)
    assert (fuzzy.tier, fuzzy.score, fuzzy.fidelity, fuzzy.entry) == (Tier.FUZZY, 0.5, 0.3, exact.entry)
    best = session.execute(ToolCall.of("find", city="Rome", day="friday"), 0)
    assert (best.tier, best.score, best.fidelity, best.result) == (Tier.BEST_EFFORT, 0.0, 0.1, exact.result)
    miss = session.execute(ToolCall.of("unrecorded"), 0)
    assert (miss.tier, miss.kind, miss.fidelity, miss.entry) == (Tier.MISS, Kind.SIMULATED, 0.0, "")
    assert miss.result.error == "cache_miss"


def test_a_read_after_a_write_is_another_question(cache):
    session = cache.start(TASK, 0)
    assert session.execute(BALANCE, 0).result.content == "90"
    assert session.execute(PAY, 0).tier is Tier.EXACT
    after = session.execute(BALANCE, 0)
    assert (after.tier, after.result.content) == (Tier.EXACT, "85")
    assert cache.start(TASK, 1).execute(BALANCE, 0).result.content == "90"  # an episode's writes are its own


def test_failed_writes_change_nothing_and_other_resources_do_not_matter(cache):
    session = cache.start(TASK, 0)
    assert session.execute(ToolCall.of("pay", account="a2", amount="9"), 0).result.error == "too_little"
    session.execute(ToolCall.of("note", text="hi"), 0)
    assert session.execute(BALANCE, 0).result.content == "90"


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
    drawn = [cache.start(TASK, sample).execute(FIND, 0).result.content for sample in range(400)]
    assert drawn == [cache.start(TASK, sample).execute(FIND, 0).result.content for sample in range(400)]
    assert 0.65 < Counter(drawn)["a"] / 400 < 0.85
    sessions = [cache.start(TASK, 0) for _ in range(2)]
    by_place = {i: sessions[0].execute(FIND, i).result.content for i in range(8)}
    assert by_place == {i: sessions[1].execute(FIND, i).result.content for i in reversed(range(8))}  # whatever came first
    assert set(by_place.values()) == {"a", "b"}


def test_policy_without_best_effort_and_threshold(cache):
    store = MemoryStore()
    record_transcript(store, transcript((FIND, "rain", None)), SPECS, "state")
    strict = CachedTools(store, SPECS, dataclasses.replace(CacheConfig(), best_effort="off", fuzzy_threshold=0.6), seed=0)
    assert strict.start(TASK, 0).execute(ToolCall.of("find", city="Oslo"), 0).tier is Tier.MISS


def cached(*steps, specs=SPECS, mode="state", live=None, **policies):
    store = MemoryStore()
    record_transcript(store, transcript(*steps), specs, mode)
    return CachedTools(store, specs, dataclasses.replace(CacheConfig(), key=mode, **policies), seed=0, live=live)


@pytest.mark.parametrize(
    "negative", [('{"error": "closed"}', "closed"), ("[]", None), ("  \n", None), ("null", None), ("{ }", None)]
)
def test_errors_and_empty_results_are_served_as_the_policy_says(negative):
    near = ToolCall.of("find", city="Oslo")

    def answers(errors, *steps):
        session = cached(*steps, errors=errors).start(TASK, 0)
        return [(o.tier, o.result.content) for o in map(session.execute, (FIND, near), (0, 1))]

    content, error = negative
    only = (FIND, content, error)
    assert answers("exact", only) == [(Tier.EXACT, content), (Tier.MISS, answers("exact", only)[1][1])]
    assert answers("all", only) == [(Tier.EXACT, content), (Tier.FUZZY, content)]
    assert [tier for tier, _ in answers("never", only)] == [Tier.MISS, Tier.MISS]
    good = (FIND, "rain", None)
    assert answers("never", good, only) == [(Tier.EXACT, "rain"), (Tier.FUZZY, "rain")]


@pytest.mark.parametrize("content", ["404 Main Street", '{"error_rate": 500}', "[[]]", "0", "false"])
def test_a_payload_that_looks_like_a_failure_is_a_success(content):
    assert cached((FIND, content, None)).start(TASK, 0).execute(ToolCall.of("find", city="Oslo"), 0).result.content == content


ROOM = ToolSpec(
    "room",
    "",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "kind": {"type": "string", "enum": ["single", "double"]},
            "near": {"type": "object", "properties": {"km": {"type": ["number", "null"]}}},
            "beds": {"type": "array", "items": {"type": "integer"}},
            "pets": {"type": "boolean"},
        },
    },
)


@pytest.mark.parametrize(
    ("gate", "change"),
    [
        ("enum", {"kind": "double"}),
        ("number", {"near": {"km": 2}}),
        ("integer", {"beds": [1, 3]}),
        ("boolean", {"pets": False}),
        ("boolean", {"pets": None}),
    ],
)
def test_the_gate_lets_no_value_of_its_types_differ(gate, change):
    stored = {"city": "Oslo", "kind": "single", "near": {"km": 1}, "beds": [1, 2], "pets": True}
    asked = {k: v for k, v in (stored | change).items() if v is not None}
    step = (ToolCall.of("room", **stored), "number 7", None)
    for gates, changed, tier in (
        ((), asked, Tier.FUZZY),
        ((gate,), asked, Tier.BEST_EFFORT),
        (("enum", "boolean", "integer", "number"), stored | {"city": "Bergen"}, Tier.FUZZY),
    ):
        cache = cached(step, specs={"room": ROOM}, fuzzy_gate=gates)
        assert cache.start(TASK, 0).execute(ToolCall.of("room", **changed), 0).tier is tier


def test_the_gate_finds_the_nearest_of_those_that_agree():
    steps = [(ToolCall.of("room", city=c, kind=k), c, None) for c, k in (("Oslo", "single"), ("Rome", "double"))]
    asked = ToolCall.of("room", city="Oslo", kind="double", pets=True)
    cache = cached(*steps, specs={"room": ROOM}, fuzzy_gate=("enum",), fuzzy_threshold=0.2)
    answer = cache.start(TASK, 0).execute(asked, 0)
    assert (answer.tier, answer.result.content, answer.score) == (Tier.FUZZY, "Rome", 0.25)


def test_a_miss_is_an_error_the_nearest_result_or_the_end():
    far, off = ToolCall.of("find", city="Rome", day="friday"), {"best_effort": "off"}
    step = (FIND, "rain", None)
    error = cached(step, **off).start(TASK, 0).execute(far, 0)
    assert (error.tier, error.result.error, error.fidelity) == (Tier.MISS, "cache_miss", 0.0)
    nearest = cached(step, **off, on_miss="nearest")
    served = nearest.start(TASK, 0).execute(far, 0)
    assert (served.tier, served.kind, served.result.content) == (Tier.BEST_EFFORT, Kind.RECORDED, "rain")
    assert nearest.start(TASK, 0).execute(ToolCall.of("unrecorded"), 0).tier is Tier.MISS  # there is none to serve
    with pytest.raises(ToolFailure, match="no recorded result for find") as failure:
        cached(step, **off, on_miss="fail").start(TASK, 0).execute(far, 0)
    assert failure.value.observation == error


def test_on_a_miss_the_live_tool_answers_after_the_writes_that_the_cache_answered():
    specs, live = tool_specs(), LiveTools("train", 3)
    order = next(o for o, row in database("train", 3).orders.items() if row["status"] == "open")
    cancel, read = ToolCall.of("cancel_order", order_id=order), ToolCall.of("get_order", order_id=order)
    step = (cancel, live.start(TASK, 0).execute(cancel, 0).result.content, None)
    cache = cached(step, specs=specs, fuzzy_threshold=2.0, best_effort="off", on_miss="live", live=live)
    session, before = cache.start(TASK, 0), live_call_count()
    first = session.execute(read, 0)
    assert (first.tier, first.kind, json.loads(first.result.content)["status"]) == (Tier.LIVE, Kind.LIVE, "open")
    assert session.execute(cancel, 0).tier is Tier.EXACT and live_call_count() == before + 1
    assert json.loads(session.execute(read, 0).result.content)["status"] == "cancelled"
    assert live_call_count() == before + 3  # the write, made up for, and the read
    unrecorded = cached(specs=specs, best_effort="off", on_miss="live", live=live).start(TASK, 0)
    assert [unrecorded.execute(call, 0).tier for call in (cancel, read)] == [Tier.LIVE, Tier.LIVE]
    assert live_call_count() == before + 5  # a write that went live is not repeated
    with forbid_live(), pytest.raises(LiveToolError, match="get_order"):
        cache.start(TASK, 0).execute(read, 0)


def test_a_live_provider_of_any_kind_is_refused_where_live_calls_are_forbidden():
    class Anything:
        def start(self, task, sample):
            raise AssertionError("reached")

    cache = cached(best_effort="off", on_miss="live", live=Anything())
    with forbid_live(), pytest.raises(LiveToolError, match="find"):
        cache.start(TASK, 0).execute(FIND, 0)


def test_policies_that_cannot_be_carried_out_are_refused_at_once():
    with pytest.raises(ConfigError, match="needs the live tools"):
        cached(on_miss="live")
    with pytest.raises(ConfigError, match="needs a simulator"):
        cached(best_effort="simulator", simulator=SimulatorConfig(base_url="http://localhost:1/v1", model="m"))


def paper_reference(stored, specs, threshold, call):
    """The paper's three tiers in plain words: (tier, score, results that may be served)."""

    def canonical(call):
        schema = specs[call.name].parameters["properties"]
        given = {k: unicodedata.normalize("NFC", v) for k, v in json.loads(call.arguments).items()}
        defaults = {k: v["default"] for k, v in schema.items() if "default" in v}
        return defaults | given

    def digest(call):
        return hashlib.sha256(f"{call.name} {json.dumps(canonical(call), sort_keys=True)}".encode()).digest()

    same = {content for other, content in stored if digest(other) == digest(call)}
    if same:
        return Tier.EXACT, 1.0, same
    asked, best, results = set(canonical(call).items()), -1.0, set()
    for other, content in stored:
        if other.name == call.name:
            pairs = set(canonical(other).items())
            score = len(asked & pairs) / len(asked | pairs) if asked | pairs else 1.0
            best, results = (score, {content}) if score > best else (best, results | {content} if score == best else results)
    if not results:
        return Tier.MISS, 0.0, set()
    return (Tier.FUZZY if best >= threshold else Tier.BEST_EFFORT), best, results


def test_the_papers_mode_gives_the_papers_tiers_on_recorded_calls(shared_data):
    corpus = sgd.read(shared_data / "sgd" / "train")
    transcripts = list(itertools.islice(corpus.transcripts(), 300))
    store, stored, seen = MemoryStore(), [], Counter()
    for kept in transcripts[:200:2]:
        record_transcript(store, kept, corpus.specs, PAPER_CACHE.key)
        stored += [(r.call, r.content) for r in answered(kept)]
    cache = CachedTools(store, corpus.specs, PAPER_CACHE, seed=0)
    for other in transcripts[1::4]:
        session = cache.start(TASK, 0)
        for asked in answered(other):
            observation = session.execute(asked.call, 0)
            tier, score, results = paper_reference(stored, corpus.specs, PAPER_CACHE.fuzzy_threshold, asked.call)
            assert (observation.tier, observation.score) == (tier, score)
            assert observation.result.content in results or tier is Tier.MISS
            seen[tier] += 1
    assert set(seen) == {Tier.EXACT, Tier.FUZZY, Tier.BEST_EFFORT, Tier.MISS}


class Answered(NamedTuple):
    call: ToolCall
    content: str


def answered(transcript):
    """Calls with their results, in order, read without the cache's own code."""
    calls = [c for m in transcript.messages for c in m.tool_calls]
    return [Answered(*pair) for pair in zip(calls, [m.content for m in transcript.messages if m.role == "tool"], strict=True)]


def test_published_figures_of_sgd(shared_data, tmp_path):
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
