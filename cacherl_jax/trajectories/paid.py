"""Replies are paid once. A store of them by request, what they cost, and a budget that stops before it is overspent.

A reply is committed before it is used: a run that is killed, or made again, asks for nothing that had arrived. What was on
its way at that moment, `concurrency` requests at most, is asked again under the same idempotency key.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from cacherl_jax.config import TeacherConfig
from cacherl_jax.trajectories.prompts import Request
from cacherl_jax.trajectories.teacher import Model, Reply

LOOK = 0.1  # seconds


class TeacherStopped(Exception):
    """The teacher can or may not go on; the message says why. What was done is kept, and the same command goes on."""


class Refused(Exception):
    """The endpoint takes this request not at all, such as one that is too long; others may be well. problem: as of a Reply."""

    problem = "refused"


class Failed(Refused):
    """At every try the endpoint failed on this request, which others may not share."""

    problem = "failed"


class Halt:
    """Says to all who are about to send something that nothing more is sent."""

    def __init__(self) -> None:
        self._set = asyncio.Event()

    def set(self) -> None:
        self._set.set()

    def check(self) -> None:
        """Raises TeacherStopped once set."""
        if self._set.is_set():
            raise TeacherStopped("stopped")

    async def pause(self, seconds: float) -> None:
        """Sleeps, but not beyond the halt."""
        try:
            await asyncio.wait_for(self._set.wait(), seconds)
        except TimeoutError:
            return
        self.check()


class Replies:
    """The store, an SQLite file. A process killed at any moment leaves every reply that `put` returned from."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, isolation_level=None, timeout=60)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, model TEXT, reply TEXT, "
            "prompt_tokens INTEGER, completion_tokens INTEGER, money REAL) WITHOUT ROWID"
        )

    def get(self, key: str) -> Reply | None:
        row = self._db.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return Reply(**json.loads(row[0])) if row else None

    def put(self, request: Request, reply: Reply, money: float) -> None:
        text = json.dumps(vars(reply))  # in ASCII: halves of surrogate pairs stay escaped
        row = (request.key, request.model, text, reply.prompt_tokens, reply.completion_tokens, money)
        self._db.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?, ?)", row)

    def spent(self) -> tuple[float, float, float]:
        """Prompt tokens, completion tokens and money of all replies."""
        return self._db.execute("SELECT TOTAL(prompt_tokens), TOTAL(completion_tokens), TOTAL(money) FROM replies").fetchone()

    def __len__(self) -> int:
        return self._db.execute("SELECT COUNT(*) FROM replies").fetchone()[0]

    def close(self) -> None:
        self._db.close()


class Purse:
    """What may be spent. A request's cost, at most, is reserved before it is sent, so that what is on its way is accounted
    for: spending ends below the budget, or above it by as much as an endpoint counts more prompt tokens than was estimated."""

    def __init__(self, config: TeacherConfig, spent: tuple[float, float, float]) -> None:
        self._config = config
        self.prompt_tokens, self.completion_tokens, self.money = int(spent[0]), int(spent[1]), spent[2]
        self._reserved_tokens, self._reserved_money = 0, 0.0
        self._waiting = asyncio.Condition()

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self._config.price_prompt + completion_tokens * self._config.price_completion) / 1e6

    async def reserve(self, request: Request, halt: Halt) -> None:
        """Waits until the request's cost fits beside what is on its way. Raises TeacherStopped where it fits no more."""
        tokens, money = self._at_most(request)
        async with self._waiting:
            while limit := self._exceeded(tokens, money):
                if not self._reserved_tokens:
                    raise TeacherStopped(limit)
                await self._waiting.wait()
                halt.check()
            self._reserved_tokens += tokens
            self._reserved_money += money

    async def settle(self, request: Request, reply: Reply) -> float:
        """Ends a reservation; gives what the reply cost."""
        tokens, money = self._at_most(request)
        paid = self.price(reply.prompt_tokens, reply.completion_tokens)
        async with self._waiting:
            self._reserved_tokens -= tokens
            self._reserved_money -= money
            self.prompt_tokens += reply.prompt_tokens
            self.completion_tokens += reply.completion_tokens
            self.money += paid
            self._waiting.notify_all()
        return paid

    def _at_most(self, request: Request) -> tuple[int, float]:
        prompt, completion = request.prompt_tokens, request.max_tokens
        return prompt + completion, self.price(prompt, completion)

    def _exceeded(self, tokens: int, money: float) -> str:
        config, spent = self._config, self.prompt_tokens + self.completion_tokens
        limit = next_one = gone = ""
        if config.budget_money and self.money + self._reserved_money + money > config.budget_money:
            limit, next_one, gone = f"money={config.budget_money}", f"{money:.6g}", f"{self.money:.6g}"
        if config.budget_tokens and spent + self._reserved_tokens + tokens > config.budget_tokens:
            limit, next_one, gone = f"tokens={config.budget_tokens}", f"{tokens}", f"{spent}"
        return limit and (
            f"the budget of teacher.budget_{limit} leaves no room for a request of up to {next_one}, {gone} are spent; "
            "what was done is kept, and the same command with a larger one goes on"
        )


