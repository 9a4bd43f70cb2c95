"""The cache as a provider of tools: exact, adapted, fuzzy, best effort, then an honest miss. And its counterpart, recording.

Every answer says how it was found, how near the stored call was, which entry it is, and how far it can be trusted.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence

from cacherl_jax.cache import fidelity, tiers
from cacherl_jax.cache.adapt import Adapter, Rule
from cacherl_jax.cache.best_effort import Shape, Simulator, SimulatorError, fill, learn_shape
from cacherl_jax.cache.gate import gate_values
from cacherl_jax.cache.key import KeyMode, Write, call_key, canonical_arguments, canonical_call, raw_call, relevant_writes
from cacherl_jax.cache.redact import REDACTED, redact_call, redact_result
from cacherl_jax.cache.results import is_negative
from cacherl_jax.cache.store import Entry, Recording, Store
from cacherl_jax.config import CacheConfig, ConfigError
from cacherl_jax.tools.registry import error_result, refuse_live
from cacherl_jax.types import (
    Kind,
    Observation,
    Task,
    Tier,
    ToolCall,
    ToolFailure,
    ToolProvider,
    ToolResult,
    ToolSession,
    ToolSpec,
    Transcript,
)


class CachedTools:
    """Answers every call from a store. `seed` makes the draws among several recorded results of one call.

    live: the tools themselves, for the miss policy `live`. simulator: for `best_effort="simulator"`. Raises ConfigError
    where the configuration asks for one that is not given.
    """

    def __init__(
        self,
        store: Store,
        specs: Mapping[str, ToolSpec],
        config: CacheConfig,
        seed: int,
        *,
        live: ToolProvider | None = None,
        simulator: Simulator | None = None,
    ) -> None:
        if config.on_miss == "live" and live is None:
            raise ConfigError("cache.on_miss='live' needs the live tools, and none were given")
        if config.best_effort == "simulator" and simulator is None:
            raise ConfigError("cache.best_effort='simulator' needs a simulator, and none was given")
        self.specs, self.config, self.live, self._seed, self._simulator = specs, config, live, seed, simulator
        # The store is read once: a run sees one snapshot, and lookups cost a dict access.
        self._by_key: dict[bytes, list[Entry]] = {}
        self._by_tool: dict[str, list[Entry]] = {}  # what may answer other calls than its own
        for entry in store.entries():
            negative = config.errors != "all" and is_negative(entry.result)
            if not negative or config.errors == "exact":
                self._by_key.setdefault(entry.key, []).append(entry)
            if not negative:
                self._by_tool.setdefault(entry.tool, []).append(entry)
        for entries in self._by_key.values():
            entries.sort(key=lambda e: e.hash)
        self.adapter, self._fidelity = _fitted(store, specs, config)
        self._indices: dict[str, dict[str, tiers.ToolIndex]] = {}  # tool -> values that must agree -> index
        self._shapes: dict[str, Shape | None] = {}
        self._nearest: dict[tuple[str, str, str, str], tuple[Entry | None, float]] = {}
        self._trust: dict[tuple[str, Tier, float], tuple[float, fidelity.Evidence]] = {}
        # Rollouts of one task repeat each other's calls to the letter, and reading JSON is most of an exact answer's cost.
        self._key = functools.lru_cache(maxsize=1 << 16)(self._key_of)
        self._canonical_call = functools.lru_cache(maxsize=1 << 16)(self._canonical_call_of)
        self._redacted = any(REDACTED in e.arguments for entries in self._by_key.values() for e in entries)

    def as_stored(self, call: ToolCall) -> ToolCall:
        """The call as a recording of it would read: without its secrets, where the store holds calls that had any."""
        return redact_call(call) if self._redacted else call

    @property
    def blocking(self) -> bool:
        return self.config.on_miss == "live" or self.config.best_effort == "simulator"

    def start(self, task: Task, sample: int) -> CacheSession:
        return CacheSession(self, task, sample, f"{self._seed}/{task.id}/{sample}")

    def answer(self, call: ToolCall, earlier: Sequence[Write], draw: str) -> Observation:
        """The cache's answer to a call after the episode's earlier writes; `draw` seeds the choice among results.

        A miss comes back as a typed error, whatever the policy `fail` or `live` makes of it: that is the session's affair.
        """
        return self.answer_with_evidence(call, earlier, draw)[0]

    def answer_with_evidence(
        self, call: ToolCall, earlier: Sequence[Write], draw: str
    ) -> tuple[Observation, fidelity.Evidence | None]:
        """The answer, and what its fidelity rests on; None for an answer that comes from no stored result."""
        config, spec = self.config, self.specs.get(call.name)
        if stored := self._by_key.get(self._key(call.name, call.arguments, tuple(earlier))):
            return self._observed(call, _drawn(stored, draw), Tier.EXACT, 1.0)
        if (adapted := self._adapted(call, spec, earlier)) is not None:
            return adapted
        entry, score = self.nearest(call, earlier, gated=True)
        if entry is not None and score >= config.fuzzy_threshold:
            return self._observed(call, entry, Tier.FUZZY, score)
        served, problem = self._best_effort(call, earlier)
        if served is None and config.on_miss == "nearest":
            served = self._nearest_of_tool(call, earlier)
        if served is not None:
            return served
        missed = error_result("cache_miss", f"no recorded result for {call.name}{problem}")
        _, score = self.nearest(call, earlier, gated=False)
        return Observation(call, missed, Tier.MISS, Kind.SIMULATED, score=score, fidelity=config.fidelity_miss), None

    def _adapted(
        self, call: ToolCall, spec: ToolSpec | None, earlier: Sequence[Write]
    ) -> tuple[Observation, fidelity.Evidence] | None:
        """A stored result for other arguments, where a certified rule makes it this call's; None where none does."""
        if self.adapter is None:
            return None
        arguments, writes = stored_form(call, spec, self.config.key, earlier)
        found = self.adapter.answer(call.name, arguments, writes)
        if found is None:
            return None
        score = tiers.similarity(tiers.tokens(arguments), tiers.tokens(found.entry.arguments), self.config.similarity == "soft")
        evidence = fidelity.Evidence(
            call.name, Tier.ADAPTED, score, found.agreeing, found.conflicting, _writes(spec), found.rule.precision
        )
        trust = fidelity.estimate(self._fidelity, self.config, evidence, found.entry.kind)
        made = Observation(call, found.result, Tier.ADAPTED, found.entry.kind, score, found.entry.hash, trust, found.entry.age)
        return made, evidence

    def _observed(self, call: ToolCall, entry: Entry, tier: Tier, score: float) -> tuple[Observation, fidelity.Evidence]:
        known = entry.hash, tier, score
        if known not in self._trust:
            stored = [e for e in self._by_key.get(entry.key, ()) if e.kind is not Kind.SIMULATED]
            others = sum(e.count for e in stored if e.result != entry.result)
            agreeing = entry.count if entry.kind is not Kind.SIMULATED else 0
            evidence = fidelity.Evidence(entry.tool, tier, score, agreeing, others, _writes(self.specs.get(entry.tool)))
            self._trust[known] = fidelity.estimate(self._fidelity, self.config, evidence, entry.kind), evidence
        trust, evidence = self._trust[known]
        return Observation(call, entry.result, tier, entry.kind, score, entry.hash, trust, entry.age), evidence

    def write_of(self, call: ToolCall, result: ToolResult) -> list[Write]:
        """What an answered call adds to the episode's chain of writes."""
        spec = self.specs.get(call.name)
        if spec is None or not spec.effects.writes or result.error is not None:
            return []
        return [(frozenset(spec.effects.writes), self._canonical_call(call.name, call.arguments))]

    def _key_of(self, name: str, arguments: str, earlier: tuple[Write, ...]) -> bytes:
        return call_key(ToolCall(name, arguments), self.specs.get(name), self.config.key, earlier)

    def _canonical_call_of(self, name: str, arguments: str) -> str:
        return canonical_call(ToolCall(name, arguments), self.specs.get(name))

    def nearest(self, call: ToolCall, earlier: Sequence[Write], *, gated: bool) -> tuple[Entry | None, float]:
        """The most similar servable entry of the tool and its similarity; `gated`: among those that pass the gate."""
        spec, gate = self.specs.get(call.name), self.config.fuzzy_gate if gated else ()
        arguments, writes = stored_form(call, spec, self.config.key, earlier)
        agreed = gate_values(arguments, spec, gate) if gate else ""
        question = (call.name, agreed, arguments, writes)
        if question not in self._nearest:
            index = self._index(call.name, spec, gate).get(agreed)
            soft = self.config.similarity == "soft"
            self._nearest[question] = index.nearest(tiers.tokens(arguments), writes, soft) if index else (None, 0.0)
        return self._nearest[question]

    def _index(self, tool: str, spec: ToolSpec | None, gate: Sequence[str]) -> dict[str, tiers.ToolIndex]:
        name = f"gated {tool}" if gate else tool
        if name not in self._indices:
            groups: dict[str, list[Entry]] = {}
            for entry in self._by_tool.get(tool, ()):
                groups.setdefault(gate_values(entry.arguments, spec, gate) if gate else "", []).append(entry)
            self._indices[name] = {agreed: tiers.ToolIndex(entries) for agreed, entries in groups.items()}
        return self._indices[name]

    def ranked(self, call: ToolCall, earlier: Sequence[Write], count: int) -> list[tuple[Entry, float]]:
        """The `count` nearest servable entries of the tool with their similarity, in the order in which they would serve."""
        arguments, writes = stored_form(call, self.specs.get(call.name), self.config.key, earlier)
        asked, soft = tiers.tokens(arguments), self.config.similarity == "soft"
        scored = [(e, tiers.similarity(asked, tiers.tokens(e.arguments), soft)) for e in self._by_tool.get(call.name, ())]
        scored.sort(key=lambda pair: (-pair[1], pair[0].writes != writes, -pair[0].count, pair[0].hash))
        return scored[:count]

    def _nearest_of_tool(self, call: ToolCall, earlier: Sequence[Write]) -> tuple[Observation, fidelity.Evidence] | None:
        entry, score = self.nearest(call, earlier, gated=False)
        return self._observed(call, entry, Tier.BEST_EFFORT, score) if entry else None

    def _best_effort(
        self, call: ToolCall, earlier: Sequence[Write]
    ) -> tuple[tuple[Observation, fidelity.Evidence | None] | None, str]:
        """The last tier's answer, or None and what went wrong ("" for nothing)."""
        config, spec = self.config, self.specs.get(call.name)
        if config.best_effort == "nearest":
            return self._nearest_of_tool(call, earlier), ""
        result, entry = None, ""
        if config.best_effort == "schema":
            arguments, _ = stored_form(call, spec, config.key, earlier)
            if call.name not in self._shapes:
                self._shapes[call.name] = learn_shape(self._by_tool.get(call.name, ()))
            shape = self._shapes[call.name]
            result = fill(shape, arguments) if shape is not None else None
        elif config.best_effort == "simulator" and self._simulator is not None and spec is not None:
            _, writes = stored_form(call, spec, config.key, earlier)
            examples = [e for e, _ in self.ranked(call, earlier, config.simulator.examples)]
            try:
                stored = self._simulator.simulate(call_key(call, spec, config.key, earlier), call, spec, writes, examples)
            except SimulatorError as error:
                return None, f"; the simulator failed: {error}"
            result, entry = stored.result, stored.hash
        if result is None:
            return None, ""
        made = Observation(call, result, Tier.BEST_EFFORT, Kind.SIMULATED, 0.0, entry, config.fidelity_best_effort)
        return (made, None), ""


