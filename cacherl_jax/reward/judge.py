"""A language model that grades answers, behind an OpenAI-compatible endpoint.

A verdict is asked for once: verdicts lie in a store of their own under a hash of everything that was asked, rubric and model
included, so that a resumed run pays nothing twice. A failure is data: it is counted and kept out of the store, and the caller
has a rule to fall back on. What ends a run is a judge that is none: a refused key or model, or no verdict at all.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import jax

from cacherl_jax import interrupts, processes
from cacherl_jax.cache.store import MemoryStore, Recording, SQLiteStore, Store
from cacherl_jax.chat_endpoint import ChatEndpoint, EndpointError, EndpointUnusable
from cacherl_jax.config import JudgeConfig, RewardConfig
from cacherl_jax.reward import rubric
from cacherl_jax.reward.answer import answered
from cacherl_jax.trajectory import Trajectory
from cacherl_jax.types import Kind, Task, ToolResult

REFUSED = (401, 403, 404)  # statuses that are about the key, the model or the address, whatever is asked


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
        self._by_schema, self._answered = True, False

    def grade(self, episodes: Sequence[tuple[Task, Trajectory]]) -> Verdicts:
        """Verdicts of a batch. What has no answer, or leaked reasoning into it, is 0 and not asked about; what reads the
        same is asked about once. Of several processes the first asks, so that all are paid alike. Raises EndpointUnusable
        where the endpoint refuses key, model or address, or has never answered and gives no verdict on any of a batch."""
        rewards, asked, failures = processes.of_first("the judge", lambda: self._grade(episodes))
        return Verdicts(rewards, asked, failures)

    def _grade(self, episodes: Sequence[tuple[Task, Trajectory]]) -> tuple[list[float | None], int, dict[str, int]]:
        texts = [rubric.material(task, t) if answered(t) else None for task, t in episodes]
        wanted = {self._key(text): text for text in texts if text is not None}
        scores: dict[bytes, int] = {}
        for key in wanted:
            if stored := self._verdicts.get(key):
                scores[key], self._answered = rubric.read_verdict(stored[0].result.content)["score"], True
        unknown = {key: text for key, text in wanted.items() if key not in scores}
        failures: Counter[str] = Counter()
        with ThreadPoolExecutor(self._config.concurrency) as pool:
            asked = {key: pool.submit(self._ask, key, text) for key, text in unknown.items()}
            try:
                for key, reply in asked.items():
                    try:
                        scores[key] = _awaited(reply)
                    except JudgeError as error:
                        failures[str(error)] += 1
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what is on its way is still kept
                raise
        self._answered = self._answered or len(scores) > 0
        if unknown and not self._answered:
            raise self._unusable(f"gave no verdict on any of {len(unknown)} answers ({_counted(failures)})")
        rewards = [0.0 if text is None else _reward(scores.get(self._key(text))) for text in texts]
        return rewards, len(unknown), dict(sorted(failures.items()))

    def _key(self, text: str) -> bytes:
        return hashlib.sha256(json.dumps([rubric.VERSION, self._config.model, text]).encode()).digest()

    def _ask(self, key: bytes, text: str) -> int:
        """The score, its verdict kept under `key`. Raises JudgeError where the endpoint gives none, after its retries."""
        try:
            verdict = rubric.read_verdict(self._reply(text) or "")
        except EndpointError as error:
            if error.status in REFUSED:
                raise self._unusable(f"answered {error}") from error
            raise JudgeError(str(error)) from error
        except ValueError as error:
            raise JudgeError(str(error)) from error
        kept = ToolResult(json.dumps(verdict))
        self._verdicts.add(Recording(key, "judge", "{}", "", kept, kind=Kind.SIMULATED))  # at once: it has been paid for
        return verdict["score"]

    def _reply(self, text: str) -> str | None:
        """A server that refuses the schema is asked for any JSON object from then on."""
        messages = rubric.messages(text)
        if self._by_schema:
            try:
                return self._endpoint.ask(messages, response_format=rubric.BY_SCHEMA)[0]
            except EndpointError as error:
                if error.status not in (400, 422):
                    raise
        content, _ = self._endpoint.ask(messages, response_format=rubric.AS_JSON)  # refused again: it was not the schema
        self._by_schema = False
        return content

    def _unusable(self, what: str) -> EndpointUnusable:
        return EndpointUnusable(
            f"the judge {self._config.model!r} at {self._config.base_url} {what}; see reward.judge and OPENAI_API_KEY. "
            "What was done is kept, and the same command goes on"
        )


def _awaited(reply: Future[int]) -> int:
    """Its result. A signal ends the wait, where no other process waits for this one."""
    while not wait([reply], timeout=1.0).done:
        if jax.process_count() == 1:
            interrupts.check()
    return reply.result()


def _counted(failures: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(failures.items()))


def _reward(score: int | None) -> float | None:
    return None if score is None else score / rubric.HIGHEST
