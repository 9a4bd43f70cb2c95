"""How far can cached tool responses be trusted? Held-out calls of recorded corpora, answered from the rest.

Command:  python experiments/fidelity/run.py --data DATA --out runs/fidelity          (splits of every corpus)
          python experiments/fidelity/run.py --data DATA --out runs/fidelity --dev    (and SGD dev, once)
Cost:     about 10 CPU-minutes, 2 GB; finished splits are kept in --out and not run again
Writes:   metrics.json and figure.png beside this file, and prints the tables of README.md

DATA holds the corpora as their upstream repositories have them: sgd/train, sgd/dev, taskmaster4, star, tau-bench.
"""

import argparse
import dataclasses
import hashlib
import json
import time
from pathlib import Path

from tables import draw, print_tables
from tqdm import tqdm

from cacherl_jax.cache import audit, fit
from cacherl_jax.cache.adapt import Source, adapt, as_content, given_arguments, texts_by_field
from cacherl_jax.cache.entries import Entry, Recording
from cacherl_jax.cache.key import KeyMode
from cacherl_jax.cache.lookup import CachedTools, recordings
from cacherl_jax.cache.results import meaning, parsed
from cacherl_jax.cache.store import MemoryStore
from cacherl_jax.config import CacheConfig
from cacherl_jax.data.sources import SOURCES
from cacherl_jax.types import Tier, ToolCall, ToolResult, ToolSpec

