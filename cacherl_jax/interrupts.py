"""Ctrl-C takes effect where a loop's state is whole.

An update that donates its state, or a checkpoint half written, is no place to stop. Inside `held()` the first Ctrl-C waits
for the loop's next `check()`; a second one, of a user who will not wait, raises at once and nothing more is saved. Further
ones change nothing: what is being undone or written is finished.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_NOTICE = b"\nstopping where nothing is lost; Ctrl-C again stops at once\n"

_came = 0  # Ctrl-Cs since the outermost held() began


class Interrupted(KeyboardInterrupt):
    """A Ctrl-C at a `check()`: the state of the loops around it is whole. Any other KeyboardInterrupt says nothing of it."""


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Holds Ctrl-C inside; one that no `check()` met raises KeyboardInterrupt at the end.

    Does nothing inside another `held()`, outside the main thread, which no signal reaches, and where Ctrl-C is not Python's
    own: ignored, as in a background job, or handled by another program.
    """
    global _came
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not mine:
        yield
        return
    signal.signal(signal.SIGINT, _on_signal)
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if _came > 1:  # what the second one interrupted may fail in its own way
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        came, _came = _came, 0
    if came:
        raise KeyboardInterrupt


def check() -> None:
    """Raises Interrupted if a Ctrl-C is held. For points where all state is whole. Does nothing outside the main thread."""
    if pending():
        raise Interrupted


def pending() -> bool:
    """Whether `check()` would raise: for processes that must stop together."""
    return bool(_came) and threading.current_thread() is threading.main_thread()


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _came
    _came += 1
    if _came == 1:
        with contextlib.suppress(OSError):
            os.write(2, _NOTICE)  # print could meet itself here
    elif _came == 2:
        raise KeyboardInterrupt
