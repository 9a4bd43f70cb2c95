"""What the verbs of `cacherl cache` do, each a function of the parsed command line that returns one JSON object. cache_parser.py
has the table of what they take.

What a verb needs is imported inside it, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacherl_jax.config import CacheConfig, Config, ConfigError, load_config, with_overrides

if TYPE_CHECKING:
    from cacherl_jax.cache.lookup import CachedTools
    from cacherl_jax.cache.store import SQLiteStore
    from cacherl_jax.data.recorded import Recorded
    from cacherl_jax.types import Task, ToolCall, ToolSpec

EXAMPLES = 20  # ids and rows shown of a long list


# ---- what verbs share ------------------------------------------------------------------------------------------------


DATASET = "dataset"  # a store that `export` wrote


def _corpus(args: argparse.Namespace) -> Recorded:
    from cacherl_jax.data.sources import SOURCES

    if args.source not in SOURCES:
        raise ConfigError(f"--source {args.source!r} is none of {', '.join(SOURCES)}; import also takes {DATASET}")
    return SOURCES[args.source](args.path)


def _open(path: Path, mode: str = "r") -> SQLiteStore:
    from cacherl_jax.cache.store import SQLiteStore

    return SQLiteStore(path, mode=mode)


def _cached(args: argparse.Namespace, store: SQLiteStore) -> CachedTools:
    """The store, served by the policies that the command line names."""
    from cacherl_jax.cache.best_effort import open_simulator
    from cacherl_jax.cache.lookup import CachedTools

    specs, config = _policies(args, store)
    simulator = open_simulator(config, args.store.with_suffix(".simulated.sqlite"))
    return CachedTools(store, specs, config, seed=0, simulator=simulator)


def _policies(args: argparse.Namespace, store: SQLiteStore) -> tuple[dict[str, ToolSpec], CacheConfig]:
    from cacherl_jax.cache.imports import described

    specs, key = described(store)
    config = with_overrides(load_config(args.config) if args.config else Config(), args.set).cache
    if config.key != key and any(s.partition("=")[0].strip() == "cache.key" for s in args.set):
        raise ConfigError(f"--set cache.key={config.key}: the keys of store {args.store} are {key}")
    return specs, dataclasses.replace(config, key=key)


def _parsed_call(text: str) -> ToolCall:
    from cacherl_jax.types import ToolCall

    name, _, arguments = text.strip().partition(" ")
    call = ToolCall(name, arguments.strip() or "{}")
    try:
        call.parsed()
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{text!r} is no call: {error}; expected NAME and a JSON object") from error
    return call


# ---- filling and asking ----------------------------------------------------------------------------------------------


def import_(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax.cache.imports import import_transcripts

    if args.source == DATASET:
        return _import_dataset(args)
    corpus = _corpus(args)
    specs = corpus.specs if args.effects is None else _labelled(corpus.specs, args.effects)
    provenance = {"source": corpus.attribution, "licence": corpus.licence}
    with _open(args.store, "rw") as store:
        if next(store.entries(), None) is not None:
            raise ConfigError(f"--store {args.store} already holds entries, which would be counted twice; choose another file")
        counts = import_transcripts(store, corpus.transcripts(), specs, args.key or "state", provenance)
    return counts | {"malformed": len(corpus.problems), "problems": corpus.problems[:EXAMPLES]}


def _import_dataset(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax.cache.publish import import_

    if args.key is not None or args.effects is not None:
        raise ConfigError("--key and --effects are for corpora; an exported store is keyed and labelled already")
    with _open(args.store, "rw") as store:
        return {"snapshot": import_(args.path, store)}


def record(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax.cache.recorder import record_calls
    from cacherl_jax.metrics import progress_factory
    from cacherl_jax.tools.functions import load_tools

    if args.workers < 1 or args.timeout <= 0:
        raise ConfigError(f"--workers {args.workers} --timeout {args.timeout}: both must be positive")
    sys.path.insert(0, str(Path.cwd()))  # tools beside the caller, as with python -m
    try:
        tools = load_tools(args.tools)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    finally:
        sys.path.pop(0)
    progress = progress_factory(enabled=not args.json)
    with _open(args.store, "rw") as store:
        return record_calls(
            tools, args.calls, store, mode=args.key or "state", workers=args.workers, timeout=args.timeout, progress=progress
        )


def _labelled(specs: Mapping[str, ToolSpec], path: Path) -> dict[str, ToolSpec]:
    """The tools with the effects that a report of `infer` gives them; tools of which it knows too little keep their own."""
    from cacherl_jax.types import Effects

    out = dict(specs)
    try:
        for name, about in json.loads(path.read_text(encoding="utf-8"))["tools"].items():
            if name in out and (e := about["effects"]) is not None:
                effects = Effects(tuple(e["reads"]), tuple(e["writes"]), e["stochastic"], e["time_dependent"])
                out[name] = dataclasses.replace(out[name], effects=effects)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--effects {path} is no report of `cacherl cache effects --json` ({error!r})") from error
    return out


def lookup(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax.cache.imports import lookup_transcripts

    corpus = _corpus(args)
    with _open(args.store) as store:
        keyed: Any = store.metadata().get("key")
        if keyed is None or args.key not in (None, keyed):
            raise ConfigError(f"--key {args.key}: the keys of store {args.store} are {keyed or 'not of an imported corpus'}")
        counts = lookup_transcripts(store, corpus.transcripts(), corpus.specs, keyed)
    return counts | {"malformed": len(corpus.problems), "problems": corpus.problems[:EXAMPLES]}


def coverage(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax.evaluate import cache_figures
    from cacherl_jax.evaluate.coverage import coverage

    tasks = _tasks(args)
    with _open(args.store) as store:
        found = coverage(tasks, _cached(args, store))
    if args.figure:
        cache_figures.draw_coverage(found, args.figure)
    summary = found.to_json()
    return {
        **{name: summary[name] for name in ("tasks", "calls", "exact", "fidelity", "unfinishable_tasks")},
        "unfinishable": list(found.unfinishable[:EXAMPLES]),
        "tiers": found.tiers,
        "by_depth": {str(depth): {t: tiers.get(t, 0) for t in found.tiers} for depth, tiers in found.by_depth.items()},
        "by_tool": {tool: {t: tiers.get(t, 0) for t in found.tiers} for tool, tiers in found.by_tool.items()},
    }


def _tasks(args: argparse.Namespace) -> list[Task]:
    """Tasks of a file, or a corpus' dialogues with their recorded calls as references."""
    from cacherl_jax.types import Task

    if (args.tasks is None) == (args.source is None) or (args.source is None) != (args.path is None):
        raise ConfigError("give either --tasks FILE, or --source NAME and --path PATH")
    if args.tasks is not None:
        return [Task.from_json(json.loads(line)) for line in args.tasks.read_text(encoding="utf-8").splitlines() if line]
    references = ((t, tuple(c for m in t.messages for c in m.tool_calls)) for t in _corpus(args).transcripts())
    return [Task(t.id, t.agent, "test", t.tools, (), (calls,)) for t, calls in references if calls]


