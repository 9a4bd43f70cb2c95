"""A model of ours as the teacher's: a finished stage or a converted folder, asked through the engine in batches."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import numpy as np

from cacherl_jax import checkpoint, interrupts, mesh, model_folder
from cacherl_jax.config import Config, ConfigError, RolloutConfig
from cacherl_jax.model import qwen3
from cacherl_jax.rollout.engine import Engine
from cacherl_jax.rollout.turns import Prompt, sample_turns
from cacherl_jax.text import chat
from cacherl_jax.text.tokenizer import Tokenizer
from cacherl_jax.trajectories.paid import Refused, TeacherStopped
from cacherl_jax.trajectories.prompts import Request
from cacherl_jax.trajectories.teacher import Reply
from cacherl_jax.types import Message


def load(config: Config) -> PolicyModel:
    """The model in `config.teacher.policy`, on one device. Raises ConfigError where there is none, and for several processes."""
    if jax.process_count() > 1:
        raise ConfigError("teacher.kind='policy' asks one device: run `cacherl think` without --distributed, then go on with it")
    folder = Path(config.teacher.policy).resolve()
    shape = model_folder.model_config(folder)
    tok = Tokenizer.load(model_folder.tokenizer_folder(folder))
    model = checkpoint.restore_model(folder / "checkpoints", checkpoint.abstract_model(shape, mesh.one_device()))
    settings = dataclasses.replace(config.rollout, rows=min(config.rollout.rows, config.teacher.concurrency), slots=0)
    if config.teacher.max_tokens >= settings.context:
        raise ConfigError(
            f"teacher.max_tokens={config.teacher.max_tokens} leaves no room for a prompt in rollout.context={settings.context}"
        )
    name = f"policy:{folder.name}@{_digest(model, model_folder.tokenizer_folder(folder), settings)}"
    return PolicyModel(Engine(shape, settings, tok.stop_ids), model, tok, name)


def _digest(model: qwen3.Qwen3, tokenizer: Path, settings: RolloutConfig) -> str:
    """Of all that decides a reply beside the request. A policy that is trained again in its place is another teacher: what the
    old one replied, under its name, is not taken for the new one's."""
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(model.config), settings.top_p, settings.top_k]).encode())
    digest.update((tokenizer / "tokenizer.json").read_bytes())
    for weight in jax.tree.leaves(qwen3.to_dict(model)):  # in the order of their names
        digest.update(np.ascontiguousarray(weight).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]


class PolicyModel:
    """Takes all requests that wait, up to the engine's rows, and samples their turns together. Runs in the event loop: while
    it samples, nothing else goes on."""

    def __init__(self, engine: Engine, model: qwen3.Qwen3, tok: Tokenizer, name: str) -> None:
        self.name = name
        self._engine, self._model, self._tok = engine, engine.place(model), tok
        self._waiting: list[tuple[Request, list[int], asyncio.Future[Reply]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def complete(self, request: Request) -> Reply:
        """Raises Refused for a prompt that leaves no room for the reply."""
        messages = [Message(role, text) for role, text in request.messages]
        ids = chat.official_ids(self._tok, messages, [], thinking_model=True, add_generation_prompt=True)
        if len(ids) + request.max_tokens > self._engine.context:
            raise Refused(
                f"a prompt of {len(ids)} tokens and teacher.max_tokens={request.max_tokens} exceed rollout.context="
                f"{self._engine.context}; a smaller teacher.max_past cuts the prompt"
            )
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, ids, future))
        if self._worker is None:
            self._worker = asyncio.ensure_future(self._work())
        return await future

    async def _work(self) -> None:
        while True:
            await asyncio.sleep(0)  # whoever has something to ask asks now
            if interrupts.pending():
                self._fail(self._waiting, TeacherStopped("stopped by a signal"))
                self._waiting = []
            batch, self._waiting = self._waiting[: self._engine.rows], self._waiting[self._engine.rows :]
            if not batch:
                self._worker = None
                return
            try:
                replies = self._replies([(request, ids) for request, ids, _ in batch])
            except Exception as error:
                self._fail(batch, error)
                continue
            for (_, _, future), reply in zip(batch, replies, strict=True):
                future.set_result(reply)

    @staticmethod
    def _fail(batch: list[tuple[Request, list[int], asyncio.Future[Reply]]], error: Exception) -> None:
        for _, _, future in batch:
            future.set_exception(error)

    def _replies(self, batch: list[tuple[Request, list[int]]]) -> list[Reply]:
        (temperature,) = {request.temperature for request, _ in batch}  # a run's configuration has one
        prompts = [Prompt(ids, request.max_tokens, _key(request)) for request, ids in batch]
        replies = []
        for prompt, turn in zip(prompts, sample_turns(self._engine, self._model, prompts, temperature), strict=True):
            ended = bool(turn) and turn[-1] in self._tok.stop_ids
            text = chat.parse_turn(self._tok.decode(turn)).content
            replies.append(Reply(text, len(prompt.ids), len(turn), "" if ended else "cut"))
        return replies


def _key(request: Request) -> np.ndarray:
    """Of the request's content, its seed included: the same request is answered the same, whatever is asked beside it."""
    return np.frombuffer(bytes.fromhex(request.key[:16]), np.uint32).copy()
