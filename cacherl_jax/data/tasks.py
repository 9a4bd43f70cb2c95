"""Recorded dialogues as tasks: one dialogue, one task, its recorded calls the reference, its user turns injected as recorded."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from cacherl_jax.config import ConfigError, DataConfig
from cacherl_jax.data import sgd
from cacherl_jax.types import Task, Transcript


def to_task(transcript: Transcript, split: str, family: str) -> Task:
    """The dialogue as a task. Facts are empty: what a recorded assistant chose to say is no yardstick for an answer."""
    users = [m.content for m in transcript.messages if m.role == "user"]
    first = next(i for i, m in enumerate(transcript.messages) if m.role == "user")
    return Task(
        id=transcript.id,
        family=family,
        split=split,
        tools=transcript.tools,
        messages=transcript.messages[: first + 1],
        references=(tuple(c for m in transcript.messages for c in m.tool_calls),),
        followups=tuple(users[1:]),
    )


class SgdCorpus:
    """Schema-Guided Dialogue for a run: train and a held-out tenth of it from `train/`, test from `dev/`.

    With `services`, train and validation keep dialogues that use these alone, test those and `unseen_services`. A test
    task's family says whether its services occur in training: "seen/Banks_1", "unseen/Banks_2". Dialogues are taken in the
    order of a hash of their ids, so that a part of a split is like the whole: the files are sorted by service.
    """

    provenance: ClassVar[dict[str, str]] = {"source": sgd.ATTRIBUTION, "licence": sgd.LICENCE}

    def __init__(self, config: DataConfig) -> None:
        root = Path(config.path)
        self._config = config
        train, dev = sgd.read(root / "train"), sgd.read(root / "dev")
        self.specs = dev.specs | train.specs
        for name in (*config.services, *config.unseen_services):
            if not any(tool.startswith(f"{name}.") for tool in self.specs):
                raise ConfigError(f"data.services: {root} has no service {name!r}")
        kept = sorted((t for t in train.transcripts() if _uses_only(t, config.services)), key=_hash)
        test = sorted((t for t in dev.transcripts() if _uses_only(t, config.services, config.unseen_services)), key=_hash)
        self._seen = {service for t in kept for service in _services(t)}
        self._splits = {
            "train": [t for t in kept if _hash(t) % 10][: config.train_tasks],
            "validation": [t for t in kept if _hash(t) % 10 == 0][: config.validation_tasks],
            "test": test[: config.test_tasks],
        }
        self.problems = train.problems + dev.problems
        self.differences = sgd.manifest_differences(root)

    def tasks(self, split: str) -> list[Task]:
        return [to_task(t, split, self._family(t)) for t in self._splits[split]]

    def _family(self, transcript: Transcript) -> str:
        services = _services(transcript)
        return f"{'seen' if services <= self._seen else 'unseen'}/{'+'.join(sorted(services))}"

    def transcript_count(self, split: str) -> int:
        return len(self._splits[split])

    def transcripts(self, split: str) -> Iterator[Transcript]:
        return iter(self._splits[split])


def _services(transcript: Transcript) -> set[str]:
    return {name.split(".")[0] for name in transcript.tools}


def _uses_only(transcript: Transcript, services: tuple[str, ...], more: tuple[str, ...] = ()) -> bool:
    return not services or _services(transcript) <= {*services, *more}


def _hash(transcript: Transcript) -> int:
    return zlib.crc32(transcript.id.encode())
