"""A chat-completions server on this machine, quick and as ill-behaved as it is told: what teacher, judge and simulator ask in
the tests. Also used by experiments/teacher.

`Server(answer)` calls `answer(body)` for each request and does what it returns: a text (the assistant's content) or an `Act`.
Run as a program it serves alone: see experiments/teacher/run.py.
"""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Act:
    """status and headers of the reply; seconds to stall before; closes: the connection, without a reply; raw: a body that is
    no completion; finish: the finish reason; head_first: the head comes before the stall, without a length; usage: instead of
    the true counts."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    closes: bool = False
    raw: str | None = None
    finish: str = "stop"
    counts: bool = True  # tokens, in usage
    head_first: bool = False
    usage: dict[str, Any] | None = None


class Server:
    """requests: bodies in the order they came; paths: where to. served: how often each idempotency key got a completion, to its
    last byte."""

    def __init__(self, answer: Callable[[dict[str, Any]], str | Act], port: int = 0) -> None:
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.served: Counter[str] = Counter()
        self.most_at_once = self._now = 0
        self._answer, self._port, self._ready = answer, port, threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> "Server":
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: Any) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    async def _serve(self) -> None:
        self._loop, self._stop, connections = asyncio.get_running_loop(), asyncio.Event(), set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            connections.add(task)
            try:
                while await self._request(reader, writer):
                    pass
            except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass  # the client went away, or the test is over
            finally:
                connections.discard(task)
                writer.close()

        server = await asyncio.start_server(connected, "127.0.0.1", self._port, limit=2**24)
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.requests.append(body)
        self.paths.append(head[0].split()[1])
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            act = self._answer(body)
            act = Act(act) if isinstance(act, str) else act
            if act.head_first:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n")
            await asyncio.sleep(act.seconds)
        finally:
            self._now -= 1
        if act.closes:
            return False
        payload = (act.raw if act.raw is not None else json.dumps(completion(body, act) if act.status == 200 else {})).encode()
        lines = [f"HTTP/1.1 {act.status} Said", "Content-Type: application/json", f"Content-Length: {len(payload)}"]
        lines += [f"{name}: {value}" for name, value in act.headers.items()]
        writer.write(payload if act.head_first else "\r\n".join([*lines, "", ""]).encode() + payload)
        await writer.drain()
        if act.status == 200 and act.raw is None:
            self.served[headers.get("idempotency-key", "")] += 1
        return not act.head_first


def completion(body: dict[str, Any], act: Act) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": act.finish, "message": {"role": "assistant", "content": act.text}}
    prompt, said = sum(len(m["content"]) for m in body["messages"]) // 4, len(act.text) // 4
    usage = {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}
    whole = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
    return whole | ({"usage": usage if act.usage is None else act.usage} if act.counts else {})