class CacheSession:
    """One episode: remembers its successful writes, on which later answers depend."""

    def __init__(self, cache: CachedTools, task: Task, sample: int, name: str) -> None:
        self._cache, self._task, self._sample, self._name = cache, task, sample, name
        self._earlier: list[Write] = []
        self._live: ToolSession | None = None
        self._lock = threading.Lock()  # calls of one turn may come together
        self._unseen: list[tuple[ToolCall, int]] = []  # writes that the live tools have not seen

    def execute(self, call: ToolCall, index: int) -> Observation:
        asked = self._cache.as_stored(call)
        observation = self._cache.answer(asked, self._earlier, f"{self._name}/{index}")
        observation = observation if asked is call else dataclasses.replace(observation, call=call)
        policy = self._cache.config.on_miss
        if observation.tier is Tier.MISS and policy == "fail":
            raise ToolFailure(observation)
        if observation.tier is Tier.MISS and policy == "live":
            observation = self._ask_live(call, index)
        written = self._cache.write_of(asked, observation.result)
        self._earlier += written
        if written and policy == "live" and observation.tier is not Tier.LIVE:
            self._unseen.append((call, index))
        return observation

    def _ask_live(self, call: ToolCall, index: int) -> Observation:
        """The tool's own answer, in a live session that has first made the episode's writes that the cache answered."""
        refuse_live(call)
        with self._lock:
            if self._live is None:
                assert self._cache.live is not None, "CachedTools checks that `live` is given"
                self._live = self._cache.live.start(self._task, self._sample)
            while self._unseen:
                self._live.execute(*self._unseen.pop(0))
        return self._live.execute(call, index)


