"""What a store holds: its numbers, and the keys to which it has several answers."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

from cacherl_jax.cache.entries import Entry
from cacherl_jax.cache.store import Store


def stats(store: Store) -> dict[str, Any]:
    """The store in numbers, as a JSON object.

    calls: recordings. results_per_key: number of results -> keys. errors, kinds: name -> entries. times: Unix seconds of
    the oldest and newest recording and how many entries have none. ages: seconds to the snapshot, of a snapshot. bytes: of
    arguments and results in UTF-8.
    """
    with store.reading():
        entries, metadata, quarantined = list(store.entries()), store.metadata(), len(store.quarantined())
    by_tool: dict[str, list[Entry]] = {}
    for entry in entries:
        by_tool.setdefault(entry.tool, []).append(entry)
    ages = sorted(e.age for e in entries if e.age is not None)
    times = [e.recorded_at for e in entries if e.recorded_at is not None]
    return {
        **{name: metadata.get(name) for name in ("snapshot", "taken_at", "key", "source", "licence")},
        **_counts(entries),
        "tools": len(by_tool),
        "quarantined": quarantined,
        "results_per_key": {str(n): keys for n, keys in sorted(Counter(Counter(e.key for e in entries).values()).items())},
        "errors": _by_name(e.result.error for e in entries if e.result.error is not None),
        "kinds": _by_name(e.kind.value for e in entries),
        "times": {"unknown": len(entries) - len(times), "oldest": min(times, default=None), "newest": max(times, default=None)},
        "ages": {"least": ages[0], "median": statistics.median(ages), "most": ages[-1]} if ages else None,
        "by_tool": {tool: _counts(of_tool) for tool, of_tool in sorted(by_tool.items())},
    }


def _counts(entries: list[Entry]) -> dict[str, Any]:
    results = Counter(e.key for e in entries)
    return {
        "entries": len(entries),
        "calls": sum(e.count for e in entries),
        "keys": len(results),
        "conflicting": sum(n > 1 for n in results.values()),
        "failed": sum(e.result.error is not None for e in entries),
        "bytes": {
            "arguments": sum(_size(e.arguments) for e in entries),
            "results": sum(_size(e.result.content) for e in entries),
        },
    }


def _by_name(names: Any) -> dict[str, int]:
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def conflicts(store: Store, *, examples: int = 10) -> dict[str, Any]:
    """Keys with several results, those seen most often first: a tool that draws, that changed, or whose key lacks state.

    keys, calls: how many in all. by_tool: tool -> its conflicting keys, and the share of these keys' calls that got the most
    frequent result. examples: keys with each result and how often it was seen.
    """
    by_key: dict[bytes, list[Entry]] = {}
    for entry in store.entries():
        by_key.setdefault(entry.key, []).append(entry)
    found = [sorted(entries, key=lambda e: (-e.count, e.hash)) for entries in by_key.values() if len(entries) > 1]
    found.sort(key=lambda entries: (-sum(e.count for e in entries), entries[0].key))
    by_tool: dict[str, list[list[Entry]]] = {}
    for entries in found:
        by_tool.setdefault(entries[0].tool, []).append(entries)

    def summary(keys: list[list[Entry]]) -> dict[str, Any]:
        calls = sum(e.count for entries in keys for e in entries)
        return {"keys": len(keys), "calls": calls, "most_frequent": sum(entries[0].count for entries in keys) / calls}

    ordered = sorted(by_tool.items(), key=lambda item: (-len(item[1]), item[0]))
    return {
        "keys": len(found),
        "calls": sum(e.count for entries in found for e in entries),
        "by_tool": {tool: summary(keys) for tool, keys in ordered},
        "examples": [_example(entries) for entries in found[:examples]],
    }


def _example(entries: list[Entry]) -> dict[str, Any]:
    return {
        "key": entries[0].key.hex(),
        "tool": entries[0].tool,
        "arguments": entries[0].arguments,
        "writes": entries[0].writes,
        "results": [
            {
                "entry": e.hash,
                "count": e.count,
                "kind": e.kind.value,
                "error": e.result.error,
                "content": e.result.content[:200],
                "recorded_at": e.recorded_at,
            }
            for e in entries
        ],
    }
