"""`cacherl think` beside a run's stage: a recorded corpus, what a teacher would cost, and the result as a TFDS dataset.

OUT/think/transcripts.jsonl, provenance.jsonl, replies.sqlite   see trajectories/pipeline.py
OUT/think/tfds/                                                  with --tfds: the same content, split "train"
OUT/think/done.json                                              the result

A folder belongs to one corpus, limit and teacher. What was paid for is taken along to another one, such as that of a larger
limit, by copying replies.sqlite into its think/ first.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from cacherl_jax.config import TEACHER_PARTS, Config, ConfigError

_PARTS = ("inputs", "seed", *TEACHER_PARTS)


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--source", metavar="NAME", help="a recorded corpus instead of a run's: sgd, tau_bench, openai ...")
    verb.add_argument("--path", type=Path, help="the corpus: its folder (of one split) or file")
    verb.add_argument("--limit", type=int, metavar="N", help="the first N of its dialogues")
    verb.add_argument("--dry-run", action="store_true", help="count messages and what they cost at most; ask nothing")
    verb.add_argument("--tfds", action="store_true", help="also write a TFDS dataset (extra: data)")


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError for options that do not go together."""
    if (args.source is None) != (args.path is None):
        raise ConfigError("--source NAME and --path PATH name a corpus together; one is missing")
    if args.limit is not None and (args.source is None or args.limit < 1):
        raise ConfigError(f"--limit {args.limit}: expected 1 or more dialogues of a --source")


def think(args: argparse.Namespace, config: Config, progress: Any) -> dict[str, Any]:
    """Returns the stage's result or, with --dry-run, the estimate."""
    from cacherl_jax.run_directory import RunDirectory
    from cacherl_jax.stages import inputs
    from cacherl_jax.stages import think as stage
    from cacherl_jax.trajectories import pipeline
    from cacherl_jax.versions import require

    if args.tfds:
        require("array_record", "data")  # said before the work, not after it
    if args.source is None:
        inputs.check_weights(config)
        run = RunDirectory(args.out, config)
        if args.dry_run:
            run.require("record")
            recorded, problems = stage.recorded_transcripts(run)
            job = stage.job_of(config, recorded, inputs.load_specs(run))
            return pipeline.dry_run(args.out / "think", job) | {"unreadable": problems}
        result, source = stage.think(run, progress), "recorded"
    else:
        corpus, source = _corpus(args), args.source
        transcripts = list(itertools.islice(corpus.transcripts(), args.limit))
        if not transcripts:
            raise ConfigError("\n".join([f"--path {args.path} holds no readable dialogue", *corpus.problems]))
        job = stage.job_of(config, transcripts, corpus.specs)
        digests = {"source": source, "dialogues": _digest(transcripts), "limit": args.limit}
        if job.name:  # a policy's weights, which no setting names
            digests["teacher"] = job.name
        run = RunDirectory(args.out, config, digests)
        if args.dry_run:
            return pipeline.dry_run(args.out / "think", job) | {"left_out": corpus.problems}
        counts = {"transcripts": len(transcripts), "left_out": list(corpus.problems)}
        result = run.run("think", _PARTS, lambda folder: counts | pipeline.run(folder, job, progress), alone=True)
    if args.tfds:
        from cacherl_jax.trajectories import dataset

        result = result | {"tfds": str(dataset.write(args.out / "think", source))}
    return result


def _corpus(args: argparse.Namespace) -> Any:
    from cacherl_jax.data.sources import SOURCES

    if args.source not in SOURCES:
        raise ConfigError(f"--source {args.source!r} is none of {', '.join(SOURCES)}")
    return SOURCES[args.source](args.path)


def _digest(transcripts: list[Any]) -> str:
    import hashlib
    import json

    digest = hashlib.sha256()
    for transcript in transcripts:
        digest.update(json.dumps(transcript.to_json()).encode() + b"\n")
    return digest.hexdigest()
