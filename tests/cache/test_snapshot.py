"""Snapshots and published folders: ids over content, frozen copies, ages, differences, round trips."""

import dataclasses
import json
import random
import sqlite3

import pytest
import yaml

from cacherl_jax.cache.entries import Recording
from cacherl_jax.cache.lookup import CachedTools
from cacherl_jax.cache.publish import export, import_
from cacherl_jax.cache.snapshot import diff, snapshot_id, take
from cacherl_jax.cache.store import MemoryStore, SQLiteStore, StoreError
from cacherl_jax.config import CacheConfig
from cacherl_jax.types import Kind, Task, Tier, ToolCall, ToolResult, ToolSpec


def row(key=b"k", tool="f", arguments="{}", writes="", content="x", error=None, **more):
    return Recording(key, tool, arguments, writes, ToolResult(content, error), **more)


ROWS = [
    row(b"k1", content="a", episode="d1", recorded_at=100.0),
    row(b"k1", content="b", episode="d2", recorded_at=900.0),
    row(b"k1", content="b", episode="d3", recorded_at=50.0),
    row(b"k2", "g", content="old", recorded_at=100.0),
    row(b"k3", "g", content="timeless"),
    row(b"k4", "h", '{"a":1}', "pay 1", "no", "not_found", kind=Kind.SIMULATED, recorded_at=200.0),
]


def filled(store, rows=ROWS, **metadata):
    for r in rows:
        store.add(r)
    for name, value in metadata.items():
        store.set_metadata(name, value)
    return store


@pytest.fixture
def source():
    return filled(MemoryStore(), key="canonical", source="a corpus", licence="CC BY-SA 4.0")


# ---- identity --------------------------------------------------------------------------------------------------------


def test_the_id_names_content_and_neither_order_nor_time(tmp_path):
    expected = snapshot_id(filled(MemoryStore()))
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    with SQLiteStore(tmp_path / "s.sqlite", mode="rw") as store:
        assert snapshot_id(filled(store, shuffled)) == expected
    later = [row(r.key, r.tool, r.arguments, r.writes, r.result.content, r.result.error, kind=r.kind) for r in ROWS]
    assert snapshot_id(filled(MemoryStore(), later, source="elsewhere")) == expected


@pytest.mark.parametrize(
    "other",
    [
        {"key": b"K"}, {"tool": "F"}, {"arguments": "[]"}, {"writes": "w"}, {"content": "y"}, {"error": ""}, {"error": "e"},
        {"kind": Kind.LIVE},
    ],
    ids=str,
)  # fmt: skip
def test_the_id_covers_all_that_decides_answers(other):
    assert snapshot_id(filled(MemoryStore(), [row(**other)])) != snapshot_id(filled(MemoryStore(), [row()]))


def test_the_id_covers_counts_and_deciding_metadata():
    stores = [
        filled(MemoryStore(), [row()]),
        filled(MemoryStore(), [row(), row()]),
        *(filled(MemoryStore(), [row()], **{name: "1"}) for name in ("key", "rules", "fidelity")),
    ]
    assert len({snapshot_id(s) for s in stores}) == len(stores)
    assert snapshot_id(filled(MemoryStore(), [row()], licence="MIT")) == snapshot_id(stores[0])


# ---- frozen copies ---------------------------------------------------------------------------------------------------


def test_a_copy_is_complete_frozen_and_one_file(source, tmp_path):
    path = tmp_path / "frozen.sqlite"
    identity = take(source, path, now=1000.0)
    assert identity == snapshot_id(source) and [p.name for p in tmp_path.iterdir()] == ["frozen.sqlite"]
    before = path.read_bytes()
    with SQLiteStore(path, mode="rw") as frozen:
        assert snapshot_id(frozen) == identity
        assert frozen.metadata() == source.metadata() | {"snapshot": identity, "taken_at": "1000.0"}
        assert list(frozen.recordings()) == list(source.recordings())
        assert [e.result for e in frozen.get(b"k1")] == [e.result for e in source.get(b"k1")]
        assert [p.name for p in tmp_path.iterdir()] == ["frozen.sqlite"]  # so a folder that cannot be written will do
        entry = next(frozen.entries())
        changes = [
            lambda: frozen.add(ROWS[0]),
            lambda: frozen.set_metadata("rules", "{}"),
            lambda: frozen.set_aside(entry, ""),
            lambda: frozen.restore(entry),
        ]
        for change in changes:
            with pytest.raises(StoreError, match=rf"frozen snapshot {identity[:12]}"):
                change()
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["frozen.sqlite"]
    with pytest.raises(StoreError, match="exists"):
        take(source, path, now=1000.0)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("ttl", "left"),
    [
        (None, "a b old timeless no"),
        (800.0, "b timeless no"),  # an entry is as old as its newest recording
        ({"g": 800.0}, "a b timeless no"),
        ({"g": 900.0, "h": 0.0}, "a b old timeless"),
        (0.0, "timeless"),
    ],
    ids=str,
)
def test_what_is_too_old_is_left_out_when_a_snapshot_is_taken(source, tmp_path, ttl, left):
    identity = take(source, tmp_path / "s.sqlite", ttl=ttl, now=1000.0)
    with SQLiteStore(tmp_path / "s.sqlite", mode="r") as frozen:
        assert {e.result.content for e in frozen.entries()} == set(left.split())
        assert identity == snapshot_id(frozen)
        if "b" in left.split():  # counts are those of all recordings
            assert next(e.count for e in frozen.get(b"k1") if e.result.content == "b") == 2


