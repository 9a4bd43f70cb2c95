"""A recorded corpus into a store, and a corpus looked up in one: the counts that tell what a cache can answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from cacherl_jax.cache.key import KeyMode
from cacherl_jax.cache.lookup import recordings
from cacherl_jax.cache.store import SQLiteStore, Store, StoreError
from cacherl_jax.tools.registry import specs_from_json, specs_to_json
from cacherl_jax.types import ToolSpec, Transcript


def describe(store: Store, specs: Mapping[str, ToolSpec], mode: KeyMode, provenance: Mapping[str, str]) -> None:
    """Writes into a store what its entries are to be read with: how they are keyed, the tools, the source and its licence."""
    tools = json.dumps(specs_to_json(specs), ensure_ascii=False)
    for name, value in ({"key": mode, "tools": tools} | dict(provenance)).items():
        store.set_metadata(name, value)


def described(store: Store) -> tuple[dict[str, ToolSpec], KeyMode]:
    """The tools and the key mode of a store. Raises StoreError where it does not say."""
    metadata = store.metadata()
    mode: Any = metadata.get("key")
    if "tools" not in metadata or mode not in get_args(KeyMode):
        raise StoreError("the store does not say which tools its calls are of and how they are keyed; import or record it anew")
    return specs_from_json(json.loads(metadata["tools"])), mode


def import_transcripts(
    store: SQLiteStore,
    transcripts: Iterable[Transcript],
    specs: Mapping[str, ToolSpec],
    mode: KeyMode,
    provenance: Mapping[str, str] = {},
) -> dict[str, int]:
    """Adds all calls, in order, and what `describe` adds, in one transaction.

    calls; distinct keys; conflicting: keys with more than one result; hits_while_filling: calls whose key was there.
    """
    results: dict[bytes, set[str]] = {}
    calls = hits = 0
    with store.transaction():
        describe(store, specs, mode, provenance)
        for transcript in transcripts:
            for recording in recordings(transcript, specs, mode):
                calls += 1
                hits += recording.key in results
                results.setdefault(recording.key, set()).add(recording.result.content)
                store.add(recording)
    conflicting = sum(len(values) > 1 for values in results.values())
    return {"calls": calls, "distinct": len(results), "conflicting": conflicting, "hits_while_filling": hits}


def lookup_transcripts(
    store: SQLiteStore, transcripts: Iterable[Transcript], specs: Mapping[str, ToolSpec], mode: KeyMode
) -> dict[str, int]:
    """Asks the store for every recorded call and compares with the recording.

    exact_hits: the key is stored; recorded_among_stored: so is this very result; recorded_is_most_frequent: and no other
    result was seen more often (the first stored wins a tie: a statistic of the import, not how answers are served).
    """
    results: dict[bytes, set[str]] = {}
    counts = dict.fromkeys(("calls", "exact_hits", "recorded_among_stored", "recorded_is_most_frequent"), 0)
    for transcript in transcripts:
        for recording in recordings(transcript, specs, mode):
            counts["calls"] += 1
            results.setdefault(recording.key, set()).add(recording.result.content)
            if stored := store.get(recording.key):
                counts["exact_hits"] += 1
                counts["recorded_among_stored"] += any(e.result == recording.result for e in stored)
                counts["recorded_is_most_frequent"] += stored[0].result == recording.result
    conflicting = sum(len(values) > 1 for values in results.values())
    return {"calls": counts.pop("calls"), "distinct": len(results), "conflicting": conflicting} | counts
