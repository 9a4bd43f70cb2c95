"""What a cached answer costs, in turn with the least that could do it: a dict, raw SQLite, brute-force rapidfuzz.

Command:  python experiments/perf/cache.py --data PATH_OF_CORPORA      (its folder sgd/ is read)

SGD train is recorded, calls of SGD dev are asked. Every round runs each program once over the same questions, in an order that
changes with the round; a figure is CPU time a question, and a ratio is taken within a round. Prints medians with the least and
the most over rounds, writes result.json beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sqlite3
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rapidfuzz import fuzz, process

from cacherl_jax.cache.entries import Entry
from cacherl_jax.cache.key import call_key, canonical_arguments, canonical_call
from cacherl_jax.cache.lookup import CachedTools, record_transcript
from cacherl_jax.cache.store import MemoryStore, SQLiteStore
from cacherl_jax.cache.tiers import ToolIndex, tokens
from cacherl_jax.config import CacheConfig
from cacherl_jax.data import sgd
from cacherl_jax.types import Kind, Task, Tier, ToolCall, ToolResult, ToolSpec

HERE = Path(__file__).parent
TASK = Task("t", "family", "train", (), (), ((),))
CONFIG = dataclasses.replace(CacheConfig(), key="canonical", adapted=False, best_effort="off", fuzzy_threshold=2.0)

Program = Callable[[], Any]  # answers all questions once


def in_turn(programs: dict[str, tuple[Callable[[], Program], int]], rounds: int) -> dict[str, list[float]]:
    """CPU microseconds a question, by program and round. A program is (its preparation, not timed; number of questions)."""
    taken: dict[str, list[float]] = {name: [] for name in programs}
    rng = random.Random(0)
    for _ in range(rounds):
        for name in rng.sample([*programs], len(programs)):
            prepare, questions = programs[name]
            run = prepare()
            began = time.process_time()
            run()
            taken[name].append((time.process_time() - began) / questions * 1e6)
    return taken


def over(questions: Sequence[Any], answer: Callable[[Any], Any]) -> tuple[Callable[[], Program], int]:
    """A program that needs no preparation."""

    def run() -> None:
        for question in questions:
            answer(question)

    return (lambda: run), len(questions)


def exact(train: sgd.SgdSplit, dev: sgd.SgdSplit, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Calls of dev that train answers exactly: each text once ("first seen"), and all of them a second time ("repeated")."""
    memory = MemoryStore()
    for transcript in train.transcripts():
        record_transcript(memory, transcript, train.specs, "canonical")
    specs: dict[str, ToolSpec] = train.specs | dev.specs
    stored = SQLiteStore(folder / "store.sqlite", mode="rw")
    raw = sqlite3.connect(folder / "raw.sqlite", isolation_level=None)
    raw.execute("PRAGMA journal_mode = WAL")
    raw.execute("CREATE TABLE results (hash BLOB PRIMARY KEY, result TEXT NOT NULL)")
    with stored.transaction():
        for recording in memory.recordings():
            stored.add(recording)
            raw.execute("INSERT OR IGNORE INTO results VALUES (?, ?)", (recording.key, recording.result.content))
    cached = CachedTools(memory, specs, CONFIG, seed=0)
    asked = [call for transcript in dev.transcripts() for m in transcript.messages for call in m.tool_calls]
    first = {(c.name, c.arguments): c for c in asked if cached.start(TASK, 0).execute(c, 0).tier is Tier.EXACT}
    calls = [ToolCall(c.name, c.arguments, c.id) for c in first.values()]
    keys = [call_key(c, specs.get(c.name), "canonical") for c in calls]
    by_key = dict.fromkeys((e.key for e in memory.entries()), "")
    by_text = {(c.name, c.arguments): "" for c in calls}
    print(f"exact: {len(calls)} different calls of dev that train answers, {len(by_key)} keys")

    def execute(tools: CachedTools) -> Program:
        def run() -> None:
            for sample, call in enumerate(calls):
                tools.start(TASK, sample).execute(call, 0)

        return run

    programs = {
        "dict by text": over(calls, lambda c: by_text[c.name, c.arguments]),
        "3 dict lookups": over(keys, lambda k: (by_key[k], by_key[k], by_key[k])),
        "canonical_call": over(calls, lambda c: canonical_call(c, specs.get(c.name))),
        "raw SQLite by hash": over(keys, lambda k: raw.execute("SELECT result FROM results WHERE hash = ?", (k,)).fetchone()),
        "SQLiteStore.get": over(keys, stored.get),
        "CachedTools, first seen": ((lambda: execute(CachedTools(memory, specs, CONFIG, seed=0))), len(calls)),
        "CachedTools, repeated": ((lambda: execute(cached)), len(calls)),
    }
    taken = in_turn(programs, rounds)
    stored.close()
    raw.close()
    return taken


