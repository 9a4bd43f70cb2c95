"""The recorded corpora by the names that `--source` takes, each with the function that opens its folder or file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cacherl_jax.data import chats, livemcpbench, sgd, star, taskmaster4, tau_bench
from cacherl_jax.data.recorded import Recorded

# Each raises ConfigError for a path that does not hold what it expects.
SOURCES: dict[str, Callable[[Path], Recorded]] = {
    "sgd": sgd.read,
    "taskmaster4": taskmaster4.read,
    "star": star.read,
    "tau_bench": tau_bench.read,
    "livemcpbench": livemcpbench.read,
    "openai": chats.read_openai,
    "hermes": chats.read_hermes,
}