HERE = Path(__file__).parent
FOLDERS = {"sgd": "sgd/train", "taskmaster4": "taskmaster4", "star": "star", "tau_bench": "tau-bench"}
RUNS: tuple[tuple[str, KeyMode], ...] = (
    ("sgd", "state"),
    ("sgd", "raw"),
    ("taskmaster4", "state"),
    ("star", "state"),
    ("tau_bench", "state"),
)
SPLITS = 3
THRESHOLDS = (0.5, 0.7, 0.85)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpora")
    parser.add_argument("--out", type=Path, required=True, help="folder for finished splits")
    parser.add_argument("--dev", action="store_true", help="SGD dev against all of SGD train, after the splits")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    todo: list[tuple[str, KeyMode, str]] = [(c, mode, str(split)) for c, mode in RUNS for split in range(SPLITS)]
    todo += [("sgd", mode, "dev") for mode in ("state", "raw")] if args.dev else []
    for corpus, mode, split in tqdm(todo, desc="splits"):
        path = args.out / f"{corpus}.{mode}.{split}.json"
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(run(args.data, corpus, mode, split)))
            partial.rename(path)
    metrics = collect(args.out)
    (HERE / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    draw(metrics, HERE / "figure.png")
    print_tables(metrics)


def run(data: Path, corpus: str, mode: KeyMode, split: str) -> dict:
    """Answers of every tier, and of plain Jaccard, to the held-out calls of one split."""
    rows, specs = read(data / FOLDERS[corpus], corpus, mode)
    if split == "dev":
        held, dev_specs = read(data / "sgd" / "dev", corpus, mode)
        specs = {**dev_specs, **specs}
        kept = rows
    else:
        held = [r for r in rows if held_out(r.episode, split)]
        kept = [r for r in rows if not held_out(r.episode, split)]
    store = MemoryStore()
    for r in kept:
        store.add(r)
    config = CacheConfig(key=mode)
    started = time.process_time()
    fitted = fit.fit(store, specs, config)
    seconds = time.process_time() - started
    fit.write(store, fitted)
    cache = CachedTools(store, specs, config, seed=0)
    answers = [audit.answered(cache, r, i) for i, r in enumerate(tqdm(held, desc=f"{corpus} {mode} {split}", leave=False))]
    jaccard = CachedTools(store, specs, CacheConfig(key=mode, similarity="jaccard", errors="all", adapted=False), seed=0)
    keys = {e.key for e in store.entries()}
    return {
        "fit_seconds": seconds,
        "rules": [rule.to_json() for rule in fitted.rules],
        "calls": len(held),
        "dialogues": len({r.episode for r in held}),
        "answers": [dataclasses.astuple(a) for a in answers],
        "jaccard": [dataclasses.astuple(a) for r in held if r.key not in keys for a in by_jaccard(jaccard, r)],
        "swaps": audit.planted_swaps(store, cache),
    }


def read(folder: Path, corpus: str, mode: KeyMode) -> tuple[list[Recording], dict[str, ToolSpec]]:
    opened = SOURCES[corpus](folder)
    return [r for t in opened.transcripts() for r in recordings(t, opened.specs, mode)], opened.specs


def held_out(episode: str, split: str) -> bool:
    """A tenth of the dialogues, by a hash of the split and the dialogue's name."""
    return hashlib.sha256(f"{split}/{episode}".encode()).digest()[0] < 26


def by_jaccard(cache: CachedTools, r: Recording) -> list[audit.Answer]:
    """The nearest entry by plain Jaccard over key=value pairs, at each threshold that it reaches: as stored, and with the
    stored values that its result repeats replaced by the asked ones."""
    spec = cache.specs.get(r.tool)
    entry, score = cache.nearest(ToolCall(r.tool, r.arguments), fit.earlier(r, spec), gated=False)
    if entry is None:
        return []
    out = []
    for threshold in THRESHOLDS:
        if score >= threshold:
            out.append(audit.judged(r, entry.result, f"Jaccard ≥ {threshold}", spec, score))
            out.append(audit.judged(r, echoed(entry, r, spec), f"Jaccard ≥ {threshold}, echo", spec, score))
    return out


def echoed(entry: Entry, r: Recording, spec: ToolSpec | None) -> ToolResult:
    """The entry's result with every argument that it repeats replaced by the asked value."""
    stored, asked = given_arguments(entry.arguments, spec), given_arguments(r.arguments, spec)
    if stored is None or asked is None:
        return entry.result
    value = parsed(entry.result.content)
    for name in sorted(n for n in stored.keys() & asked.keys() if stored[n] != asked[n]):
        source = Source(stored, "", value, texts_by_field(value), meaning(entry.result), entry.result.error, "")
        changed = adapt(source, asked, ((name, "change", "echo"),), 0)
        value = value if changed is None else changed
    return ToolResult(as_content(value), entry.result.error)


def collect(out: Path) -> dict:
    """The splits of each corpus pooled; dev by itself."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(out.glob("*.json")):
        corpus, mode, split = path.stem.split(".")
        groups.setdefault(f"{corpus}, {mode}" + (", dev" if split == "dev" else ""), []).append(path)
    metrics = {}
    for name, paths in groups.items():
        results = [json.loads(path.read_text()) for path in paths]
        answers = [audit.Answer(*row) for result in results for row in result["answers"]]
        jaccard = [audit.Answer(*row) for result in results for row in result["jaccard"]]
        exact = sum(a.tier == Tier.EXACT.value for a in answers)
        adapted = sum(a.tier == Tier.ADAPTED.value for a in answers)
        metrics[name] = {
            "splits": len(paths),
            "calls": len(answers),
            "dialogues": sum(result["dialogues"] for result in results),
            "not_exact": len(answers) - exact,
            "adapted_share_of_not_exact": adapted / max(1, len(answers) - exact),
            "tiers": audit.by_tier(answers),
            "jaccard": audit.by_tier(jaccard),
            "fidelity": audit.calibration(answers),
            "tools": exact_by_tool(answers),
            "swaps": pooled_swaps([result["swaps"] for result in results]),
            "rules": [result["rules"] for result in results],
            "fit_cpu_seconds": [round(result["fit_seconds"], 1) for result in results],
        }
    return metrics


def exact_by_tool(answers: list[audit.Answer]) -> dict[str, list[int]]:
    """[right, served] of exact hits."""
    out: dict[str, list[int]] = {}
    for a in sorted(answers, key=lambda a: a.tool):
        if a.tier == Tier.EXACT.value:
            row = out.setdefault(a.tool, [0, 0])
            row[0] += a.right
            row[1] += 1
    return out


def pooled_swaps(splits: list[dict]) -> dict:
    out: dict = {}
    for swaps in splits:
        for kind, found in swaps.items():
            row = out.setdefault(kind, {"asked": 0, "tiers": {}})
            row["asked"] += found["asked"]
            for tier, counts in found["tiers"].items():
                sums = row["tiers"].setdefault(tier, {"served": 0, "unswapped": 0})
                for key in sums:
                    sums[key] += counts[key]
    return out


if __name__ == "__main__":
    main()
