"""Snapshots: frozen copies of a store that runs can name, compare and publish.

A snapshot's id is over content alone: neither time nor the order of insertion changes it. What is too old is left out when
a snapshot is taken, never while one is served, so that a run's answers do not depend on the day. publish.py exports them.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cacherl_jax.cache.entries import Entry, content_digest
from cacherl_jax.cache.store import SQLiteStore, Store, StoreError

# Metadata that decides answers, beside the entries.
DECIDING = ("key", "rules", "fidelity")


def snapshot_id(store: Store) -> str:
    """SHA-256 over all entries, sorted, and the metadata that decides answers."""
    with store.reading():
        metadata = store.metadata()
        lines = sorted(map(_entry_digest, store.entries()))
    head = [part for name in DECIDING if name in metadata for part in (name, metadata[name])]
    return hashlib.sha256(b"".join([_digest(head), *lines])).hexdigest()


def _entry_digest(entry: Entry) -> bytes:
    texts = [entry.key.hex(), entry.tool, entry.arguments, entry.writes, str(entry.count)]
    return _digest([*texts, content_digest(entry.kind, entry.result).hex()])


def _digest(texts: Iterable[str]) -> bytes:
    parts = [text.encode("utf-8", "surrogatepass") for text in texts]
    return hashlib.sha256(b"".join(b"%d:%b" % (len(part), part) for part in parts)).digest()


def take(store: Store, path: Path, *, ttl: Mapping[str, float] | float | None = None, now: float) -> str:
    """Writes a frozen copy of the store to a new file and returns its id.

    ttl: seconds after which an entry's newest recording is too old, for all tools or by tool; entries of other tools, and
    entries whose time is unknown, stay. now: Unix seconds, kept as "taken_at". A copy of a copy counts from the recording.
    Raises StoreError where the file exists; nothing is left behind when it fails.
    """
    limits = ttl if isinstance(ttl, Mapping) else {}
    for name, seconds in limits.items() if limits else [("all tools", ttl)]:
        if seconds is not None and not (isinstance(seconds, (int, float)) and seconds >= 0):
            raise ValueError(f"ttl of {name} is {seconds!r}; expected seconds, none of them negative")
    if not math.isfinite(now):
        raise ValueError(f"now={now} is no time")
    if path.exists():
        raise StoreError(f"{path} exists; a snapshot is written to a new file")

    def too_old(entry: Entry) -> bool:
        limit = ttl if isinstance(ttl, (int, float)) else limits.get(entry.tool)
        return limit is not None and entry.recorded_at is not None and now - entry.recorded_at > limit

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with SQLiteStore(partial, mode="rw") as copy, store.reading():
            # Recordings of an entry that stays are all kept: its count says how often the result was seen.
            old = {(e.key, content_digest(e.kind, e.result)) for e in store.entries() if too_old(e)}
            with copy.transaction():
                for recording in store.recordings():
                    if not old or (recording.key, content_digest(recording.kind, recording.result)) not in old:
                        copy.add(recording)
                for name, value in store.metadata().items():
                    if name not in ("snapshot", "taken_at"):
                        copy.set_metadata(name, value)
                identity = snapshot_id(copy)
                copy.set_metadata("taken_at", repr(float(now)))
                copy.set_metadata("snapshot", identity)
            copy.to_single_file()
        partial.rename(path)
    finally:
        for left in partial.parent.glob(f"{partial.name}*"):
            left.unlink()
    return identity


def diff(a: Store, b: Store, *, examples: int = 5) -> dict[str, Any]:
    """What answers differently in two stores, by key.

    keys: how many are "only_a", "only_b", with "other_results" (other texts, errors or kinds), with "other_counts" (the same
    results, seen more or less often), and "same". by_tool: the same numbers. examples: the first of each by key.
    metadata: name -> [of a, of b], None where absent, for what decides answers.
    """
    in_a, in_b = _by_key(a), _by_key(b)
    change = {key: _change(in_a.get(key), in_b.get(key)) for key in sorted({*in_a, *in_b})}
    kinds = ("only_a", "only_b", "other_results", "other_counts", "same")
    by_tool: dict[str, dict[str, int]] = {}
    shown: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds if kind != "same"}
    for key, kind in change.items():
        sides = {"a": in_a.get(key, []), "b": in_b.get(key, [])}
        entry = (sides["a"] or sides["b"])[0]
        counts = by_tool.setdefault(entry.tool, dict.fromkeys(kinds, 0))
        counts[kind] += 1
        if kind != "same" and len(shown[kind]) < examples:
            results = {side: [_result(e) for e in entries] for side, entries in sides.items() if entries}
            shown[kind].append(
                {"key": key.hex(), "tool": entry.tool, "arguments": entry.arguments, "writes": entry.writes} | results
            )
    ids = [snapshot_id(a), snapshot_id(b)]
    of_a, of_b = a.metadata(), b.metadata()
    return {
        "snapshots": ids,
        "equal": ids[0] == ids[1],
        "metadata": {n: [of_a.get(n), of_b.get(n)] for n in DECIDING if of_a.get(n) != of_b.get(n)},
        "keys": {kind: sum(counts[kind] for counts in by_tool.values()) for kind in kinds},
        "by_tool": dict(sorted(by_tool.items())),
        "examples": shown,
    }


def _by_key(store: Store) -> dict[bytes, list[Entry]]:
    found: dict[bytes, list[Entry]] = {}
    for entry in store.entries():
        found.setdefault(entry.key, []).append(entry)
    return {key: sorted(entries, key=lambda e: (-e.count, e.hash)) for key, entries in found.items()}


def _change(a: list[Entry] | None, b: list[Entry] | None) -> str:
    if a is None or b is None:
        return "only_b" if a is None else "only_a"
    # Keys are hashes of tool, arguments and writes; hand-made stores may still disagree on these.
    results = [{(e.hash, e.tool, e.arguments, e.writes): e.count for e in entries} for entries in (a, b)]
    if results[0] == results[1]:
        return "same"
    return "other_counts" if results[0].keys() == results[1].keys() else "other_results"


def _result(entry: Entry) -> dict[str, Any]:
    return {"content": entry.result.content[:200], "error": entry.result.error, "kind": entry.kind.value, "count": entry.count}
