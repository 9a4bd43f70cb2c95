"""The folder of one run: which stages are done, with which configuration, and how much CPU time they took.

    OUT/run.json                configuration and versions of the command that last ran a stage
    OUT/<stage>/                what the stage wrote
    OUT/<stage>/settings.json   written first: the configuration that the stage depends on
    OUT/<stage>/done.json       written last: the stage's result
    OUT/cpu.jsonl               CPU-seconds of every attempt, those ended by Ctrl-C included, by kill -9 not

A stage that is done is not run again, one that was interrupted goes on. A stage that was begun with other settings is
refused with the difference: results of two configurations never mix in one folder. Of several processes, which see one
folder, the first writes all this and the others wait for it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cacherl_jax import processes, versions
from cacherl_jax.config import Config, ConfigError
from cacherl_jax.whole_files import write_json


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes `folder`/settings.json, what its content depends on. Raises ConfigError with the difference where it was begun with
    other settings."""
    path = folder / "settings.json"
    if path.is_file():
        _refuse_difference(folder, json.loads(path.read_text()), settings, folder)
    write_json(path, settings)


def _refuse_difference(folder: Path, saved: Any, current: Any, delete: str | Path) -> None:
    then, now = processes.flat(saved), processes.flat(_as_read(current))
    changed = [f"{k}: {then.get(k)!r} then, {now.get(k)!r} now" for k in now | then if then.get(k) != now.get(k)]
    if changed:
        raise ConfigError(
            f"{folder} was made with other settings ({'; '.join(changed)}). Choose another --out, or delete {delete}."
        )


def _as_read(value: Any) -> Any:
    """As JSON reads it back: lists for tuples."""
    return json.loads(json.dumps(value))


class RunDirectory:
    """`out` with the bookkeeping of stages. Creating one writes nothing."""

    def __init__(self, out: Path, config: Config, inputs: Mapping[str, Any] | None = None) -> None:
        """inputs: digests of what a stage reads beside the configuration; its settings name them "inputs"."""
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--out {out} is a file, expected a folder")
        self.out, self.config, self._inputs = out, config, dict(inputs or {})

    def done(self, stage: str) -> dict[str, Any] | None:
        """The result of a finished stage, else None. Raises ConfigError when it was begun with other settings."""
        self._refuse_other_settings(stage)
        path = self.out / stage / "done.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def _refuse_other_settings(self, stage: str) -> None:
        path = self.out / stage / "settings.json"
        if not path.is_file():
            return
        saved = json.loads(path.read_text())
        folder = self.out / stage
        _refuse_difference(folder, saved, self._part(saved), f"{folder} and the stages after it")

    def require(self, stage: str) -> dict[str, Any]:
        """The result of a stage that must have run before."""
        result = self.done(stage)
        if result is None:
            raise ConfigError(f"stage {stage!r} has not finished in {self.out}; run `cacherl {stage.split('/')[0]}` first")
        return result

    def run(
        self, stage: str, parts: Sequence[str], body: Callable[[Path], dict[str, Any]], *, alone: bool = False
    ) -> dict[str, Any]:
        """Runs `body(folder)` unless done. `parts` names the configuration that the stage depends on: "sft", "rollout.context".

        Every process runs it, or with `alone` the first, for stages that use no device.
        """
        result = self.done(stage)
        (finished,) = processes.agree([result is not None])  # and nobody writes before all have looked
        if finished:
            return self.require(stage)
        folder = self.out / stage
        if processes.is_first():
            write_json(self.out / "run.json", {"config": self.config.to_json(), "versions": versions.installed()})
            write_json(folder / "settings.json", self._part(parts))
        processes.wait()
        if not (folder / "settings.json").is_file():
            raise ConfigError(f"process {processes.index()} does not see {folder}: --out must be a folder that all share")
        if alone:
            return self._alone(stage, body)
        with self._cpu_time(stage):
            result = body(folder)
        if processes.is_first():
            write_json(folder / "done.json", result)
        processes.wait()
        return result

    def _alone(self, stage: str, body: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        def first() -> None:
            with self._cpu_time(stage):
                write_json(self.out / stage / "done.json", body(self.out / stage))

        processes.of_first(f"stage {stage!r}", first)
        return self.require(stage)

    def cpu_seconds(self) -> dict[str, float]:
        """CPU-seconds by stage, every recorded attempt counted."""
        seconds: dict[str, float] = {}
        path = self.out / "cpu.jsonl"
        for line in path.read_text().splitlines() if path.is_file() else ():
            row = json.loads(line)
            seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + row["cpu_seconds"]
        return seconds

    def _part(self, parts: Iterable[str]) -> dict[str, Any]:
        settings = {}
        for part in parts:
            value: Any = self.config.to_json() | {"inputs": self._inputs}
            for name in part.split("."):
                value = value[name]
            settings[part] = value
        return settings

    @contextlib.contextmanager
    def _cpu_time(self, stage: str) -> Iterator[None]:
        start = time.process_time()
        try:
            yield
        finally:
            if processes.is_first():
                with (self.out / "cpu.jsonl").open("a") as f:
                    f.write(json.dumps({"stage": stage, "cpu_seconds": round(time.process_time() - start, 2)}) + "\n")
