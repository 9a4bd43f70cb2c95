"""How often a cache serves what is not true: held-out calls against their own recordings, and calls with planted swaps.

An answer is right when it says the same as the recording of that very call (results.py). Precision comes with a 95 %
percentile bootstrap over dialogues: calls of one dialogue are not independent. F1 is that of the (field, value) facts,
pooled over calls. An answer to a write confirms what never happened, so reads and writes are counted apart.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cacherl_jax.cache import fidelity
from cacherl_jax.cache.entries import Entry, Recording
from cacherl_jax.cache.fit import earlier
from cacherl_jax.cache.key import call_key
from cacherl_jax.cache.lookup import CachedTools
from cacherl_jax.cache.results import facts, meaning, parsed
from cacherl_jax.cache.store import Store
from cacherl_jax.config import CacheConfig
from cacherl_jax.types import TIER_ORDER, Kind, Tier, ToolCall, ToolResult, ToolSpec

DRAWS = 2000
SLOPE_DRAWS = 300
SWAPS = 200  # stored calls swapped, of each kind


@dataclass(frozen=True)
class Answer:
    """One held-out call as it was answered. matched, served, true: numbers of facts. tier: a tier's value, or a name for
    another way of answering that is compared with the tiers."""

    episode: str
    tool: str
    tier: str
    writes: bool
    right: bool
    fidelity: float
    matched: int
    served: int
    true: int


def audit(
    store: Store, held: Iterable[Recording], specs: Mapping[str, ToolSpec], config: CacheConfig, seed: int = 0
) -> dict[str, Any]:
    """The audit of a store on recordings of dialogues that it does not hold, keyed as the store is. JSON values throughout.

    calls, dialogues: of `held`. dialogues_in_store: of these, how many the store holds after all; their answers flatter.
    tiers: by tier, rows for all calls, reads and writes. tools: by tool and tier, one row each. A row: served, right,
    precision [mean, low, high], f1. fidelity: see `calibration`. swaps: see `planted_swaps`.
    """
    held = list(held)
    cache = CachedTools(store, specs, config, seed)
    answers = [answered(cache, r, i) for i, r in enumerate(held)]
    # Corpora name dialogues anew in every split: a name alone does not tell that a dialogue is stored.
    stored = {(r.episode, r.key) for r in store.recordings()}
    return {
        "calls": len(held),
        "dialogues": len({r.episode for r in held}),
        "dialogues_in_store": len({r.episode for r in held if (r.episode, r.key) in stored}),
        "tiers": by_tier(answers),
        "tools": {
            tool: {tier: row(rows) for tier, rows in _grouped(of_tool, lambda a: a.tier).items()}
            for tool, of_tool in sorted(_grouped(answers, lambda a: a.tool).items())
        },
        "fidelity": calibration(answers),
        "swaps": planted_swaps(store, cache, seed),
    }


def answered(cache: CachedTools, r: Recording, draw: int) -> Answer:
    """One held-out call asked of the cache and compared with its recording. `draw` seeds a draw among several results."""
    spec = cache.specs.get(r.tool)
    o = cache.answer(ToolCall(r.tool, r.arguments), earlier(r, spec), f"{r.episode}/{draw}")
    return judged(r, o.result, o.tier.value, spec, o.fidelity)


def judged(r: Recording, result: ToolResult, tier: str, spec: ToolSpec | None, trust: float) -> Answer:
    """A result served for a recorded call."""
    served, true = facts(result), facts(r.result)
    return Answer(
        episode=r.episode,
        tool=r.tool,
        tier=tier,
        writes=spec is not None and bool(spec.effects.writes),
        right=meaning(result) == meaning(r.result),
        fidelity=trust,
        matched=(served & true).total(),
        served=served.total(),
        true=true.total(),
    )


# ---- tables ----------------------------------------------------------------------------------------------------------


def by_tier(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """Rows for all calls, reads and writes of each tier, from the most faithful tier to the least."""
    order = [tier.value for tier in TIER_ORDER]
    groups = _grouped(answers, lambda a: a.tier)
    out = {}
    for tier in sorted(groups, key=lambda t: (order.index(t) if t in order else len(order), t)):
        rows = groups[tier]
        out[tier] = {
            "all": row(rows),
            "reads": row([a for a in rows if not a.writes]),
            "writes": row([a for a in rows if a.writes]),
        }
    return out


def row(answers: Sequence[Answer]) -> dict[str, Any]:
    facts_known = sum(a.served + a.true for a in answers)
    return {
        "served": len(answers),
        "right": sum(a.right for a in answers),
        "precision": interval(answers),
        "f1": 2.0 * sum(a.matched for a in answers) / facts_known if facts_known else None,
    }


def interval(answers: Sequence[Answer], draws: int = DRAWS) -> list[float] | None:
    """[share right, low, high]; None without answers."""
    if not answers:
        return None
    dialogues = list(_grouped(answers, lambda a: a.episode).values())
    right_D = np.array([sum(a.right for a in d) for d in dialogues], np.float64)
    size_D = np.array([len(d) for d in dialogues], np.float64)
    rng = np.random.default_rng(0)
    picked = rng.integers(0, len(dialogues), (draws, len(dialogues)))
    shares = right_D[picked].sum(axis=1) / size_D[picked].sum(axis=1)
    low, high = np.percentile(shares, (2.5, 97.5))
    return [float(right_D.sum() / size_D.sum()), float(low), float(high)]


def calibration(answers: Sequence[Answer]) -> dict[str, Any] | None:
    """Whether fidelity is the share of right answers; misses, which answer nothing, are left out. None without answers.

    brier: mean squared error of the fidelities; brier_of_tiers: of each tier's own share of right answers, put in place of
    every fidelity. bins: ten of equal mass, [mean fidelity, share right, size]. slope: of the share right on the fidelity
    over these bins, [value, low, high] by a bootstrap over dialogues.
    """
    answers = [a for a in answers if a.tier != Tier.MISS.value]
    if not answers:
        return None
    p_N, y_N = np.array([a.fidelity for a in answers]), np.array([float(a.right) for a in answers])
    share = {tier: sum(a.right for a in rows) / len(rows) for tier, rows in _grouped(answers, lambda a: a.tier).items()}
    of_dialogue: dict[str, list[int]] = defaultdict(list)
    for i, a in enumerate(answers):
        of_dialogue[a.episode].append(i)
    dialogues = [np.array(rows) for rows in of_dialogue.values()]
    rng = np.random.default_rng(0)
    slopes = []
    for _ in range(SLOPE_DRAWS):
        drawn = np.concatenate([dialogues[i] for i in rng.integers(0, len(dialogues), len(dialogues))])
        slopes.append(fidelity.slope(fidelity.bins(p_N[drawn], y_N[drawn])))
    binned = fidelity.bins(p_N, y_N)
    known = [s for s in slopes if s is not None]
    slope = fidelity.slope(binned)
    return {
        "brier": fidelity.brier(p_N, y_N),
        "brier_of_tiers": fidelity.brier([share[a.tier] for a in answers], y_N),
        "bins": [list(b) for b in binned],
        "slope": None if slope is None or not known else [slope, *map(float, np.percentile(known, (2.5, 97.5)))],
    }


def _grouped(answers: Iterable[Answer], by: Any) -> dict[str, list[Answer]]:
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[by(answer)].append(answer)
    return groups


# ---- planted swaps ---------------------------------------------------------------------------------------------------

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_ID = re.compile(r"(?=\S*\d)(?=\S*[A-Za-z_#-])\S+")
_OPPOSITE = {"true": "false", "false": "true", "yes": "no", "no": "yes"}


def planted_swaps(store: Store, cache: CachedTools, seed: int = 0, count: int = SWAPS) -> dict[str, Any]:
    """Stored calls asked with one value changed (number, id, date, polarity) or two exchanged (arguments).

    By kind: asked, then by tier: served, and unswapped: how often the answer says what is stored for the call before the
    swap, as if nothing had happened. Where a tool ignores the argument that is right: compare with the adapted tier's
    precision. Swapped calls that are stored themselves are not asked.
    """
    entries = sorted((e for e in store.entries() if e.kind is not Kind.SIMULATED), key=lambda e: _order(e, seed))
    stored: dict[bytes, set[str]] = defaultdict(set)
    for entry in entries:
        stored[entry.key].add(meaning(entry.result))
    out: dict[str, Any] = {}
    for kind in ("number", "id", "date", "polarity", "arguments"):
        asked, tiers = 0, {}
        for entry in entries:
            spec = cache.specs.get(entry.tool)
            before = earlier(Recording(entry.key, entry.tool, entry.arguments, entry.writes, entry.result), spec)
            for arguments in itertools.islice(_swapped(entry.arguments, kind), 1):
                call = ToolCall(entry.tool, arguments)
                if call_key(call, spec, cache.config.key, before) in stored:
                    continue
                asked += 1
                o = cache.answer(call, before, f"swap/{asked}")
                tier = tiers.setdefault(o.tier.value, {"served": 0, "unswapped": 0})
                tier["served"] += 1
                tier["unswapped"] += meaning(o.result) in stored[entry.key]
            if asked == count:
                break
        out[kind] = {"asked": asked, "tiers": dict(sorted(tiers.items()))}
    return out


def _order(entry: Entry, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {entry.hash}".encode()).digest()


def _swapped(arguments: str, kind: str) -> Iterator[str]:
    """The call's arguments, each time with one swap of the kind."""
    value = parsed(arguments)
    if not isinstance(value, dict):
        return
    names = sorted(value)
    if kind == "arguments":
        for a, b in itertools.combinations(names, 2):
            if type(value[a]) is type(value[b]) and value[a] != value[b]:
                yield json.dumps({**value, a: value[b], b: value[a]}, ensure_ascii=False)
        return
    for name in names:
        changed = _changed(value[name], kind)
        if changed is not None:
            yield json.dumps({**value, name: changed}, ensure_ascii=False)


def _changed(value: Any, kind: str) -> Any:
    """A value of the kind made another of it; None for a value that is not of the kind."""
    if isinstance(value, bool):
        return (not value) if kind == "polarity" else None
    if isinstance(value, int | float):
        return value + 1 if kind == "number" else None
    if not isinstance(value, str):
        return None
    if kind == "polarity" and value.lower() in _OPPOSITE:
        opposite = _OPPOSITE[value.lower()]
        return opposite.capitalize() if value[0].isupper() else opposite
    if kind == "number" and _NUMBER.fullmatch(value):
        return str(int(value) + 1) if "." not in value else str(float(value) + 1)
    if kind == "date" and _DATE.fullmatch(value):
        try:
            return (datetime.date.fromisoformat(value) + datetime.timedelta(days=1)).isoformat()
        except (ValueError, OverflowError):
            return None
    if kind == "id" and _ID.fullmatch(value) and not _DATE.fullmatch(value) and not _NUMBER.fullmatch(value):
        return re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 1) % 10), value)
    return None