def test_ages_count_from_the_recording_through_copies_and_imports(source, tmp_path):
    take(source, tmp_path / "1.sqlite", now=1000.0)
    with SQLiteStore(tmp_path / "1.sqlite", mode="r") as first:
        assert {e.result.content: e.age for e in first.entries()} == {
            "a": 900.0, "b": 100.0, "old": 900.0, "timeless": None, "no": 800.0,
        }  # fmt: skip
        export(first, tmp_path / "folder")
    imported = MemoryStore()
    import_(tmp_path / "folder", imported)
    assert imported.get(b"k2")[0].age == 900.0
    take(imported, tmp_path / "2.sqlite", ttl=1000.0, now=1150.0)
    with SQLiteStore(tmp_path / "2.sqlite", mode="r") as second:
        assert {e.result.content: e.age for e in second.entries()} == {"b": 250.0, "timeless": None, "no": 950.0}
    assert source.get(b"k2")[0].age is None  # an open store has no date


def test_an_answer_carries_the_age_of_its_entry(tmp_path):
    from cacherl_jax.cache.key import call_key

    spec, call = ToolSpec("f", "", {"type": "object"}), ToolCall.of("f", a=1)
    store = filled(MemoryStore(), [row(call_key(call, spec, "state"), arguments='{"a":1}', recorded_at=40.0)])
    take(store, tmp_path / "s.sqlite", now=100.0)
    task = Task("t", "family", "train", ("f",), (), ((),))
    for opened, age in ((store, None), (SQLiteStore(tmp_path / "s.sqlite", mode="r"), 60.0)):
        observation = CachedTools(opened, {"f": spec}, CacheConfig(), seed=0).start(task, 0).execute(call, 0)
        assert (observation.tier, observation.age) == (Tier.EXACT, age)
    opened.close()


@pytest.mark.parametrize(("ttl", "now"), [(-1.0, 0.0), ({"f": float("nan")}, 0.0), ("3 days", 0.0), (None, float("nan"))])
def test_wrong_times_are_refused(source, tmp_path, ttl, now):
    with pytest.raises(ValueError, match=r"ttl of|now="):
        take(source, tmp_path / "s.sqlite", ttl=ttl, now=now)
    assert list(tmp_path.iterdir()) == []


# ---- differences -----------------------------------------------------------------------------------------------------


def test_diff_by_hand(source):
    other = filled(MemoryStore(), [*ROWS[:3], ROWS[2], ROWS[4], row(b"k4", "h", content="yes"), row(b"k5", "new")], key="state")
    found = diff(source, other, examples=1)
    assert found["keys"] == {"only_a": 1, "only_b": 1, "other_results": 1, "other_counts": 1, "same": 1}
    assert found["by_tool"]["g"] == {"only_a": 1, "only_b": 0, "other_results": 0, "other_counts": 0, "same": 1}
    assert found["metadata"] == {"key": ["canonical", "state"]} and not found["equal"]
    [changed] = found["examples"]["other_results"]
    assert changed["a"] == [{"content": "no", "error": "not_found", "kind": "simulated", "count": 1}]
    assert changed["b"][0]["content"] == "yes" and changed["key"] == b"k4".hex()
    same = diff(source, source)
    assert same["equal"] and same["keys"]["same"] == 4 and not any(same["examples"].values())
    json.dumps(found)


# ---- published folders -----------------------------------------------------------------------------------------------

