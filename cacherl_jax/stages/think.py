"""The stage `think`: hybrid thinking transcripts, and the tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cacherl_jax import metrics
from cacherl_jax.config import Config, ConfigError
from cacherl_jax.run_directory import RunDirectory
from cacherl_jax.stages.inputs import (
    THINK,
    given_tokenizer,
    load_specs,
)
from cacherl_jax.text import chat
from cacherl_jax.text.tokenizer import Tokenizer, train_tokenizer
from cacherl_jax.trajectories import pipeline
from cacherl_jax.trajectories.transcripts import read_transcripts
from cacherl_jax.types import ToolSpec, Transcript


def think(run: RunDirectory, progress: metrics.ProgressFactory) -> dict[str, Any]:
    """Hybrid thinking transcripts, and the tokenizer trained on them (or the one that the configuration names)."""
    run.require("record")

    def body(folder: Path) -> dict[str, Any]:
        recorded, problems = recorded_transcripts(run)
        job = job_of(run.config, recorded, load_specs(run))
        counts = pipeline.run(folder, job, progress)
        tok = _tokenizer(folder, run.config, job.specs)
        return {"transcripts": len(recorded), "unreadable": problems, "vocab_size": tok.vocab_size} | counts

    return run.run("think", THINK, body, alone=True)


def recorded_transcripts(run: RunDirectory) -> tuple[list[Transcript], list[str]]:
    """What the stage `record` wrote, and a line for each transcript that cannot be read."""
    return read_transcripts(run.out / "record" / "transcripts.jsonl")


def job_of(config: Config, transcripts: Sequence[Transcript], specs: Mapping[str, ToolSpec]) -> pipeline.Job:
    """The transcripts as work for the teacher that `config` names. Raises ConfigError where its policy cannot be loaded."""
    if config.teacher.kind != "policy":
        return pipeline.Job(transcripts, specs, config.teacher, config.seed)
    from cacherl_jax.stages.policy_teacher import load

    policy = load(config)
    return pipeline.Job(transcripts, specs, config.teacher, config.seed, policy, policy.name)


def _tokenizer(folder: Path, config: Config, specs: Mapping[str, ToolSpec]) -> Tokenizer:
    """Written to FOLDER/tokenizer: the given one, or one trained on FOLDER/transcripts.jsonl."""
    given = given_tokenizer(config)
    if given is not None:
        tok = Tokenizer.load(given)
        tok.save(folder / "tokenizer")
        if not config.tokenizer.path:
            # With all that came with the weights, such as config.json: `convert --to-hf` of a stage gives it back.
            shutil.copytree(given, folder / "tokenizer", dirs_exist_ok=True)
        return tok
    thought, _ = read_transcripts(folder / "transcripts.jsonl")
    texts = (text for transcript in thought for text in _texts(transcript))
    # Tools that training never shows get no tokens of their own: their definitions are read as text.
    used = {name for transcript in thought for name in transcript.tools}
    runs = chat.template_runs([spec for name, spec in specs.items() if name in used])
    try:
        tok = train_tokenizer(texts, runs, config.tokenizer.vocab_size)
    except ValueError as error:
        raise ConfigError(f"tokenizer.vocab_size: {error}") from error
    tok.save(folder / "tokenizer")
    return tok


def _texts(transcript: Transcript) -> Iterable[str]:
    for message in transcript.messages:
        yield from (message.reasoning or "", message.content)
        yield from (call.arguments for call in message.tool_calls)