def fuzzy(train: sgd.SgdSplit, dev: sgd.SgdSplit, free_text: bool, rounds: int) -> dict[str, list[float]]:
    """10,000 entries of one tool, with or without free text: values of its calls in train, mixed; asked are calls of dev."""
    recorded: dict[str, list[dict[str, str]]] = {}
    for transcript in train.transcripts():
        for message in transcript.messages:
            for call in message.tool_calls:
                recorded.setdefault(call.name, []).append(call.parsed())
    asked_by_tool: dict[str, list[str]] = {}
    for transcript in dev.transcripts():
        for message in transcript.messages:
            for call in message.tool_calls:
                asked_by_tool.setdefault(call.name, []).append(call.arguments)

    def texts(tool: str) -> int:
        return sum(" " in value for call in recorded[tool] for value in call.values()) // len(recorded[tool])

    common = [
        tool
        for tool, _ in Counter({t: len(c) for t, c in recorded.items()}).most_common()
        if len(asked_by_tool.get(tool, ())) >= 50
    ]
    tool = next(t for t in common if (texts(t) > 0) == free_text and _mixtures(recorded[t]) > 50_000)
    rng, entries, spec = random.Random(0), {}, train.specs[tool]
    while len(entries) < 10_000:
        shape = rng.choice(recorded[tool])
        mixed = {name: rng.choice([c for c in recorded[tool] if name in c])[name] for name in shape}
        arguments = canonical_arguments(json.dumps(mixed, ensure_ascii=False), spec)
        entries[arguments] = Entry(arguments.encode(), tool, arguments, "", ToolResult("x"), Kind.RECORDED, 1, None, len(entries))
    stored = [*entries]
    index = ToolIndex(entries.values())
    asked = [canonical_arguments(text, spec) for text in asked_by_tool[tool][:50]]
    print(f"fuzzy{', free text' if free_text else ''}: {tool}, {len(stored)} entries, {len(asked)} questions; {stored[0]}")
    programs = {
        "rapidfuzz extractOne": over(asked, lambda text: process.extractOne(text, stored, scorer=fuzz.ratio)),
        "ToolIndex.nearest": over(asked, lambda text: index.nearest(tokens(text), "")),
    }
    return in_turn(programs, rounds)


def _mixtures(calls: list[dict[str, str]]) -> int:
    """About how many different calls the values of these can make."""
    values: dict[str, set[str]] = {}
    for call in calls:
        for name, value in call.items():
            values.setdefault(name, set()).add(value)
    product = 1
    for of_name in values.values():
        product *= len(of_name)
    return product


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "least": round(min(values), 3), "most": round(max(values), 3)}


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(above, below, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description="The speed of cached answers.")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds sgd/train and sgd/dev")
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    train, dev = sgd.read(args.data / "sgd" / "train"), sgd.read(args.data / "sgd" / "dev")
    with tempfile.TemporaryDirectory() as folder:
        taken = exact(train, dev, Path(folder), args.rounds)
    floor = [a + b for a, b in zip(taken["canonical_call"], taken["3 dict lookups"], strict=True)]
    raw = taken["raw SQLite by hash"]
    ratios = {
        "SQLiteStore.get / raw SQLite": ratio(taken["SQLiteStore.get"], raw),
        "CachedTools, first seen / raw SQLite": ratio(taken["CachedTools, first seen"], raw),
        "CachedTools, repeated / raw SQLite": ratio(taken["CachedTools, repeated"], raw),
        "CachedTools, first seen / (canonical_call + 3 dict lookups)": ratio(taken["CachedTools, first seen"], floor),
        "CachedTools, repeated / (canonical_call + 3 dict lookups)": ratio(taken["CachedTools, repeated"], floor),
    }
    for free_text in (False, True):
        found = fuzzy(train, dev, free_text, args.rounds)
        label = ", free text" if free_text else ""
        ratios[f"ToolIndex.nearest / rapidfuzz extractOne{label}"] = ratio(
            found["ToolIndex.nearest"], found["rapidfuzz extractOne"]
        )
        taken |= {f"{name}{label}": values for name, values in found.items()}
    result = {"microseconds": {name: spread(values) for name, values in taken.items()}, "ratios": ratios}
    for part, figures in result.items():
        print(f"\n{part}")
        for name, figure in figures.items():
            print(f"  {name:<62} {figure['median']:>9.3f}   {figure['least']:.3f} to {figure['most']:.3f}")
    (HERE / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
