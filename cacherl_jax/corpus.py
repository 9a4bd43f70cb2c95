"""Where a run's tasks, transcripts and tools come from: the embedded world, or a recorded corpus without live tools."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Protocol

from cacherl_jax.config import Config
from cacherl_jax.types import Task, ToolProvider, ToolSpec, Transcript


class Corpus(Protocol):
    specs: dict[str, ToolSpec]
    provenance: ClassVar[dict[str, str]]  # source and licence, carried into the stores
    problems: list[str]  # a line for each record that was left out
    differences: list[str]  # how the files differ from those of the published figures

    def tasks(self, split: str) -> list[Task]: ...

    def transcript_count(self, split: str) -> int: ...

    def transcripts(self, split: str) -> Iterator[Transcript]: ...


class WorldCorpus:
    """The embedded tool world, recorded live by its demonstrators."""

    provenance: ClassVar[dict[str, str]] = {"source": "cacherl_jax embedded tool world", "licence": "Apache-2.0"}

    def __init__(self, config: Config) -> None:
        from cacherl_jax.tools.world import tool_specs

        self._config, self.specs = config, tool_specs()
        self.problems, self.differences = [], []

    def tasks(self, split: str) -> list[Task]:
        from cacherl_jax.tools.world import make_tasks

        data = self._config.data
        return make_tasks(split, getattr(data, f"{split}_tasks"), self._config.seed, data.families)

    def transcript_count(self, split: str) -> int:
        return getattr(self._config.data, f"{split}_tasks") * len(self._config.data.demonstrators)

    def transcripts(self, split: str) -> Iterator[Transcript]:
        from cacherl_jax.tools.record import record
        from cacherl_jax.tools.world import LiveTools

        live = LiveTools(split, self._config.seed)
        return record(self.tasks(split), self._config.data.demonstrators, live, self.specs, self._config.seed)


def open_corpus(config: Config) -> Corpus:
    """Raises ConfigError where the corpus named by `config.data` cannot be read."""
    if config.data.source == "world":
        return WorldCorpus(config)
    from cacherl_jax.data.tasks import SgdCorpus

    return SgdCorpus(config.data)


def live_tools(config: Config, split: str) -> ToolProvider | None:
    """The tools themselves; None for a recorded corpus, whose tools cannot be run."""
    if config.data.source != "world":
        return None
    from cacherl_jax.tools.world import LiveTools

    return LiveTools(split, config.seed)
