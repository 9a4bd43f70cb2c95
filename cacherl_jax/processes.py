"""Several processes, one run: they start together, decide together and stop together.

Every process runs the same program on its own devices. Whatever decides what is run next (a signal, a folder that is
finished) is agreed on first, by a tiny collective that all join. One process writes what is not an array: `is_first()`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cacherl_jax import interrupts
from cacherl_jax.config import ConfigError

# Where the cluster does not say: JAX itself reads the first one alone.
COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def start() -> None:
    """Joins the other processes, before anything else of JAX is used. Raises ConfigError when it cannot know them."""
    numbers: dict[str, int | None] = {}
    for name in (COUNT, INDEX):
        text = os.environ.get(name, "")
        if text and not text.isdecimal():
            raise ConfigError(f"{name}={text!r} is no number")
        numbers[name] = int(text) if text else None
    # It would take SIGTERM for itself: what stops a run is `check`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(num_processes=numbers[COUNT], process_id=numbers[INDEX])
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--distributed: {error}. Set {COORDINATOR} (HOST:PORT of the first process), {COUNT} and {INDEX} for each "
            "process, or start them where JAX knows the cluster (Cloud TPU, Slurm, Open MPI, Kubernetes)"
        ) from error


def is_first() -> bool:
    """Whether this process writes what all have: metrics, settings, results."""
    return jax.process_index() == 0


def index() -> int:
    return jax.process_index()


def agree(numbers: Sequence[int]) -> list[int]:
    """The largest of each number over all processes. Every process calls this the same number of times."""
    if jax.process_count() == 1:
        return list(numbers)
    return np.asarray(multihost_utils.process_allgather(np.asarray(numbers, np.int32))).max(axis=0).tolist()


def wait() -> None:
    """Returns when every process has come here: what one wrote before, others find after."""
    agree([0])


def check() -> None:
    """`interrupts.check()` for all: where a signal reached one process, all raise at this same point."""
    interrupts.stop(*agree([interrupts.pending()]))


def gather(value: Any) -> list[Any]:
    """The JSON values of all processes, on each of them, in the order of the processes."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    (longest,) = agree([len(text)])
    sent = np.frombuffer(text.tobytes().ljust(longest), np.uint8)
    return [json.loads(part.tobytes()) for part in np.asarray(multihost_utils.process_allgather(sent))]


def of_first(what: str, body: Callable[[], Any]) -> Any:
    """The JSON value that `body()` has in the first process, which alone runs it, in all of them. An exception leaves the
    first as it is; the others, which would wait for ever, raise ConfigError naming `what`."""
    value, raised = None, None
    if is_first():
        try:
            value = body()
        except BaseException as error:
            raised = error
    (failed, value), *_ = gather([raised is not None, value])
    if raised is not None:
        raise raised
    if failed:
        raise ConfigError(f"{what} failed in the first process, which says why")
    return value


def refuse_differences(values: Mapping[str, Any]) -> None:
    """Raises ConfigError, in every process, naming what is not the same in all. Values are JSON, objects may be nested."""
    found = [flat(v) for v in gather(values)]
    for index, other in enumerate(found):
        for name in sorted(found[0].keys() | other.keys()):
            if found[0].get(name) != other.get(name):
                raise ConfigError(
                    f"the processes were not started alike: {name} is {found[0].get(name)!r} in process 0, "
                    f"{other.get(name)!r} in process {index}"
                )


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """The values inside nested objects by their path: {"a.b": 1}."""
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for name, child in value.items() for k, v in flat(child, f"{path}.{name}" if path else name).items()}


def whole(x: jax.Array) -> np.ndarray:
    """An array of all processes on this one's host. A collective where it lies on devices of several."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
