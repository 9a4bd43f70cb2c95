"""What stores hold: recordings, each one answered call, and entries, each one result of one key."""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

from cacherl_jax.types import Kind, ToolResult


@dataclass(frozen=True)
class Recording:
    """One answered call as it was observed: what fills a store, and what rules and fidelities are learnt from.

    episode: the dialogue or run it is from. recorded_at: Unix seconds, None where the corpus does not say. Texts may hold
    lone surrogates. Raises TypeError for a text that is none, ValueError for a time that is none.
    """

    key: bytes
    tool: str
    arguments: str  # canonical, or as recorded in a raw store
    writes: str  # the relevant earlier writes, one a line; "" for none
    result: ToolResult
    episode: str = ""
    kind: Kind = Kind.RECORDED
    recorded_at: float | None = None

    def __post_init__(self) -> None:
        texts = (self.tool, self.arguments, self.writes, self.result.content, self.result.error or "", self.episode)
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(
                    f"a recording of {self.tool!r} holds {type(text).__name__} where text belongs: {text[:40]!r}; "
                    'decode bytes first, with errors="surrogateescape" where they may be no UTF-8'
                )
        if self.recorded_at is not None and not math.isfinite(self.recorded_at):
            raise ValueError(f"recorded_at={self.recorded_at} of a recording of {self.tool!r} is no time; None is unknown")


@dataclass(frozen=True)
class Entry:
    """One result of one key, with what all its recordings say. count: their number. recorded_at: of the newest.
    first: the entry's place in the order of arrival. age: seconds from recorded_at to the snapshot, None where the store is
    no snapshot or the time is unknown."""

    key: bytes
    tool: str
    arguments: str
    writes: str
    result: ToolResult
    kind: Kind
    count: int
    recorded_at: float | None
    first: int
    age: float | None = None

    @functools.cached_property
    def hash(self) -> str:
        """Names the entry by content: key, kind, result, error."""
        return hashlib.sha256(self.key + content_digest(self.kind, self.result)).hexdigest()


def content_digest(kind: Kind, result: ToolResult) -> bytes:
    """SHA-256 of what was answered."""
    # The error's length keeps error and content apart; -1 is no error, which differs from an empty one.
    error = result.error
    text = f"{kind.value}\n{-1 if error is None else len(error)}\n{error or ''}{result.content}"
    # surrogatepass: payloads with lone surrogates are recorded data, not ours to refuse.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
