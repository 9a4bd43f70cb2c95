"""The `cacherl` command: one verb a stage, `demo` for all of them, `cache` for stores of recorded corpora."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cacherl_jax.config import Config, ConfigError, load_config, with_overrides

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "demo.py"
STAGES = ("record", "think", "sft", "grpo", "eval", "report")
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 for a run that cannot go on, 2 for wrong usage, 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        result = args.verb(args)
    except ConfigError as error:
        print(f"cacherl: {error}", file=sys.stderr)
        return 2
    except _run_errors() as error:
        print(f"cacherl: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ncacherl: interrupted. What was done is kept; the same command goes on from there.", file=sys.stderr)
        return INTERRUPTED
    print(json.dumps(result) if args.json else _readable(result))
    return 0


def _run_errors() -> tuple[type[Exception], ...]:
    from cacherl_jax.cache.store import StoreError
    from cacherl_jax.versions import MissingExtra

    return (StoreError, MissingExtra, FileNotFoundError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cacherl", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    helps = {
        "record": "tasks, demonstrators' transcripts and the cache's stores",
        "think": "add the teacher's reasoning to the transcripts; train the tokenizer",
        "sft": "clone the demonstrators",
        "grpo": "reinforce, tools answered by the cache alone",
        "eval": "test tasks, live and from the evaluation store",
        "report": "summary.json, figure, table, page of trajectories",
        "demo": "all of these, in order",
    }
    for name, text in helps.items():
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="a file of configs/, or a run's config as JSON")
        verb.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one field; may be repeated")
        verb.add_argument("--seed", type=int, help="short for --set seed=N")
        verb.add_argument("--out", type=Path, required=True, help="the run's folder")
        verb.add_argument("--json", action="store_true", help="one JSON object on standard output, no progress bars")
        verb.set_defaults(verb=_run_stages, stages=STAGES if name == "demo" else (name,))
    cache = verbs.add_parser("cache", help="stores of recorded corpora").add_subparsers(required=True, metavar="VERB")
    for name, text, call in (
        ("import", "record a corpus into a store and count what it holds", _cache_import),
        ("lookup", "look a corpus up in a store and count what it would have been served", _cache_lookup),
    ):
        verb = cache.add_parser(name, help=text, description=text)
        verb.add_argument("--source", choices=("sgd",), required=True)
        verb.add_argument("--path", type=Path, required=True, help="folder of one split, with schema.json beside the dialogues")
        verb.add_argument("--store", type=Path, required=True)
        verb.add_argument("--key", choices=("raw", "canonical", "state"), help="import: default state; lookup: the store's")
        verb.add_argument("--json", action="store_true", help="one JSON object on standard output")
        verb.set_defaults(verb=call)
    return parser


def _config(args: argparse.Namespace) -> Config:
    config = with_overrides(load_config(args.config), args.set)
    return config if args.seed is None else dataclasses.replace(config, seed=args.seed)


def _run_stages(args: argparse.Namespace) -> dict[str, Any]:
    config = _config(args)  # checked before anything heavy is imported
    from cacherl_jax import metrics, stages
    from cacherl_jax.run_directory import RunDirectory

    verbs: dict[str, Callable[..., dict[str, Any]]] = {
        "record": stages.record,
        "think": stages.think,
        "sft": stages.supervised,
        "grpo": stages.reinforce,
        "eval": stages.evaluate,
        "report": stages.summarise,
    }
    run = RunDirectory(args.out, config)
    progress = metrics.progress_factory(enabled=not args.json)
    result: dict[str, Any] = {}
    for stage in args.stages:
        result = verbs[stage](run, progress)
    return result


def _cache_import(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax.cache.imports import import_transcripts
    from cacherl_jax.cache.store import SQLiteStore
    from cacherl_jax.data import sgd

    corpus = sgd.read(args.path)
    with SQLiteStore(args.store, mode="rw") as store:
        if next(store.entries(), None) is not None:
            raise ConfigError(f"--store {args.store} already holds entries, which would be counted twice; choose another file")
        counts = import_transcripts(store, corpus.transcripts(), corpus.specs, args.key or "state")
    return counts | {"malformed": len(corpus.problems)}


def _cache_lookup(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax.cache.imports import lookup_transcripts
    from cacherl_jax.cache.store import SQLiteStore
    from cacherl_jax.data import sgd

    corpus = sgd.read(args.path)
    with SQLiteStore(args.store, mode="r") as store:
        keyed: Any = store.metadata().get("key")
        if keyed is None or args.key not in (None, keyed):
            raise ConfigError(f"--key {args.key}: the keys of store {args.store} are {keyed or 'not of an imported corpus'}")
        counts = lookup_transcripts(store, corpus.transcripts(), corpus.specs, keyed)
    return counts | {"malformed": len(corpus.problems)}


def _readable(result: Any, indent: str = "") -> str:
    if not isinstance(result, dict):
        return f"{result:.4g}" if isinstance(result, float) else str(result)
    lines = []
    for key, value in result.items():
        text = _readable(value, indent + "  ")
        lines.append(f"{indent}{key}:\n{text}" if isinstance(value, dict) and value else f"{indent}{key}: {text}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
