"""Transcripts as JSON Lines in OpenAI's message form."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from cacherl_jax.types import Transcript
from cacherl_jax.whole_files import whole_lines


def read_transcripts(path: Path) -> tuple[list[Transcript], list[str]]:
    """The transcripts of a file, and a line "FILE:LINE: reason" for each that cannot be read. Bad lines cost only
    themselves. Raises FileNotFoundError when there is no file."""
    transcripts, problems = [], []
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                transcripts.append(Transcript.from_json(json.loads(line)))
            except (ValueError, AttributeError, TypeError) as error:  # undecodable bytes, broken JSON, wrong shapes
                problems.append(f"{path}:{number}: {error}")
    return transcripts, problems


def write_transcripts(path: Path, transcripts: Iterable[Transcript]) -> int:
    """Writes all of them or, if interrupted, none: the file appears whole. Returns their number."""
    count = 0
    with whole_lines(path) as write:
        for transcript in transcripts:
            write(transcript.to_json())
            count += 1
    return count
