"""One contract, two stores; what happens to files that are no stores; nothing acknowledged is lost."""

import contextlib
import json
import sqlite3
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from cacherl_jax.cache.entries import Recording
from cacherl_jax.cache.key import call_key, canonical_arguments
from cacherl_jax.cache.store import MemoryStore, SQLiteStore, StoreError
from cacherl_jax.types import Kind, ToolCall, ToolResult, ToolSpec

ROOT = Path(__file__).parent.parent.parent

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


def test_results_differ_by_kind_and_by_error_and_keep_apart(store):
    variants = [
        Recording(b"k", "f", "{}", "", ToolResult("x")),
        Recording(b"k", "f", "{}", "", ToolResult("x"), kind=Kind.SIMULATED),
        Recording(b"k", "f", "{}", "", ToolResult("x", "")),
        Recording(b"k", "f", "{}", "", ToolResult("x", "e")),
        Recording(b"k", "f", "{}", "", ToolResult("c", "a\nb")),
        Recording(b"k", "f", "{}", "", ToolResult("b\nc", "a")),
    ]
    for row in variants:
        store.add(row)
    assert [(e.result, e.kind, e.count) for e in store.get(b"k")] == [(r.result, r.kind, 1) for r in variants]
    assert len({e.hash for e in store.entries()}) == len(variants)


def test_the_first_stored_wins_a_tie(store):
    for content in ("b", "a"):
        store.add(Recording(b"k", "f", "{}", "", ToolResult(content)))
    assert store.get(b"k")[0].result.content == "b"


def add_and_fail(store, *rows):
    with store.transaction():
        for row in rows:
            store.add(row)
        store.set_metadata("key", "raw")
        raise ZeroDivisionError


def test_a_failed_transaction_leaves_nothing_and_may_fail_in_part(store):
    store.add(ROWS[0])
    with pytest.raises(ZeroDivisionError):
        add_and_fail(store, ROWS[0], ROWS[3])
    assert [e.count for e in store.entries()] == [1] and store.metadata() == {}
    with store.transaction():
        store.add(ROWS[3])
        with pytest.raises(ZeroDivisionError):
            add_and_fail(store, ROWS[4])
    assert list(store.recordings()) == [ROWS[0], ROWS[3]] and store.metadata() == {}


def test_threads_share_a_store_and_not_each_others_transactions(store):
    def work(name):
        for i in range(50):
            store.add(Recording(b"%d" % (i % 5), "f", "{}", "", ToolResult("x"), episode=f"{name}/{i}"))
            if i % 5 == 0:
                with contextlib.suppress(ZeroDivisionError):
                    add_and_fail(store, ROWS[0], ROWS[3])

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert [e.count for e in store.entries()] == [80] * 5
    assert len({r.episode for r in store.recordings()}) == 400


def test_quarantine_hides_an_entry_its_recordings_and_later_ones(store):
    for row in ROWS:
        store.add(row)
    bad = store.get(b"k1")[0]
    store.set_aside(bad, "why not")
    store.add(ROWS[1])
    assert [e.result.content for e in store.get(b"k1")] == ["x"] and bad.hash not in {e.hash for e in store.of_tool("f")}
    assert len(list(store.entries())) == 4 and list(store.recordings()) == [ROWS[0], *ROWS[3:]]
    [(aside, reason)] = store.quarantined()
    assert (aside.hash, aside.count, reason) == (bad.hash, 3, "why not")
    store.restore(aside)
    assert store.quarantined() == [] and store.get(b"k1")[0].count == 3


# ---- bad input: each with its answer ---------------------------------------------------------------------------------

PAYLOADS = {
    "10 MB": "é" * 10_000_000,
    "control characters": "".join(map(chr, range(256))) + "\0\0",
    "nested": "[" * 100_000 + "]" * 100_000,
    "NaN": '{"a": NaN, "b": -Infinity, "c": 1e999}',
    "duplicate keys": '{"a": 1, "a": 2}',
    "no UTF-8": b"caf\xe9 \xff\xfe".decode("utf-8", "surrogateescape"),
    "surrogate pair in halves": "\ud83d\ude00 is not 😀",
    "empty": "",
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_any_text_comes_back_as_it_was(store, name):
    """Payloads are texts, stored and not read: what they hold in JSON does not matter."""
    text = PAYLOADS[name]
    row = Recording(b"k", "f", text, text[:1000], ToolResult(text, text[:1000]), episode=text[:1000])
    store.add(row)
    assert list(store.recordings()) == [row]
    assert store.get(b"k")[0].result.content == text
    if name == "no UTF-8":  # the bytes of a file, decoded with surrogateescape
        assert store.get(b"k")[0].result.content.encode("utf-8", "surrogateescape") == b"caf\xe9 \xff\xfe"


def test_bytes_and_times_that_are_none_are_refused_before_anything_is_written(store):
    with pytest.raises(TypeError, match=r"'f' holds bytes .* b'\\xff'"):
        store.add(Recording(b"k", "f", "{}", "", ToolResult(b"\xff")))  # type: ignore[arg-type]
    for time in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"recorded_at={time}"):
            store.add(Recording(b"k", "f", "{}", "", ToolResult("x"), recorded_at=time))
    assert list(store.entries()) == []


