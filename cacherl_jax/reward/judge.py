"""A language model that grades answers, behind an OpenAI-compatible endpoint.

A verdict is asked for once: verdicts lie in a store of their own under a hash of everything that was asked, rubric and model
included, so that a resumed run pays nothing twice. A failure is data: it is counted and kept out of the store, and the caller
has a rule to fall back on. It never ends training.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cacherl_jax import processes
from cacherl_jax.cache.store import MemoryStore, Recording, SQLiteStore, Store
from cacherl_jax.chat_endpoint import ChatEndpoint, EndpointError
from cacherl_jax.config import JudgeConfig, RewardConfig
from cacherl_jax.reward import rubric
from cacherl_jax.reward.answer import answered
from cacherl_jax.trajectory import Trajectory
from cacherl_jax.types import Kind, Task, ToolResult


class JudgeError(Exception):
    """The endpoint gave no verdict; the message says why in a few words."""


@dataclass(frozen=True)
class Verdicts:
    """Of a batch of episodes, in order. rewards: score / 5, 0 without an answer to grade, None where the judge failed.
    asked: requests sent. failures: their number by reason."""

    rewards: Sequence[float | None]
    asked: int
    failures: Mapping[str, int]


def open_judge(config: RewardConfig, verdicts: Path) -> Judge | None:
    """The judge that `config` asks for, which keeps its verdicts in a store at `verdicts`; None where it asks for none. Of
    several processes the first has the store, as it alone asks."""
    if config.answer != "judge":
        return None
    if not processes.is_first():
        return Judge(config.judge, MemoryStore())
    verdicts.parent.mkdir(parents=True, exist_ok=True)
    return Judge(config.judge, SQLiteStore(verdicts, mode="rw"))


class Judge:
    """Grades by the fixed rubric, at most `config.concurrency` answers at a time. Raises MissingExtra without the client."""

    def __init__(self, config: JudgeConfig, verdicts: Store) -> None:
        self._config, self._verdicts, self._endpoint = config, verdicts, ChatEndpoint(config)

    def grade(self, episodes: Sequence[tuple[Task, Trajectory]]) -> Verdicts:
        """Verdicts of a batch. What has no answer, or leaked reasoning into it, is 0 and not asked about; what reads the
        same is asked about once. Of several processes the first asks, so that all are paid alike."""
        rewards, asked, failures = processes.of_first("the judge", lambda: self._grade(episodes))
        return Verdicts(rewards, asked, failures)

    def _grade(self, episodes: Sequence[tuple[Task, Trajectory]]) -> tuple[list[float | None], int, dict[str, int]]:
        texts = [rubric.material(task, t) if answered(t) else None for task, t in episodes]
        wanted = {self._key(text): text for text in texts if text is not None}
        scores: dict[bytes, int] = {}
        for key in wanted:
            if stored := self._verdicts.get(key):
                scores[key] = rubric.read_verdict(stored[0].result.content)["score"]
        unknown = {key: text for key, text in wanted.items() if key not in scores}
        failures: Counter[str] = Counter()
        with ThreadPoolExecutor(self._config.concurrency) as pool:
            asked = {key: pool.submit(self._ask, key, text) for key, text in unknown.items()}
            try:
                for key, reply in asked.items():
                    try:
                        scores[key] = reply.result()
                    except JudgeError as error:
                        failures[str(error)] += 1
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what is on its way is still kept
                raise
        rewards = [0.0 if text is None else _reward(scores.get(self._key(text))) for text in texts]
        return rewards, len(unknown), dict(sorted(failures.items()))

    def _key(self, text: str) -> bytes:
        return hashlib.sha256(json.dumps([rubric.VERSION, self._config.model, text]).encode()).digest()

    def _ask(self, key: bytes, text: str) -> int:
        """The score, its verdict kept under `key`. Raises JudgeError where the endpoint gives none, after its retries."""
        try:
            content, _ = self._endpoint.ask(rubric.messages(text), response_format=rubric.RESPONSE_FORMAT)
            verdict = rubric.read_verdict(content or "")
        except (EndpointError, ValueError) as error:
            raise JudgeError(str(error)) from error
        kept = ToolResult(json.dumps(verdict))
        self._verdicts.add(Recording(key, "judge", "{}", "", kept, kind=Kind.SIMULATED))  # at once: it has been paid for
        return verdict["score"]


def _reward(score: int | None) -> float | None:
    return None if score is None else score / rubric.HIGHEST
