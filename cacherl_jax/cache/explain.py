"""Why a call gets the answer that it gets: its key, every tier in turn with its reason, and the nearest stored calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cacherl_jax.cache.gate import gate_values
from cacherl_jax.cache.key import Write, call_key, canonical_call, raw_call
from cacherl_jax.cache.lookup import CachedTools, stored_form
from cacherl_jax.cache.results import is_negative
from cacherl_jax.cache.store import Entry, Store
from cacherl_jax.tools.registry import check_call
from cacherl_jax.types import Observation, Tier, ToolCall

SHOWN = 200  # characters of a result
NEAREST = 5


def explain(store: Store, cache: CachedTools, call: ToolCall, earlier: Sequence[Write], draw: str = "explain/0") -> dict[str, Any]:
    """A JSON object about one call after an episode's earlier writes.

    call: its canonical text; key; writes: the earlier ones that the key holds. refused: the error with which the agent loop
    answers before the cache is asked, else None. served: the answer with its provenance. tried: every tier up to the one
    that served, with the reason. rules: those of the adapted tier, and how many stored calls each leads from. nearest: the
    most similar stored calls that may answer others. `draw` seeds the choice among several results of the key; `cache`
    reads `store`. Nothing live is called.
    """
    config, spec = cache.config, cache.specs.get(call.name)
    arguments, writes = stored_form(call, spec, config.key, earlier)
    key, gate = call_key(call, spec, config.key, earlier), config.fuzzy_gate
    served = cache.answer(call, earlier, draw)
    refused, rules = check_call(cache.specs, call), _rules(cache, call, earlier)
    return {
        "call": raw_call(call) if config.key == "raw" else canonical_call(call, spec),
        "key": key.hex(),
        "writes": writes.splitlines(),
        "refused": refused and refused.content,
        "served": _served(served),
        "tried": _tried(store, cache, call, earlier, served, rules),
        "rules": rules,
        "nearest": [
            {
                "similarity": score,
                "arguments": entry.arguments,
                "result": entry.result.content[:SHOWN],
                "error": entry.result.error,
                "count": entry.count,
                "kind": entry.kind.value,
                "same_writes": entry.writes == writes,
                "passes_gate": gate_values(entry.arguments, spec, gate) == gate_values(arguments, spec, gate),
                "entry": entry.hash,
            }
            for entry, score in cache.ranked(call, earlier, NEAREST)
        ],
    }


def _served(o: Observation) -> dict[str, Any]:
    return {
        "tier": o.tier.value,
        "kind": o.kind.value,
        "score": o.score,
        "fidelity": o.fidelity,
        "age": o.age,
        "entry": o.entry,
        "error": o.result.error,
        "result": o.result.content[:SHOWN],
    }


def _tried(
    store: Store,
    cache: CachedTools,
    call: ToolCall,
    earlier: Sequence[Write],
    served: Observation,
    rules: Sequence[dict[str, Any]],
) -> list[dict[str, str]]:
    config, spec = cache.config, cache.specs.get(call.name)
    rows: list[tuple[Tier, str]] = [(Tier.EXACT, _exact(store.get(call_key(call, spec, config.key, earlier)), config.errors))]
    if served.tier is not Tier.EXACT:
        rows.append((Tier.ADAPTED, _adapted(cache, call, served.tier, rules)))
    if served.tier not in (Tier.EXACT, Tier.ADAPTED):
        rows.append((Tier.FUZZY, _fuzzy(cache, call, earlier)))
    if served.tier not in (Tier.EXACT, Tier.ADAPTED, Tier.FUZZY):
        rows.append((Tier.BEST_EFFORT, _best_effort(cache, call, earlier, served)))
    if served.tier is Tier.MISS:
        does = {
            "error": "the policy reads the error",
            "nearest": "the tool has no result to serve",
            "fail": "the episode ends",
            "live": "the live tool is called",
        }
        rows.append((Tier.MISS, f"cache.on_miss={config.on_miss!r}: {does[config.on_miss]}"))
    return [{"tier": tier.value, "reason": reason} for tier, reason in rows]


def _exact(stored: Sequence[Entry], errors: str) -> str:
    withheld = sum(is_negative(e.result) for e in stored) if errors == "never" else 0
    if not stored:
        return "no call of this key is stored"
    if withheld == len(stored):
        return f"only errors and empty results are stored ({withheld}), withheld by cache.errors='never'"
    left = [e for e in stored if not (withheld and is_negative(e.result))]
    times = ", ".join(str(e.count) for e in sorted(left, key=lambda e: -e.count))
    return f"{len(left)} of {len(stored)} stored results may be served; recorded {times} times"


def _rules(cache: CachedTools, call: ToolCall, earlier: Sequence[Write]) -> list[dict[str, Any]]:
    """The tool's certified rules, and from how many stored calls each leads to this one."""
    if cache.adapter is None:
        return []
    found = list(cache.adapter.answers(call.name, *stored_form(call, cache.specs.get(call.name), cache.config.key, earlier)))
    rows = []
    for rule in cache.adapter.rules(call.name):
        answers = [a for a in found if a.rule == rule]
        shown = answers[0].result.content[:SHOWN] if answers else None
        rows.append({"rule": str(rule), "right": rule.right, "votes": rule.votes, "from": len(answers), "result": shown})
    return rows


def _adapted(cache: CachedTools, call: ToolCall, tier: Tier, rules: Sequence[dict[str, Any]]) -> str:
    if not cache.config.adapted:
        return "off (cache.adapted=false)"
    if cache.adapter is None or not rules:
        return "the tool has no certified rule" if cache.adapter else "no rules were fitted on this store"
    leading = sum(row["from"] for row in rules)
    if not leading:
        return f"{len(rules)} rules, none leads from a stored call to this one"
    return f"rules lead here from {leading} stored calls{'' if tier is Tier.ADAPTED else ', which do not agree'}"


def _fuzzy(cache: CachedTools, call: ToolCall, earlier: Sequence[Write]) -> str:
    threshold, gate = cache.config.fuzzy_threshold, cache.config.fuzzy_gate
    entry, score = cache.nearest(call, earlier, gated=True)
    if entry is None:
        return f"no servable result{' with the same values of ' + ', '.join(gate) if gate else ' of the tool'}"
    return f"the nearest call has similarity {score:.3g}, {'at least' if score >= threshold else 'below'} {threshold:g}"


def _best_effort(cache: CachedTools, call: ToolCall, earlier: Sequence[Write], served: Observation) -> str:
    mode = f"cache.best_effort={cache.config.best_effort!r}"
    if served.tier is Tier.MISS:
        return f"{mode}: {'the tier is off' if cache.config.best_effort == 'off' else served.result.content}"
    made = served.kind.value if not served.entry or cache.config.best_effort in ("schema", "simulator") else "the nearest result"
    return f"{mode}: {made}, similarity {served.score:.3g}"
