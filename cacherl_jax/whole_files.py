"""Files that appear whole: a reader, or the next run after a kill, sees the old file or the new one, never half of one.

JSON is written in ASCII: it can spell halves of surrogate pairs, as models and tools produce them, UTF-8 cannot.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """`value` as one indented JSON file."""
    with _appearing(path) as f:
        f.write(json.dumps(value, indent=1) + "\n")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """JSON Lines, a line a row."""
    with whole_lines(path) as write:
        for row in rows:
            write(row)


@contextlib.contextmanager
def whole_lines(path: Path) -> Iterator[Callable[[Any], None]]:
    """Takes the rows of a JSON Lines file one by one. The file appears when all are there; after an error it does not."""
    with _appearing(path) as f:
        yield lambda row: print(json.dumps(row), file=f)


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="ascii") as f:
        yield f
    os.replace(temporary, path)
