"""Calls that may never return, in threads that can be left behind: Python cannot stop them."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_thread(run: Callable[[], T]) -> Future[T]:
    """The outcome of `run` in a daemon thread of its own, which holds up neither its caller nor the interpreter's exit.
    Context variables come along."""
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(run())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True).start()
    return outcome
