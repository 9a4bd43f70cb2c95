"""What a store learns about itself: the rules of its adapted tier, and how far its answers can be trusted.

Fidelity is fitted by cross-fitting: dialogues are dealt into folds by a hash of their names; the calls of each fold are
answered from the recordings of the others, with rules learnt from these alone, and compared with what was recorded. A rule
near its threshold is certified on all dialogues and not on a fold's: calls that only such rules would answer are left out,
lest they count for a lower tier that will never see them.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cacherl_jax.cache import fidelity
from cacherl_jax.cache.adapt import Adapter, Rule
from cacherl_jax.cache.entries import Recording
from cacherl_jax.cache.fidelity import Fidelity, Judged
from cacherl_jax.cache.learn import learn
from cacherl_jax.cache.lookup import CachedTools
from cacherl_jax.cache.results import meaning
from cacherl_jax.cache.store import MemoryStore, Store
from cacherl_jax.config import CacheConfig
from cacherl_jax.types import Kind, Tier, ToolCall, ToolSpec

FOLDS = 5
MAX_CALLS = 8000  # answered in all folds together


@dataclass(frozen=True)
class Fitted:
    """What `fit` found: rules of the adapted tier, the model of fidelity, and the number of answers it rests on."""

    rules: tuple[Rule, ...]
    fidelity: Fidelity
    answers: int


def fit(store: Store, specs: Mapping[str, ToolSpec], config: CacheConfig) -> Fitted:
    """Learns from the store's recordings; simulated ones are left out. Nothing is written."""
    recordings = truths(store.recordings())
    rules = learn(recordings, specs, negatives=config.errors == "all") if config.adapted else []
    judged = list(crossfit(recordings, specs, config, rules))
    return Fitted(tuple(rules), fidelity.fit(judged), len(judged))


def write(store: Store, fitted: Fitted) -> None:
    """Puts what was fitted into the store's metadata; it changes the snapshot's id."""
    store.set_metadata("rules", json.dumps([rule.to_json() for rule in fitted.rules], sort_keys=True))
    store.set_metadata("fidelity", json.dumps(fitted.fidelity.to_json(), sort_keys=True))


def truths(recordings: Iterable[Recording]) -> list[Recording]:
    """The recordings that say what a tool answered."""
    return [r for r in recordings if r.kind is not Kind.SIMULATED]


def crossfit(
    recordings: Sequence[Recording],
    specs: Mapping[str, ToolSpec],
    config: CacheConfig,
    rules: Sequence[Rule] = (),
    folds: int = FOLDS,
) -> Iterator[Judged]:
    """Answers to held-out calls, judged. At most MAX_CALLS, of the first dialogues of each fold by hash. rules: those
    certified on all recordings."""
    episodes = sorted({r.episode for r in recordings if r.episode}, key=_hash)
    fold_of = {episode: i % folds for i, episode in enumerate(episodes)}
    by_episode: dict[str, list[Recording]] = defaultdict(list)
    for r in recordings:
        by_episode[r.episode].append(r)
    # A simulator would be asked for every held-out call: its answers are not what is fitted.
    config = replace(config, on_miss="error", best_effort="nearest" if config.best_effort == "simulator" else config.best_effort)
    for fold in range(folds if len(episodes) >= folds else 0):
        kept = [r for r in recordings if fold_of.get(r.episode) != fold]
        held: list[Recording] = []
        for episode in episodes:
            if fold_of[episode] == fold and len(held) < MAX_CALLS / folds:
                held += by_episode[episode]
        part = MemoryStore()
        for r in kept:
            part.add(r)
        found = {(r.tool, r.changes): r for r in learn(kept, specs, negatives=config.errors == "all")} if config.adapted else {}
        shared = [found[(r.tool, r.changes)] for r in rules if (r.tool, r.changes) in found]
        part.set_metadata("rules", json.dumps([rule.to_json() for rule in shared]))
        uncertain = [r for r in rules if (r.tool, r.changes) not in found]
        missed = Adapter(uncertain, part.entries(), specs, negatives=config.errors == "all")
        for r, judged in judge(CachedTools(part, specs, config, seed=fold), held, specs):
            settled = judged.evidence.tier in (Tier.EXACT, Tier.ADAPTED)
            if settled or missed.answer(r.tool, r.arguments, r.writes) is None:
                yield judged


def judge(cache: CachedTools, held: Iterable[Recording], specs: Mapping[str, ToolSpec]) -> Iterator[tuple[Recording, Judged]]:
    """Every held-out call asked of the cache; answers without evidence (misses, simulations) are left out."""
    for i, r in enumerate(held):
        spec = specs.get(r.tool)
        observation, evidence = cache.answer_with_evidence(ToolCall(r.tool, r.arguments), earlier(r, spec), f"{r.episode}/{i}")
        if evidence is not None and observation.kind is not Kind.SIMULATED:
            yield r, Judged(evidence, meaning(observation.result) == meaning(r.result), r.episode)


def earlier(recording: Recording, spec: ToolSpec | None) -> list[tuple[frozenset[str], str]]:
    """Writes before the call from which its key can be made again."""
    touched = frozenset(spec.effects.touches if spec else ())
    return [(touched, line) for line in recording.writes.split("\n") if line]


def _hash(text: str) -> bytes:
    return hashlib.sha256(f"fold {text}".encode("utf-8", "surrogatepass")).digest()
