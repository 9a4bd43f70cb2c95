"""Transcripts as JSON Lines in OpenAI's message form."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cacherl_jax.types import Transcript


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


@contextlib.contextmanager
def whole_lines(path: Path) -> Iterator[Callable[[Any], None]]:
    """Takes the rows of a JSON Lines file one by one. The file appears when all are there; after an error it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8") as f:
        # In ASCII: JSON can spell halves of surrogate pairs, UTF-8 cannot.
        yield lambda row: print(json.dumps(row), file=f)
    os.replace(temporary, path)
