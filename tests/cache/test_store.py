"""One contract, two stores; what happens to files that are no stores; nothing acknowledged is lost."""

import os
import random
import signal
import subprocess
import sys
import textwrap

import pytest

from cacherl_jax.cache.store import MemoryStore, Recording, SQLiteStore, StoreError, snapshot_id
from cacherl_jax.types import ToolResult

ROWS = [
    Recording(b"k1", "f", '{"a":1}', "", ToolResult("x"), "d1"),
    Recording(b"k1", "f", '{"a":1}', "", ToolResult("y"), "d1", recorded_at=5.0),
    Recording(b"k1", "f", '{"a":1}', "", ToolResult("y"), "d2", recorded_at=7.0),
    Recording(b"k2", "f", '{"a":2}', "w", ToolResult("500 not found", None)),
    Recording(b"k3", "g", "{}", "", ToolResult('{"error": "not_found"}', "not_found")),
    Recording(b"k4", "g", "\ud800", "", ToolResult("é\ud800" + "z" * 100_000)),
]


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    if request.param == "memory":
        yield MemoryStore()
    else:
        with SQLiteStore(tmp_path / "store.sqlite", mode="rw") as opened:
            yield opened


def test_results_are_counted_ranked_and_kept_as_they_were(store):
    for row in ROWS:
        store.add(row)
    assert [(e.result.content, e.count) for e in store.get(b"k1")] == [("y", 2), ("x", 1)]
    assert store.get(b"k3")[0].result == ROWS[4].result and store.get(b"absent") == []
    assert store.get(b"k2")[0].result.error is None  # "500" in a payload is no error
    assert store.get(b"k4")[0].result == ROWS[5].result and store.get(b"k4")[0].arguments == "\ud800"
    assert {e.result.content for e in store.of_tool("f")} == {"x", "y", "500 not found"}
    assert len(list(store.entries())) == 5
    assert store.get(b"k1")[0].recorded_at == 7.0 and store.get(b"k1")[1].recorded_at is None
    assert list(store.recordings()) == ROWS


def test_the_first_stored_wins_a_tie(store):
    for content in ("b", "a"):
        store.add(Recording(b"k", "f", "{}", "", ToolResult(content)))
    assert store.get(b"k")[0].result.content == "b"


def test_snapshot_names_content_not_order(store):
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    for row in shuffled:
        store.add(row)
    other = MemoryStore()
    for row in ROWS:
        other.add(row)
    assert snapshot_id(store) == snapshot_id(other)
    other.add(ROWS[0])
    assert snapshot_id(store) != snapshot_id(other)


@pytest.mark.parametrize("damage", ["text", "cut", "version", "other", "absent"])
def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path, damage):
    path = tmp_path / "store.sqlite"
    with SQLiteStore(path, mode="rw") as store:
        with store.transaction():
            for i in range(500):
                store.add(Recording(b"%d" % i, "f", "{}", "", ToolResult("x" * 200)))
        if damage == "version":
            store.set_metadata("schema_version", "99")
    if damage == "text":
        path.write_text("not a database" * 1000)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "other":
        import sqlite3

        path.unlink()
        sqlite3.connect(path).executescript("CREATE TABLE t (x); VACUUM;")
    elif damage == "absent":
        path.unlink()
    before = path.read_bytes() if path.exists() else None
    for mode in ("r", "rw") if damage != "absent" else ("r",):
        with pytest.raises(StoreError, match=r"store\.sqlite") as error:
            SQLiteStore(path, mode=mode)
        if damage == "version":
            assert "99" in str(error.value)
    assert (path.read_bytes() if path.exists() else None) == before


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path):
    path = tmp_path / "store.sqlite"
    program = textwrap.dedent(f"""
        from pathlib import Path
        from cacherl_jax.cache.store import Recording, SQLiteStore
        from cacherl_jax.types import ToolResult
        store = SQLiteStore(Path({str(path)!r}), mode="rw")
        for i in range(10**9):
            store.add(Recording(b"%d" % i, "f", "{{}}", "", ToolResult(str(i))))
            print(i, flush=True)
    """)
    for round_ in range(3):
        child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        acknowledged = -1
        for line in child.stdout:
            acknowledged = int(line)
            if acknowledged > 40 + 30 * round_:
                os.kill(child.pid, signal.SIGKILL)
                break
        child.wait()
        child.stdout.close()
        with SQLiteStore(path, mode="r") as store:
            assert all(store.get(b"%d" % i) for i in range(acknowledged + 1))
