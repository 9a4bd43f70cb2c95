"""The stage `record`: tasks, the demonstrators' transcripts and the cache's three stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cacherl_jax import corpus as corpora
from cacherl_jax import metrics
from cacherl_jax.cache.fit import fit
from cacherl_jax.cache.fit import write as write_fitted
from cacherl_jax.cache.imports import describe
from cacherl_jax.cache.lookup import record_transcript
from cacherl_jax.cache.snapshot import snapshot_id
from cacherl_jax.cache.store import SQLiteStore
from cacherl_jax.run_directory import RunDirectory
from cacherl_jax.stages.inputs import (
    RECORD,
    SPLITS,
    STORES,
)
from cacherl_jax.tools.registry import specs_to_json
from cacherl_jax.trajectories.transcripts import write_transcripts
from cacherl_jax.whole_files import write_json, write_lines


def record(run: RunDirectory, progress: metrics.ProgressFactory) -> dict[str, Any]:
    """Tasks, the demonstrators' transcripts and the three stores."""

    def body(folder: Path) -> dict[str, Any]:
        corpus = corpora.open_corpus(run.config)
        specs, cache = corpus.specs, run.config.cache
        write_json(folder / "tools.json", specs_to_json(specs))
        result: dict[str, Any] = {"tools": len(specs), "left_out": corpus.problems, "differs_from_published": corpus.differences}
        for split in SPLITS:
            tasks = corpus.tasks(split)
            write_lines(folder / f"tasks.{split}.jsonl", (t.to_json() for t in tasks))
            transcripts = []
            with progress(total=corpus.transcript_count(split), desc=f"record {split}") as bar:
                for transcript in corpus.transcripts(split):
                    transcripts.append(transcript)
                    bar.update(1)
            path = folder / STORES[split]
            path.unlink(missing_ok=True)  # of an interrupted attempt
            with SQLiteStore(path, mode="rw") as store:
                describe(store, specs, cache.key, corpus.provenance)
                with store.transaction():
                    for transcript in transcripts:
                        record_transcript(store, transcript, specs, cache.key)
                if cache.adapted or cache.fidelity == "fitted":
                    with store.transaction():
                        write_fitted(store, fit(store, specs, cache))
                result[split] = {
                    "tasks": len(tasks),
                    "transcripts": len(transcripts),
                    "calls": sum(len(m.tool_calls) for t in transcripts for m in t.messages),
                    "snapshot": snapshot_id(store),
                }
            if split == "train":
                write_transcripts(folder / "transcripts.jsonl", transcripts)
        return result

    return run.run("record", RECORD, body, alone=True)
