"""The stage `think`: hybrid thinking transcripts, and the tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cacherl_jax import metrics
from cacherl_jax.config import ConfigError
from cacherl_jax.run_directory import RunDirectory
from cacherl_jax.stages.inputs import (
    THINK,
    given_tokenizer,
    load_specs,
)
from cacherl_jax.text import chat
from cacherl_jax.text.tokenizer import Tokenizer, train_tokenizer
from cacherl_jax.trajectories.teacher import ScriptedTeacher
from cacherl_jax.trajectories.thinking import ThinkingReport, add_thinking
from cacherl_jax.trajectories.transcripts import read_transcripts, write_transcripts
from cacherl_jax.types import Transcript


def think(run: RunDirectory, progress: metrics.ProgressFactory) -> dict[str, Any]:
    """Hybrid thinking transcripts, and the tokenizer trained on them (or the one that the configuration names)."""
    run.require("record")

    def body(folder: Path) -> dict[str, Any]:
        specs = load_specs(run)
        transcripts, problems = read_transcripts(run.out / "record" / "transcripts.jsonl")
        counts, teacher, thought = ThinkingReport(), ScriptedTeacher(specs), []
        with progress(total=len(transcripts), desc="think") as bar:
            for transcript in transcripts:
                thought.append(add_thinking(transcript, teacher, counts))
                bar.update(1)
        write_transcripts(folder / "transcripts.jsonl", thought)
        given = given_tokenizer(run.config)
        if given is not None:
            tok = Tokenizer.load(given)
            tok.save(folder / "tokenizer")
            if not run.config.tokenizer.path:
                # With all that came with the weights, such as config.json: `convert --to-hf` of a stage gives it back.
                shutil.copytree(given, folder / "tokenizer", dirs_exist_ok=True)
        else:
            texts = (text for transcript in thought for text in _texts(transcript))
            # Tools that training never shows get no tokens of their own: their definitions are read as text.
            used = {name for transcript in thought for name in transcript.tools}
            runs = chat.template_runs([spec for name, spec in specs.items() if name in used])
            try:
                tok = train_tokenizer(texts, runs, run.config.tokenizer.vocab_size)
            except ValueError as error:
                raise ConfigError(f"tokenizer.vocab_size: {error}") from error
            tok.save(folder / "tokenizer")
        return {"transcripts": len(thought), "unreadable": problems, "vocab_size": tok.vocab_size} | counts.to_json()

    return run.run("think", THINK, body, alone=True)


def _texts(transcript: Transcript) -> Iterable[str]:
    for message in transcript.messages:
        yield from (message.reasoning or "", message.content)
        yield from (call.arguments for call in message.tool_calls)
