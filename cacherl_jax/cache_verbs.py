"""The verbs of `cacherl cache`: a table of what each takes and does. Each returns one JSON object, which cli.py prints.

What a verb needs is imported inside it, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacherl_jax.config import CacheConfig, Config, ConfigError, load_config, with_overrides

if TYPE_CHECKING:
    from cacherl_jax.cache.lookup import CachedTools
    from cacherl_jax.cache.store import SQLiteStore
    from cacherl_jax.data.recorded import Recorded
    from cacherl_jax.types import Task, ToolCall

EXAMPLES = 20  # ids and rows shown of a long list


@dataclass(frozen=True)
class Verb:
    """options: keys of OPTIONS, in brackets where the verb does without."""

    help: str
    run: Callable[[argparse.Namespace], dict[str, Any]]
    options: tuple[str, ...]


OPTIONS: dict[str, dict[str, Any]] = {
    "--source": {
        "metavar": "NAME",
        "help": "kind of corpus: sgd, star, taskmaster4, tau_bench, openai, hermes ...; see data/sources.py",
    },
    "--path": {"type": Path, "help": "the corpus: its folder (of one split) or file"},
    "--store": {"type": Path, "help": "the store, an SQLite file"},
    "--key": {"choices": ("raw", "canonical", "state"), "help": "import: default state; otherwise the store's"},
    "--tasks": {"type": Path, "help": "tasks as JSON Lines, such as a run's record/tasks.train.jsonl"},
    "--config": {"type": Path, "help": "a file of configs/ whose cache policies serve; default: the defaults"},
    "--set": {"action": "append", "default": [], "metavar": "cache.B=C", "help": "change one policy; may be repeated"},
    "--figure": {"type": Path, "help": "also draw a PNG (extra: report)"},
    "call": {"metavar": "CALL", "help": 'the tool\'s name and its arguments as JSON: \'find {"city": "Oslo"}\''},
    "--after": {"action": "append", "default": [], "metavar": "CALL", "help": "an earlier successful call of the episode"},
}


def add_verbs(cache: argparse.ArgumentParser) -> None:
    """Adds a parser for each verb; its `verb` is the function to call with the arguments."""
    parsers = cache.add_subparsers(required=True, metavar="VERB")
    for name, verb in VERBS.items():
        parser = parsers.add_parser(name, help=verb.help, description=verb.help)
        for option in verb.options:
            flag = option.strip("[]")
            required = {"required": flag == option} if flag.startswith("--") else {}
            parser.add_argument(flag, **OPTIONS[flag], **required)
        parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
        parser.set_defaults(verb=verb.run)


# ---- what verbs share ------------------------------------------------------------------------------------------------


def _corpus(args: argparse.Namespace) -> Recorded:
    from cacherl_jax.data.sources import SOURCES

    if args.source not in SOURCES:
        raise ConfigError(f"--source {args.source!r} is none of {', '.join(SOURCES)}")
    return SOURCES[args.source](args.path)


def _open(path: Path, mode: str = "r") -> SQLiteStore:
    from cacherl_jax.cache.store import SQLiteStore

    return SQLiteStore(path, mode=mode)


def _cached(args: argparse.Namespace, store: SQLiteStore) -> CachedTools:
    """The store, served by the policies that the command line names."""
    from cacherl_jax.cache.best_effort import Simulator
    from cacherl_jax.cache.imports import described
    from cacherl_jax.cache.lookup import CachedTools

    specs, key = described(store)
    asked = with_overrides(load_config(args.config) if args.config else Config(), args.set)
    if any(s.split("=")[0].strip() == "cache.key" for s in args.set) and asked.cache.key != key:
        raise ConfigError(f"--set cache.key={asked.cache.key}: the keys of store {args.store} are {key}")
    config: CacheConfig = dataclasses.replace(asked.cache, key=key)
    simulator = None
    if config.best_effort == "simulator":
        simulator = Simulator(config.simulator, _open(args.store.with_suffix(".simulated.sqlite"), "rw"))
    return CachedTools(store, specs, config, asked.seed, simulator=simulator)


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


def _import(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax.cache.imports import import_transcripts

    corpus = _corpus(args)
    provenance = {"source": corpus.attribution, "licence": corpus.licence}
    with _open(args.store, "rw") as store:
        if next(store.entries(), None) is not None:
            raise ConfigError(f"--store {args.store} already holds entries, which would be counted twice; choose another file")
        counts = import_transcripts(store, corpus.transcripts(), corpus.specs, args.key or "state", provenance)
    return counts | {"malformed": len(corpus.problems)}


def _lookup(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax.cache.imports import lookup_transcripts

    corpus = _corpus(args)
    with _open(args.store) as store:
        keyed: Any = store.metadata().get("key")
        if keyed is None or args.key not in (None, keyed):
            raise ConfigError(f"--key {args.key}: the keys of store {args.store} are {keyed or 'not of an imported corpus'}")
        counts = lookup_transcripts(store, corpus.transcripts(), corpus.specs, keyed)
    return counts | {"malformed": len(corpus.problems)}


def _coverage(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax.evaluate.coverage import coverage, draw_coverage

    tasks = _tasks(args)
    with _open(args.store) as store:
        found = coverage(tasks, _cached(args, store))
    if args.figure:
        draw_coverage(found, args.figure)
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


def _explain(args: argparse.Namespace) -> dict[str, Any]:
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


_CORPUS = ("--source", "--path", "--store")
_POLICIES = ("[--config]", "[--set]")
VERBS: dict[str, Verb] = {
    "import": Verb("record a corpus into a store and count what it holds", _import, (*_CORPUS, "[--key]")),
    "lookup": Verb("look a corpus up in a store and count what it would have been served", _lookup, (*_CORPUS, "[--key]")),
    "coverage": Verb(
        "how a store answers the calls of tasks: by tool, tier and turn; tasks that cannot be finished",
        _coverage,
        ("--store", "[--tasks]", "[--source]", "[--path]", *_POLICIES, "[--figure]"),
    ),
    "explain": Verb("what a call would be served and why", _explain, ("call", "--store", "[--after]", *_POLICIES)),
}
