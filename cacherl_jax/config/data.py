"""Where tasks and recordings come from, and the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pydantic

from cacherl_jax.config.basics import Positive, require

WorldFamily = Literal[
    "no_call", "one_call", "chain2", "chain3", "chain4", "write_then_read", "error_recovery", "choose"
]  # of tasks, tools/world/tasks.py


@dataclass(frozen=True)
class DataConfig:
    """Where tasks and recordings come from: the embedded world (sizes below) or a corpus on disk."""

    source: Literal["world", "sgd"] = "world"
    path: str = ""  # folder of the corpus; unused for the world
    train_tasks: Positive = 1500
    validation_tasks: Positive = 100
    test_tasks: Positive = 400
    families: tuple[WorldFamily, ...] = ()  # world: in equal shares; (): all, in the world's own
    services: tuple[str, ...] = ()  # sgd: the subset of services; () is all
    unseen_services: tuple[str, ...] = ()  # sgd: services that only the test split has
    demonstrators: tuple[Literal["expert", "stopper", "wanderer"], ...] = ("expert", "stopper", "wanderer")  # world

    def __post_init__(self) -> None:
        require(self.source == "world" or bool(self.path), f"data.path is empty; data.source={self.source!r} needs one")


@dataclass(frozen=True)
class TokenizerConfig:
    """A BPE trained on the recordings, with the fixed runs of the chat template as added tokens; or one from disk."""

    path: str = ""  # folder with tokenizer.json; "" trains one
    vocab_size: Annotated[int, pydantic.Field(ge=265)] = 680  # bytes and control tokens alone take 265