def _fitted(store: Store, specs: Mapping[str, ToolSpec], config: CacheConfig) -> tuple[Adapter | None, fidelity.Fidelity | None]:
    """What was fitted on the store, from its metadata; None for what was not, or is not wanted."""
    known = store.metadata()
    adapter = model = None
    if config.adapted and "rules" in known:
        rules = [Rule.from_json(row) for row in json.loads(known["rules"])]
        adapter = Adapter(rules, store.entries(), specs, negatives=config.errors == "all") if rules else None
    if config.fidelity == "fitted" and "fidelity" in known:
        model = fidelity.Fidelity.from_json(json.loads(known["fidelity"]))
    return adapter, model


def _writes(spec: ToolSpec | None) -> bool:
    return spec is not None and bool(spec.effects.writes)


def _drawn(entries: list[Entry], draw: str) -> Entry:
    """One of the results of a key, with probability proportional to its count."""
    if len(entries) == 1:
        return entries[0]
    total = sum(entry.count for entry in entries)
    point = int.from_bytes(hashlib.sha256(draw.encode()).digest()[:8], "big") % total
    for entry in entries:
        point -= entry.count
        if point < 0:
            return entry
    raise AssertionError("counts are positive")


def write_of(call: ToolCall, spec: ToolSpec | None, result: ToolResult) -> list[Write]:
    """What an answered call adds to its episode's chain of writes: itself, if it writes and did not fail."""
    if spec is None or not spec.effects.writes or result.error is not None:
        return []
    return [(frozenset(spec.effects.writes), canonical_call(call, spec))]


def stored_form(call: ToolCall, spec: ToolSpec | None, mode: KeyMode, earlier: Sequence[Write]) -> tuple[str, str]:
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
            call = redact_call(waiting.pop(0))
            spec = specs.get(call.name)
            result = redact_result(ToolResult(message.content, message.error))
            arguments, writes = stored_form(call, spec, mode, earlier)
            key = call_key(call, spec, mode, earlier)
            yield Recording(key, call.name, arguments, writes, result, episode=transcript.id, recorded_at=recorded_at)
            earlier += write_of(call, spec, result)


def record_transcript(store: Store, transcript: Transcript, specs: Mapping[str, ToolSpec], mode: KeyMode) -> int:
    """Adds every answered call of a transcript to the store; returns their number."""
    count = 0
    for recording in recordings(transcript, specs, mode):
        store.add(recording)
        count += 1
    return count
