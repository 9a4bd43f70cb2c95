"""What all parts of the configuration are made of: the error, and numbers with bounds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

import pydantic

Positive = Annotated[int, pydantic.Field(gt=0)]
Count = Annotated[int, pydantic.Field(ge=0)]
Share = Annotated[float, pydantic.Field(ge=0, le=1)]
Rate = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
PositiveRate = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field, the value and what is allowed."""


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


@dataclass(frozen=True)
class EndpointConfig:
    """An OpenAI-compatible endpoint. Its API key is read from OPENAI_API_KEY and kept nowhere. The same model may be served
    anywhere: a run's settings hold what decides its replies (REPLY_PARTS)."""

    base_url: str = ""  # such as http://localhost:8000/v1
    model: str = ""
    max_tokens: Positive = 1024  # of a reply; a longer one is a failure
    timeout: PositiveRate = 60.0  # seconds a try
    retries: Count = 2  # after the first try, with growing pauses


REPLY_PARTS = ("model", "max_tokens")  # of an EndpointConfig


def parts(name: str, config: type, **instead: tuple[str, ...]) -> tuple[str, ...]:
    """The names "NAME.field" of a configuration's fields; `instead` gives parts of a field for all of it."""
    whole = [f.name for f in fields(config) if f.name not in instead]
    return tuple(f"{name}.{field}" for field in (*whole, *(f"{part}.{n}" for part, names in instead.items() for n in names)))
