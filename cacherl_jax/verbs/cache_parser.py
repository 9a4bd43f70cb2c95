"""The command line of `cacherl cache`: a table of its verbs and what each takes. cache.py has what they do."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacherl_jax.verbs import cache


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
    "tools": {"metavar": "MODULE:NAME", "help": "the FunctionTools to call, such as my_package.my_tools:TOOLS"},
    "--calls": {"type": Path, "help": "calls as JSON Lines: name, arguments, and episode where calls belong together"},
    "--workers": {"type": int, "default": 8, "help": "episodes at a time (default 8)"},
    "--timeout": {"type": float, "default": 30.0, "metavar": "SECONDS", "help": "a call may take (default 30)"},
    "--out": {"type": Path, "help": "the new file or folder"},
    "--ttl": {"type": float, "metavar": "SECONDS", "help": "leave out entries whose newest recording is older"},
    "--move": {"action": "store_true", "help": "set them aside; changes the snapshot's id"},
    "--restore": {"action": "store_true", "help": "take all entries out of quarantine"},
    "--effects": {"type": Path, "help": "effect labels to use instead of the corpus' own: the JSON of `cacherl cache effects`"},
    "--level": {"type": float, "default": 0.05, "help": "false-discovery rate of relations (default 0.05)"},
    "store_a": {"type": Path, "metavar": "A", "help": "a store"},
    "store_b": {"type": Path, "metavar": "B", "help": "another"},
    "--after": {"action": "append", "default": [], "metavar": "CALL", "help": "an earlier successful call of the episode"},
}


def add_verbs(parser: argparse.ArgumentParser) -> None:
    """Adds a parser for each verb; its `verb` is the function to call with the arguments."""
    parsers = parser.add_subparsers(required=True, metavar="VERB")
    for name, verb in VERBS.items():
        parser = parsers.add_parser(name, help=verb.help, description=verb.help)
        for option in verb.options:
            flag = option.strip("[]")
            settings: dict[str, Any] = dict(OPTIONS[flag])
            if flag.startswith("--"):
                settings["required"] = flag == option
            parser.add_argument(flag, **settings)
        parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
        parser.set_defaults(verb=verb.run)


_CORPUS = ("--source", "--path", "--store")
_SERVING = ("[--config]", "[--set]")
VERBS: dict[str, Verb] = {
    "import": Verb("record a corpus into a store and count what it holds", cache.import_, (*_CORPUS, "[--key]", "[--effects]")),
    "record": Verb(
        "make calls on Python functions and store the answers; run again, it goes on",
        cache.record,
        ("tools", "--calls", "--store", "[--key]", "[--workers]", "[--timeout]"),
    ),
    "lookup": Verb("look a corpus up in a store and count what it would have been served", cache.lookup, (*_CORPUS, "[--key]")),
    "coverage": Verb(
        "how a store answers the calls of tasks: by tool, tier and turn; tasks that cannot be finished",
        cache.coverage,
        ("--store", "[--tasks]", "[--source]", "[--path]", *_SERVING, "[--figure]"),
    ),
    "effects": Verb(
        "which tools write, read, draw or hide state, inferred from recordings; contradictions of the given labels",
        cache.effects,
        ("--store", "[--level]"),
    ),
    "fit": Verb("learn rules of the adapted tier and the fidelity of answers into the store", cache.fit, ("--store", *_SERVING)),
    "audit": Verb(
        "how often a store answers right: the calls of other dialogues against their recordings, and planted swaps",
        cache.audit,
        (*_CORPUS, *_SERVING, "[--figure]"),
    ),
    "stats": Verb("what a store holds, in numbers", cache.stats, ("--store",)),
    "conflicts": Verb("keys with several results, those seen most often first", cache.conflicts, ("--store",)),
    "quarantine": Verb(
        "entries that would poison a policy: failures stored as answers, control tokens",
        cache.quarantine,
        ("--store", "[--move]", "[--restore]"),
    ),
    "snapshot": Verb("freeze a copy of a store under an id of its content", cache.snapshot, ("--store", "--out", "[--ttl]")),
    "diff": Verb("what two stores answer differently", cache.diff, ("store_a", "store_b")),
    "export": Verb("write a store as a data set: JSON Lines, manifest, card", cache.export, ("--store", "--out")),
    "explain": Verb("what a call would be served and why", cache.explain, ("call", "--store", "[--after]", *_SERVING)),
}
