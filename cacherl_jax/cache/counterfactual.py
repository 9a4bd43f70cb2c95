"""What if one entry had not been recorded, or said something else: a copy of a store, to be asked instead of it."""

from __future__ import annotations

import dataclasses

from cacherl_jax.cache.entries import content_digest
from cacherl_jax.cache.store import MemoryStore, Store, StoreError
from cacherl_jax.types import ToolResult


def without_entry(store: Store, entry: str) -> MemoryStore:
    """A copy in memory without the entry of this hash. Rules and fidelities stay as they were fitted with it; the copy is no
    snapshot, but ages count to where the store's do. Raises StoreError where there is no such entry."""
    return _copy(store, entry, None)


def with_result(store: Store, entry: str, result: ToolResult) -> MemoryStore:
    """As `without_entry`, but every recording of the entry says `result`."""
    return _copy(store, entry, result)


def _copy(store: Store, entry: str, result: ToolResult | None) -> MemoryStore:
    copy = MemoryStore()
    with store.reading():
        changed = next((e for e in store.entries() if e.hash == entry), None)
        if changed is None:
            raise StoreError(f"the store has no entry {entry}; an observation names the one that answered it")
        digest = content_digest(changed.kind, changed.result)
        for recording in store.recordings():
            if (recording.key, content_digest(recording.kind, recording.result)) != (changed.key, digest):
                copy.add(recording)
            elif result is not None:
                copy.add(dataclasses.replace(recording, result=result))
        for name, value in store.metadata().items():
            if name != "snapshot":
                copy.set_metadata(name, value)
    return copy