class PaidModel:
    """A model behind the store of its replies. Equal requests at one time are asked once.

    Raises TeacherStopped where the budget, the endpoint or a `Halt` ends the run.
    """

    def __init__(self, model: Model, replies: Replies, purse: Purse, halt: Halt, concurrency: int) -> None:
        self.asked, self.stored = 0, 0  # requests of this run, by where their replies came from
        self._model, self._replies, self._purse, self._halt, self._concurrency = model, replies, purse, halt, concurrency
        self._answered = len(replies)  # of all runs
        self._asking: dict[str, asyncio.Task[Reply]] = {}
        self._hopeless: set[str] = set()  # of these, those that wait to see whether it is the request or the endpoint

    async def complete(self, request: Request) -> Reply:
        if (reply := self._replies.get(request.key)) is not None:
            self.stored += 1
            return reply
        if (task := self._asking.get(request.key)) is None:
            task = self._asking[request.key] = asyncio.ensure_future(self._ask(request))
            task.add_done_callback(lambda done: self._landed(request, done))
        return await asyncio.shield(task)  # who waits may be cancelled; what is paid for is stored

    async def _ask(self, request: Request) -> Reply:
        """Where the endpoint failed on it but answers others, the request gets a second round of tries before it is given up."""
        before = self._answered
        reply, refusal = await self._pay(request)
        if isinstance(refusal, Failed):
            await self._until_another(request, refusal, before)
            reply, refusal = await self._pay(request)
        elif refusal is not None:
            await self._until_another(request, refusal, 0)
        self.asked += 1
        # Not stored: it cost nothing, and another endpoint may take the request.
        return reply if refusal is None else Reply("", problem=refusal.problem)

    async def _pay(self, request: Request) -> tuple[Reply, Refused | None]:
        """The reply, kept, or why there is none."""
        self._halt.check()
        await self._purse.reserve(request, self._halt)
        reply = Reply("")  # costs nothing, should none come
        try:
            reply = await self._model.complete(request)
        except Refused as refusal:
            return reply, refusal
        finally:
            money = await self._purse.settle(request, reply)
        self._replies.put(request, reply, money)
        self._answered += 1
        return reply, None

    async def _until_another(self, request: Request, refusal: Refused, before: int) -> None:
        """Returns once more than `before` requests have been answered: the endpoint works, and it is this one that it is not
        for. Raises TeacherStopped where all others on their way wait for the same; after a failure, which takes long to find
        out, where more do than are asked at a time."""
        self._hopeless.add(request.key)
        try:
            while self._answered <= before:
                enough = len(self._asking)
                if isinstance(refusal, Failed):
                    enough = min(enough, self._concurrency + 1)
                if len(self._hopeless) >= enough:
                    raise TeacherStopped(f"{refusal}; what was done is kept, and the same command goes on") from refusal
                await self._halt.pause(LOOK)
        finally:
            self._hopeless.discard(request.key)

    def _landed(self, request: Request, task: asyncio.Task[Reply]) -> None:
        del self._asking[request.key]
        if not task.cancelled():
            task.exception()  # seen, also where nobody waits any more

    async def landed(self) -> None:
        """Waits until nothing is on its way."""
        while self._asking:
            await asyncio.wait(list(self._asking.values()))


def estimate(requests: Iterable[Request], replies: Replies | None, purse: Purse) -> dict[str, float]:
    """What requests will cost: at most (every reply as long as it may be, none rejected), and how many are paid already."""
    count = paid = prompt = completion = 0
    for request in requests:
        if replies is not None and replies.get(request.key) is not None:
            paid += 1
            continue
        count, prompt, completion = count + 1, prompt + request.prompt_tokens, completion + request.max_tokens
    return {
        "requests": count,
        "paid_before": paid,
        "prompt_tokens": prompt,
        "completion_tokens_at_most": completion,
        "money_at_most": round(purse.price(prompt, completion), 6),
    }