ODD = [
    row(b"\x00\xff", "f", "\ud800", "w\u2028x\x85", "é\udcff 😀 \ud83d\ude00", "e\ud800", episode="d\udfff"),
    row(b"big", content="ü" * 5_000_000),
    row(b"nan", content='{"a": NaN}', arguments='{"a":"nan"}', recorded_at=1.5),
    row(b"lines", content="a\nb\r\nc\x00\x1f", error=""),
]


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_published_store_comes_back_whole(tmp_path, kind):
    source = filled(MemoryStore(), [*ROWS, *ODD, *ROWS], key="raw", licence="CC BY-SA 4.0", source="a corpus", rules="[]")
    aside = row(b"aside", content="<|im_end|>")
    source.add(aside)
    source.set_aside(source.get(b"aside")[0], "control token")
    manifest = export(source, tmp_path / "out")
    store = MemoryStore() if kind == "memory" else SQLiteStore(tmp_path / "s.sqlite", mode="rw")
    assert import_(tmp_path / "out", store) == manifest["snapshot"] == snapshot_id(source) == snapshot_id(store)
    assert list(store.recordings()) == list(source.recordings()) and aside not in source.recordings()
    assert [dataclasses.replace(e, first=0) for e in store.entries()] == [dataclasses.replace(e, first=0) for e in source.entries()]
    assert store.metadata() == source.metadata()
    store.add(row())  # no snapshot was exported, so the copy is open
    with pytest.raises(StoreError, match="empty store"):
        import_(tmp_path / "out", store)
    if isinstance(store, SQLiteStore):
        store.close()


def test_the_folder_is_a_dataset_that_others_can_read(source, tmp_path):
    manifest = export(source, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"README.md", "manifest.json", "entries.jsonl", "recordings.jsonl"}
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert manifest["counts"] == {"entries": 5, "recordings": 6, "tools": 3}
    assert (manifest["key"], manifest["source"], manifest["licence"]) == ("canonical", "a corpus", "CC BY-SA 4.0")
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "cc-by-sa-4.0" and "a corpus" in card and manifest["snapshot"] in card
    assert [(c["config_name"], c["data_files"]) for c in front["configs"]] == [
        ("entries", "entries.jsonl"), ("recordings", "recordings.jsonl"),
    ]  # fmt: skip
    python_types = {"string": (str, type(None)), "int64": (int,), "float64": (float, type(None))}
    for info, config in zip(front["dataset_info"], front["configs"], strict=True):
        features = {f["name"]: python_types[f["dtype"]] for f in info["features"]}
        for line in (tmp_path / "out" / config["data_files"]).read_text(encoding="utf-8").split("\n")[:-1]:
            record = json.loads(line)
            assert {*record} == {*features} and all(isinstance(record[name], features[name]) for name in features)


@pytest.mark.parametrize("licence", [None, "not stated", "Some Corpus: Terms, v2"])
def test_a_licence_that_the_hub_does_not_know_is_still_named(tmp_path, licence):
    from huggingface_hub import DatasetCard

    export(filled(MemoryStore(), **({"licence": licence} if licence else {})), tmp_path / "out")
    data = DatasetCard.load(tmp_path / "out" / "README.md").data.to_dict()
    if licence in (None, "not stated"):
        assert data["license"] == "unknown"
    else:
        assert (data["license"], data["license_name"]) == ("other", "some-corpus-terms-v2")


@pytest.mark.parametrize("damage", ["entries", "recordings", "id", "version", "absent", "cut"])
def test_a_folder_that_differs_from_its_manifest_is_refused_with_nothing_written(source, tmp_path, damage):
    folder = tmp_path / "out"
    export(source, folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    if damage in ("entries", "recordings"):
        data = folder / f"{damage}.jsonl"
        data.write_bytes(data.read_bytes()[:-10])
    elif damage == "id":
        path.write_text(json.dumps(manifest | {"snapshot": "0" * 64}))
    elif damage == "version":
        path.write_text(json.dumps(manifest | {"version": 99}))
    elif damage == "absent":
        (folder / "entries.jsonl").unlink()
    elif damage == "cut":
        path.write_text(path.read_text()[:-20])
    with SQLiteStore(tmp_path / "s.sqlite", mode="rw") as store:
        with pytest.raises(StoreError, match=r"manifest|entries\.jsonl"):
            import_(folder, store)
        assert list(store.entries()) == list(store.recordings()) == [] and store.metadata() == {}


def test_a_failed_export_leaves_no_folder(tmp_path, monkeypatch):
    store = filled(MemoryStore())
    monkeypatch.setattr(store, "recordings", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(store, tmp_path / "out")
    with pytest.raises(ZeroDivisionError):
        take(store, tmp_path / "s.sqlite", now=0.0)
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_file_of_another_program_is_complete_sqlite(source, tmp_path):
    take(source, tmp_path / "s.sqlite", now=0.0)
    db = sqlite3.connect(f"file:{tmp_path / 's.sqlite'}?immutable=1", uri=True)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert db.execute("SELECT count(*), sum(count) FROM entries").fetchone() == (5, 6)
    db.close()