def test_after_a_change_of_schema_old_entries_answer_where_the_canonical_call_is_the_same(store):
    def spec(**properties):
        return ToolSpec("f", "", {"type": "object", "properties": properties})

    old = spec(n={"type": "integer"}, unit={"type": "string", "default": "C"})
    call = ToolCall.of("f", n=1)
    store.add(Recording(call_key(call, old, "canonical"), "f", canonical_arguments(call.arguments, old), "", ToolResult("x")))
    described = spec(unit={"type": "string", "default": "C", "description": "new"}, n={"type": "integer"}, more={"type": "string"})
    assert store.get(call_key(call, described, "canonical"))
    other_default = spec(n={"type": "integer"}, unit={"type": "string", "default": "F"})
    assert not store.get(call_key(call, other_default, "canonical"))  # another question now
    assert store.get(call_key(ToolCall.of("f", n=1, unit="C"), other_default, "canonical"))
    assert [e.arguments for e in store.of_tool("f")] == ['{"n":1,"unit":"C"}']  # near calls still find it


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["text", "cut", "version", "other", "absent"])
def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path, damage):
    path = tmp_path / "store.sqlite"
    with SQLiteStore(path, mode="rw") as store, store.transaction():
        for i in range(500):
            store.add(Recording(b"%d" % i, "f", "{}", "", ToolResult("x" * 200)))
    if damage == "version":
        with sqlite3.connect(path) as db:
            db.execute("UPDATE metadata SET value = '99' WHERE name = 'schema_version'")
        db.close()
    elif damage == "text":
        path.write_text("not a database" * 1000)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "other":
        path.unlink()
        db = sqlite3.connect(path)
        db.executescript("CREATE TABLE t (x); VACUUM;")
        db.close()
    elif damage == "absent":
        path.unlink()
    before = path.read_bytes() if path.exists() else None
    for mode in ("r", "rw") if damage != "absent" else ("r",):
        with pytest.raises(StoreError, match=r"store\.sqlite") as error:
            SQLiteStore(path, mode=mode)
        if damage == "version":
            assert "99" in str(error.value)
    assert (path.read_bytes() if path.exists() else None) == before


def test_reading_sees_one_moment_while_another_process_would_write(tmp_path):
    with SQLiteStore(tmp_path / "s.sqlite", mode="rw") as writer, SQLiteStore(tmp_path / "s.sqlite", mode="r") as reader:
        writer.add(ROWS[0])
        with reader.reading():
            before = len(list(reader.entries()))
            writer.add(ROWS[3])
            assert len(list(reader.entries())) == before == 1
        assert len(list(reader.entries())) == 2
        with pytest.raises(StoreError, match="opened to be read"):
            reader.add(ROWS[0])


def test_an_entry_and_its_recording_are_kept_together_or_not_at_all(tmp_path):
    with SQLiteStore(tmp_path / "s.sqlite", mode="rw") as store:
        store.add(ROWS[0])
        store._db.execute("CREATE TRIGGER t BEFORE INSERT ON recordings BEGIN SELECT RAISE(ABORT, 'disk on fire'); END")
        with pytest.raises(sqlite3.IntegrityError, match="disk on fire"):
            store.add(ROWS[3])
        with store.transaction(), pytest.raises(sqlite3.IntegrityError, match="disk on fire"):
            store.add(ROWS[4])  # a caller that goes on keeps neither half
        assert [e.count for e in store.entries()] == [1]


def test_processes_create_and_fill_a_store_together(tmp_path):
    program = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        from cacherl_jax.cache.entries import Recording
        from cacherl_jax.cache.store import SQLiteStore
        from cacherl_jax.types import ToolResult
        print("ready", flush=True)
        sys.stdin.readline()
        with SQLiteStore(Path({str(tmp_path / "s.sqlite")!r}), mode="rw") as store:
            for i in range(60):
                store.add(Recording(b"%d" % i, "f", "{{}}", "", ToolResult("x"), episode=sys.argv[1]))
    """)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(i)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for i in range(4)
    ]
    for child in children:
        child.stdout.readline()
    for child in children:  # all open the file at once, which is not there yet
        child.stdin.write("go\n")
        child.stdin.flush()
    assert [child.wait(timeout=60) for child in children] == [0] * 4
    for child in children:
        child.stdin.close()
        child.stdout.close()
    with SQLiteStore(tmp_path / "s.sqlite", mode="r") as store:
        assert [e.count for e in store.entries()] == [4] * 60
        assert sum(1 for _ in store.recordings()) == 240


def test_twenty_kills_lose_nothing_that_was_acknowledged():
    script = ROOT / "experiments" / "faults" / "kill_recording.py"
    done = subprocess.run([sys.executable, script, "--kills", "20", "--seed", "1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["kills"] == 20 and figures["acknowledged_and_lost"] == 0 and figures["recordings"] > 50
