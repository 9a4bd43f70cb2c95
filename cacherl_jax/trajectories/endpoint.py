"""An OpenAI-compatible endpoint as a teacher's model: bounded concurrency, retries that wait as they are told, JSON by schema."""

from __future__ import annotations

import asyncio
import contextvars
import email.utils
import os
import time
from typing import Any

from cacherl_jax import versions
from cacherl_jax.config import EndpointConfig
from cacherl_jax.trajectories import prompts
from cacherl_jax.trajectories.paid import Failed, Halt, Refused, TeacherStopped
from cacherl_jax.trajectories.prompts import Request
from cacherl_jax.trajectories.teacher import Reply

LONGEST_PAUSE = 120.0  # seconds, also where Retry-After asks for more
UNUSABLE = (400, 413, 422)  # statuses that are about one request


class _Busy(Exception):
    """A try that failed and may do better later. after: seconds that the endpoint asks to wait."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class _Slot:
    """A place among the requests on their way. Taken when the request is made up, released as the reply arrives: prompts are
    made up and replies are read while others are under way."""

    def __init__(self, slots: asyncio.Semaphore) -> None:
        self._slots, self._held = slots, False

    async def acquire(self) -> None:
        await self._slots.acquire()
        self._held = True

    def release(self) -> None:
        if self._held:
            self._held = False
            self._slots.release()


_slot: contextvars.ContextVar[_Slot] = contextvars.ContextVar("slot")  # of the request that the running task sends


class Endpoint:
    """`concurrency` requests at a time go to the endpoint; pauses before another try hold no place among them.

    429, 5xx, timeouts, broken connections and bodies that are no chat completion are tried again with growing random pauses
    that are never shorter than Retry-After. Servers that refuse `json_schema` are asked for a `json_object` from then on.
    Raises MissingExtra without the client's packages.
    """

    def __init__(self, config: EndpointConfig, concurrency: int, halt: Halt) -> None:
        self._openai = versions.require("openai", "teacher")
        self._tenacity = versions.require("tenacity", "teacher")
        self.tries = 0
        self._config, self._halt = config, halt
        self._slots = asyncio.Semaphore(concurrency)
        self._by_schema = True

        async def on_request(request: Any) -> None:
            await _slot.get().acquire()
            halt.check()
            self.tries += 1

        async def on_head(response: Any) -> None:
            if "content-length" not in response.headers:
                await response.aread()  # some servers send the head at once, and the reply when there is one
            _slot.get().release()

        self._client = self._openai.AsyncOpenAI(
            base_url=config.base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",  # local endpoints want no key, but the client does
            timeout=config.timeout,
            max_retries=0,
            http_client=self._openai.DefaultAsyncHttpxClient(event_hooks={"request": [on_request], "response": [on_head]}),
        )

    async def close(self) -> None:
        await self._client.close()

    async def complete(self, request: Request) -> Reply:
        """Raises Refused where the endpoint takes no such request, Failed where every try failed, TeacherStopped where it
        takes none at all."""
        tenacity = self._tenacity
        growing = tenacity.wait_random_exponential(multiplier=0.25, max=30)
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_Busy),
            stop=tenacity.stop_after_attempt(self._config.retries + 1),
            wait=lambda state: max(growing(state), min(state.outcome.exception().after, LONGEST_PAUSE)),
            sleep=self._halt.pause,
            reraise=True,
        )
        try:
            return await retrying(self._try, request)
        except _Busy as error:
            tries = self._config.retries + 1
            raise Failed(f"the endpoint {self._config.base_url} failed {tries} times in a row: {error}") from error

    async def _try(self, request: Request) -> Reply:
        by_schema = self._by_schema
        try:
            return await self._send(request, by_schema=by_schema)
        except Refused:
            if not by_schema:
                raise
        reply = await self._send(request, by_schema=False)  # refused again: it was not the schema
        self._by_schema = False
        return reply

    async def _send(self, request: Request, *, by_schema: bool) -> Reply:
        openai = self._openai
        schema = {"name": request.schema, "strict": True, "schema": prompts.SCHEMAS[request.schema]}
        body = {
            "model": request.model,
            "messages": [{"role": role, "content": text} for role, text in request.messages],
            "response_format": {"type": "json_schema", "json_schema": schema} if by_schema else {"type": "json_object"},
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "seed": request.seed,
        }
        slot = _Slot(self._slots)
        _slot.set(slot)
        try:
            # The typed `create` spends milliseconds on checking a body that is right by construction.
            completion = await self._client.post(
                "/chat/completions", body=body, cast_to=object, options={"headers": {"Idempotency-Key": request.key}}
            )
            return _reply(completion, request)
        except openai.APIStatusError as error:
            raise self._of_status(error) from error
        except (openai.APITimeoutError, openai.APIConnectionError) as error:
            raise _Busy(type(error).__name__) from error
        except (openai.APIError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise _Busy("the reply is no chat completion") from error
        finally:
            slot.release()

    def _of_status(self, error: Any) -> Exception:
        status = error.status_code
        if status in UNUSABLE:
            return Refused(f"the endpoint {self._config.base_url} refused the request: HTTP status {status}: {error.message}")
        if status in (408, 409, 425, 429) or status >= 500:
            return _Busy(f"HTTP status {status}", _retry_after(error.response.headers))
        return TeacherStopped(f"the endpoint {self._config.base_url} answered HTTP status {status}: {error.message}")


def _reply(completion: Any, request: Request) -> Reply:
    """Raises TypeError, AttributeError or LookupError for what is no chat completion."""
    choice, usage = completion["choices"][0], completion.get("usage")
    text = choice["message"].get("content") or ""
    if not isinstance(text, str):
        raise TypeError(f"content is {type(text).__name__}")
    # Servers that do not count are counted for.
    prompt = _counted(usage, "prompt_tokens", request.prompt_tokens)
    completed = _counted(usage, "completion_tokens", len(text.encode(errors="replace")) // 3 + 1)
    return Reply(text, prompt, completed, "cut" if choice.get("finish_reason") == "length" else "")


def _counted(usage: Any, name: str, otherwise: int) -> int:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) else otherwise


def _retry_after(headers: Any) -> float:
    """Seconds, of a number or a date; 0 where the endpoint says nothing that can be read."""
    text = headers.get("retry-after", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
