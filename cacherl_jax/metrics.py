"""Metrics as JSON Lines, and progress bars."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Protocol

import tqdm

from cacherl_jax.whole_files import write_lines

Progress = tqdm.tqdm


class Clock:
    """Wall seconds of the parts of a step; each lap begins where the one before ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._since = now - self._since, now


class Rate:
    """Updates and tokens a second since the last call of `read`, or since it was made."""

    def __init__(self) -> None:
        self._updates, self._tokens, self._since = 0, 0, time.monotonic()

    def add(self, tokens: int) -> None:
        self._updates, self._tokens = self._updates + 1, self._tokens + tokens

    def read(self) -> dict[str, float]:
        """{"seconds": an update's, on average, "tokens_per_second": of all updates together}"""
        now = time.monotonic()
        seconds, updates, tokens = max(now - self._since, 1e-9), max(1, self._updates), self._tokens
        self._updates, self._tokens, self._since = 0, 0, now
        return {"seconds": seconds / updates, "tokens_per_second": tokens / seconds}


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
    """Appends rows to a JSON Lines file. Opening at `resume_step` drops rows of later steps, which will be made again.

    `kept` are the others. Of several processes one writes: the rest open it with `writes` False and know what is kept.
    """

    def __init__(self, path: Path, *, resume_step: int, writes: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.kept = [row for row in read_metrics(path) if resume_step > 0 and row["step"] <= resume_step]
        self._file = None
        if not writes:
            return
        write_lines(path, self.kept)
        self._file = path.open("a")

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: Any) -> Any:
        if self._file is not None:
            self._file.close()

    def write(self, row: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
