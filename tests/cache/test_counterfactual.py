"""A store with one entry changed: all else answers as before."""

import json

import pytest

from cacherl_jax.cache import snapshot
from cacherl_jax.cache.counterfactual import with_result, without_entry
from cacherl_jax.cache.store import MemoryStore, Recording, SQLiteStore, StoreError
from cacherl_jax.types import ToolResult

KEYS = [bytes([i]) * 16 for i in range(3)]


@pytest.fixture(params=["memory", "snapshot"])
def store(request, tmp_path):
    made = MemoryStore() if request.param == "memory" else SQLiteStore(tmp_path / "s.sqlite", mode="rw")
    for key, content, at in ((0, "a", 1.0), (1, "b", 2.0), (0, "a", 3.0), (0, "c", None), (2, "lone \ud83d", 4.0)):
        made.add(Recording(KEYS[key], "f", json.dumps({"x": key}), "", ToolResult(content), f"e{key}", recorded_at=at))
    made.set_metadata("key", "state")
    if request.param == "memory":
        return made
    snapshot.take(made, tmp_path / "frozen.sqlite", now=10.0)
    return SQLiteStore(tmp_path / "frozen.sqlite", mode="r")


def test_one_entry_is_left_out_or_says_something_else(store):
    changed, *_ = store.get(KEYS[0])
    assert (changed.result.content, changed.count) == ("a", 2)
    less = without_entry(store, changed.hash)
    assert [e.result.content for e in less.get(KEYS[0])] == ["c"]
    other = with_result(store, changed.hash, ToolResult("z", "broken"))
    assert [(e.result, e.count) for e in other.get(KEYS[0])] == [(ToolResult("z", "broken"), 2), (ToolResult("c"), 1)]
    for copy in (less, other):
        for key in KEYS[1:]:
            assert [(e.hash, e.count, e.age) for e in copy.get(key)] == [(e.hash, e.count, e.age) for e in store.get(key)]
        assert copy.metadata().get("key") == "state" and "snapshot" not in copy.metadata()
    assert [r.episode for r in other.recordings()] == ["e0", "e1", "e0", "e0", "e2"]
    assert [e.result.content for e in store.get(KEYS[0])] == ["a", "c"]  # the store itself is as it was
    with pytest.raises(StoreError, match="no entry 1234"):
        without_entry(store, "1234")