def explain(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax.cache.explain import explain
    from cacherl_jax.cache.lookup import write_of
    from cacherl_jax.types import ToolResult

    call, earlier = _parsed_call(args.call), [_parsed_call(text) for text in args.after]
    with _open(args.store) as store:
        cache = _cached(args, store)
        for name in (call.name, *(c.name for c in earlier)):
            if name not in cache.specs:
                raise ConfigError(f"the store has no tool {name!r}; it has {', '.join(sorted(cache.specs))}")
        writes = [write for c in earlier for write in write_of(c, cache.specs[c.name], ToolResult(""))]
        return explain(store, cache, call, writes)


# ---- learning from a store -------------------------------------------------------------------------------------------


def effects(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax.cache.effects import infer
    from cacherl_jax.cache.imports import described

    with _open(args.store) as store:
        return infer(store.recordings(), described(store)[0], args.level)


def fit(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax.cache.fit import fit, write
    from cacherl_jax.cache.snapshot import snapshot_id

    with _open(args.store, "rw") as store:
        specs, config = _policies(args, store)
        fitted = fit(store, specs, config)
        with store.transaction():
            write(store, fitted)
        snapshot = snapshot_id(store)
    return {
        "snapshot": snapshot,
        "answers": fitted.answers,
        "rules": [{"tool": r.tool, "rule": str(r), "right": r.right, "votes": r.votes, "p": r.p} for r in fitted.rules],
    }


def audit(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax.cache.audit import audit
    from cacherl_jax.cache.lookup import recordings
    from cacherl_jax.evaluate import cache_figures

    corpus = _corpus(args)
    with _open(args.store) as store:
        specs, config = _policies(args, store)
        known = corpus.specs | specs
        held = [r for transcript in corpus.transcripts() for r in recordings(transcript, known, config.key)]
        found = audit(store, held, known, config)
    if args.figure:
        cache_figures.draw_audit(found, args.figure)
    fitted = found["fidelity"]
    return {
        **{name: found[name] for name in ("calls", "dialogues", "dialogues_in_store")},
        "tiers": [{"tier": tier, "of": of} | row for tier, rows in found["tiers"].items() for of, row in rows.items()],
        "tools": [{"tool": tool, "tier": tier} | row for tool, rows in found["tools"].items() for tier, row in rows.items()],
        "fidelity": fitted
        and fitted | {"bins": [dict(zip(("stated", "right", "answers"), b, strict=True)) for b in fitted["bins"]]},
        "swaps": [
            {"swapped": kind, "asked": row["asked"], "tier": tier} | counts
            for kind, row in found["swaps"].items()
            for tier, counts in row["tiers"].items()
        ],
    }


# ---- what a store holds ----------------------------------------------------------------------------------------------


def stats(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax.cache.contents import stats

    with _open(args.store) as store:
        return stats(store)


def conflicts(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax.cache.contents import conflicts

    with _open(args.store) as store:
        return conflicts(store)


def quarantine(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax.cache.quarantine import quarantine, restore
    from cacherl_jax.cache.snapshot import snapshot_id

    if args.move and args.restore:
        raise ConfigError("--move and --restore undo each other; give one")
    with _open(args.store, "rw" if args.move or args.restore else "r") as store:
        found = {"restored": restore(store)} if args.restore else quarantine(store, move=args.move)
        return {"snapshot": snapshot_id(store)} | found


# ---- snapshots -------------------------------------------------------------------------------------------------------


def snapshot(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax.cache.snapshot import take

    with _open(args.store) as store:
        return {"snapshot": take(store, args.out, ttl=args.ttl, now=time.time())}


def diff(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax.cache.snapshot import diff

    with _open(args.store_a) as a, _open(args.store_b) as b:
        return diff(a, b)


def export(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax.cache.publish import export

    with _open(args.store) as store:
        manifest = export(store, args.out)
    return {name: value for name, value in manifest.items() if name != "metadata"}
