"""One question to an OpenAI-compatible endpoint, waited for. A teacher's many at a time: trajectories/endpoint.py."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from cacherl_jax import versions
from cacherl_jax.config import EndpointConfig


class EndpointError(Exception):
    """The endpoint gave no reply, after its retries; the message says why in a few words. status: of HTTP, 0 without one."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class EndpointUnusable(Exception):
    """An endpoint that a run cannot do without is of no use to it; the message says why, and what to do."""


class ChatEndpoint:
    """Asks without temperature. The API key is read from OPENAI_API_KEY. Raises MissingExtra without the client."""

    def __init__(self, config: EndpointConfig) -> None:
        openai = versions.require("openai", "teacher")
        self._config, self._error = config, openai.OpenAIError
        # Local endpoints want no key, but the client does.
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._client = openai.OpenAI(
            base_url=config.base_url, api_key=key, timeout=config.timeout, max_retries=config.retries
        )  # fmt: skip

    def ask(self, messages: Sequence[Mapping[str, str]], **more: Any) -> tuple[Any, bool]:
        """The reply's content, a text or None, and whether it was cut at max_tokens. more: further fields of the request.
        Raises EndpointError."""
        config = self._config
        try:
            reply = self._client.chat.completions.create(
                model=config.model, messages=messages, temperature=0, max_tokens=config.max_tokens, **more
            )
            choice = reply.choices[0]
            return choice.message.content, choice.finish_reason == "length"
        except self._error as error:
            status = getattr(error, "status_code", 0)
            raise EndpointError(f"HTTP status {status}" if status else type(error).__name__, status) from error
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise EndpointError("the reply is no chat completion") from error
