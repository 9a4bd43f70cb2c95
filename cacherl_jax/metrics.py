"""Metrics as JSON Lines, and progress bars."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Protocol

import tqdm

Progress = tqdm.tqdm


class Clock:
    """Wall seconds of the parts of a step; each lap begins where the one before ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._since = now - self._since, now


class ProgressFactory(Protocol):
    """Makes the bar of one loop."""

    def __call__(self, *, total: int, desc: str, initial: int = 0) -> Progress: ...


def progress_factory(enabled: bool) -> ProgressFactory:
    """Bars on standard error; silent ones where standard output is for a machine."""

    def make(*, total: int, desc: str, initial: int = 0) -> Progress:
        return tqdm.tqdm(total=total, desc=desc, initial=initial, disable=not enabled, dynamic_ncols=True, mininterval=0.5)

    return make


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a metrics file; a last line cut by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsWriter:
    """Appends rows to a JSON Lines file. Opening at `resume_step` drops rows of later steps, which will be made again."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
        if resume_step == 0:
            kept = []
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(path)
        self._file = path.open("a")

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: Any) -> Any:
        self._file.close()

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
