"""The index of a tool gives the answers of a plain loop over its entries; figures of similarity by hand."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz import fuzz

from cacherl_jax.cache.store import Entry
from cacherl_jax.cache.tiers import ToolIndex, similarity, tokens
from cacherl_jax.types import Kind, ToolResult


def entry(arguments, content="x", writes="", count=1):
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return Entry(b"k" + content.encode(), "f", text, writes, ToolResult(content), Kind.RECORDED, count, None, 0)


def plain_nearest(asked, writes, entries, soft):
    """The definition: every entry by (similarity, same writes, count), then the smaller hash."""
    ranked = sorted(
        entries,
        key=lambda e: (-similarity(asked, tokens(e.arguments), soft), e.writes != writes, -e.count, e.hash),
    )
    return (ranked[0], similarity(asked, tokens(ranked[0].arguments), soft)) if ranked else (None, 0.0)


# Few values, so that equal scores and shared texts are common; \x85 and \u2003 are spaces to some splitters only.
words = st.sampled_from(
    ["cheap", "hotel", "in", "Rome", "in Rome", "Rome in", " ", "cheap hotel in Rome", "a\x85b c", "\u2003d e", "\ud800 x"]
)
texts = st.lists(words, max_size=4).map(" ".join)
values = st.one_of(
    texts, st.integers(0, 2), st.none(), st.lists(st.integers(0, 1) | texts, max_size=2), st.fixed_dictionaries({"n": texts})
)
arguments = st.one_of(st.dictionaries(st.sampled_from("abcd"), values, max_size=4), st.just("no json"))
entries_of_a_tool = st.lists(
    st.builds(entry, arguments, st.sampled_from("uvwxyz"), st.sampled_from(["", "pay 1"]), st.integers(1, 2)), max_size=12
)


@settings(max_examples=400, deadline=None)
@given(entries_of_a_tool, arguments, st.sampled_from(["", "pay 1", "pay 2"]), st.booleans())
def test_the_index_answers_as_the_plain_loop(entries, asked, writes, soft):
    asked = tokens(asked if isinstance(asked, str) else json.dumps(asked))
    assert ToolIndex(entries).nearest(asked, writes, soft) == plain_nearest(asked, writes, entries, soft)


def test_bounds_skip_no_winner_among_many_texts():
    """More groups than the first chunks hold, of lengths that make the bound matter."""
    import random

    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 9))) for _ in range(60)]

    def query():
        return {
            "q": " ".join(rng.choices(vocabulary, k=rng.randint(1, 7))),
            "where": " ".join(rng.choices(vocabulary, k=2)),
            "n": rng.randint(0, 3),
        }

    entries = [entry(query(), content=str(i)) for i in range(1500)]
    index = ToolIndex(entries)
    for _ in range(15):
        asked = tokens(json.dumps(query()))
        assert index.nearest(asked, "") == plain_nearest(asked, "", entries, True)


def test_similarity_by_hand():
    a = tokens('{"a":"x","b":1,"c":{"d":[1,2]}}')
    assert set(a) == {"a", "b", "c.d[0]", "c.d[1]"}
    assert similarity(a, tokens('{"a":"x","b":2,"c":{"d":[1,3]}}')) == 2 / 6
    assert similarity(tokens('{"b":1}'), tokens('{"b":"1"}')) == 0.0  # types differ
    assert similarity(tokens("{}"), tokens("{}")) == 1.0
    rome, cheap = "hotel in Rome", "cheap hotel in Rome"
    ratio = fuzz.token_sort_ratio(rome, cheap) / 100
    assert similarity(tokens(json.dumps({"q": rome, "n": 1})), tokens(json.dumps({"q": cheap, "n": 1}))) == pytest.approx(
        (1 + ratio) / (4 - 1 - ratio)
    )
    assert similarity(tokens(json.dumps({"q": rome})), tokens(json.dumps({"q": cheap})), soft=False) == 0.0
    assert similarity(tokens('{"q":"cheap hotel in Rome"}'), tokens('{"q":"hotel in Rome cheap"}')) == 1.0
    assert similarity(tokens('{"id":"a1"}'), tokens('{"id":"a2"}')) == 0.0  # ids are not free text
