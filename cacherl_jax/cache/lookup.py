"""The cache as a provider of tools: exact, then fuzzy, then best effort, then an honest miss. And its counterpart, recording.

Every answer says how it was found, how near the stored call was, which entry it is, and how far it can be trusted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

from cacherl_jax.cache import tiers
from cacherl_jax.cache.key import KeyMode, Write, call_key, canonical_arguments, canonical_call, raw_call, relevant_writes
from cacherl_jax.cache.store import Entry, Recording, Store
from cacherl_jax.config import CacheConfig
from cacherl_jax.tools.registry import error_result
from cacherl_jax.types import Kind, Observation, Task, Tier, ToolCall, ToolResult, ToolSpec, Transcript


class CachedTools:
    """Answers every call from a store. `seed` makes the draws among several recorded results of one call."""

    def __init__(self, store: Store, specs: Mapping[str, ToolSpec], config: CacheConfig, seed: int) -> None:
        self._specs, self._config, self._seed = specs, config, seed
        # The store is read once: a run sees one snapshot, and lookups cost a dict access.
        self._by_key: dict[bytes, list[Entry]] = {}
        self._by_tool: dict[str, list[Entry]] = {}
        for entry in store.entries():
            self._by_key.setdefault(entry.key, []).append(entry)
            self._by_tool.setdefault(entry.tool, []).append(entry)
        for entries in self._by_key.values():
            entries.sort(key=lambda e: e.hash)
        self._indices: dict[str, tiers.ToolIndex] = {}
        self._nearest: dict[tuple[str, str, str], tuple[Entry | None, float]] = {}

    def start(self, task: Task, sample: int) -> CacheSession:
        return CacheSession(self, f"{self._seed}/{task.id}/{sample}")

    def answer(self, call: ToolCall, earlier: list[Write], draw: str) -> Observation:
        """The cache's answer to a call after the episode's earlier writes; `draw` seeds the choice among results."""
        config, spec = self._config, self._specs.get(call.name)
        if stored := self._by_key.get(call_key(call, spec, config.key, earlier)):
            return _observed(call, _drawn(stored, draw), Tier.EXACT, 1.0, config.fidelity_exact)
        entry, score = self._closest(call, spec, earlier)
        if entry is not None and score >= config.fuzzy_threshold:
            return _observed(call, entry, Tier.FUZZY, score, config.fidelity_fuzzy)
        if entry is not None and config.best_effort == "nearest":
            return _observed(call, entry, Tier.BEST_EFFORT, score, config.fidelity_best_effort)
        missed = error_result("cache_miss", f"no recorded result for {call.name}")
        return Observation(call, missed, Tier.MISS, Kind.SIMULATED, score=score, fidelity=config.fidelity_miss)

    def _closest(self, call: ToolCall, spec: ToolSpec | None, earlier: list[Write]) -> tuple[Entry | None, float]:
        arguments, writes = _stored_form(call, spec, self._config.key, earlier)
        question = (call.name, arguments, writes)
        if question not in self._nearest:
            if call.name not in self._indices:
                self._indices[call.name] = tiers.ToolIndex(self._by_tool.get(call.name, ()))
            self._nearest[question] = self._indices[call.name].nearest(tiers.tokens(arguments), writes)
        return self._nearest[question]


class CacheSession:
    """One episode: remembers its successful writes, on which later answers depend."""

    def __init__(self, cache: CachedTools, name: str) -> None:
        self._cache, self._name = cache, name
        self._earlier: list[Write] = []
        self._calls = 0

    def execute(self, call: ToolCall) -> Observation:
        observation = self._cache.answer(call, self._earlier, f"{self._name}/{self._calls}")
        self._calls += 1
        self._earlier += _write_of(call, self._cache._specs.get(call.name), observation.result)
        return observation


def _observed(call: ToolCall, entry: Entry, tier: Tier, score: float, fidelity: float) -> Observation:
    return Observation(call, entry.result, tier, entry.kind, score, entry.hash, fidelity, entry.age)


def _drawn(entries: list[Entry], draw: str) -> Entry:
    """One of the results of a key, with probability proportional to its count."""
    total = sum(entry.count for entry in entries)
    point = int.from_bytes(hashlib.sha256(draw.encode()).digest()[:8], "big") % total
    for entry in entries:
        point -= entry.count
        if point < 0:
            return entry
    raise AssertionError("counts are positive")


def _write_of(call: ToolCall, spec: ToolSpec | None, result: ToolResult) -> list[Write]:
    if spec is None or not spec.effects.writes or result.error is not None:
        return []
    return [(frozenset(spec.effects.writes), canonical_call(call, spec))]


def _stored_form(call: ToolCall, spec: ToolSpec | None, mode: KeyMode, earlier: list[Write]) -> tuple[str, str]:
    """Arguments and writes as an entry keeps them."""
    if mode == "raw":
        return raw_call(call).removeprefix(call.name + " "), ""
    return canonical_arguments(call.arguments, spec), "\n".join(relevant_writes(spec, earlier)) if mode == "state" else ""


def recordings(
    transcript: Transcript, specs: Mapping[str, ToolSpec], mode: KeyMode, recorded_at: float | None = None
) -> Iterator[Recording]:
    """Every answered call of a transcript, keyed after its earlier writes.

    Results belong to calls by order, as in the rendering. A call whose result is missing is left out.
    """
    earlier: list[Write] = []
    waiting: list[ToolCall] = []
    for message in transcript.messages:
        if message.role == "assistant":
            waiting = list(message.tool_calls)
        elif message.role == "tool" and waiting:
            call = waiting.pop(0)
            spec = specs.get(call.name)
            result = ToolResult(message.content, message.error)
            arguments, writes = _stored_form(call, spec, mode, earlier)
            key = call_key(call, spec, mode, earlier)
            yield Recording(key, call.name, arguments, writes, result, episode=transcript.id, recorded_at=recorded_at)
            earlier += _write_of(call, spec, result)


def record_transcript(store: Store, transcript: Transcript, specs: Mapping[str, ToolSpec], mode: KeyMode) -> int:
    """Adds every answered call of a transcript to the store; returns their number."""
    count = 0
    for recording in recordings(transcript, specs, mode):
        store.add(recording)
        count += 1
    return count
