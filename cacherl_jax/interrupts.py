"""Ctrl-C, and SIGTERM, take effect where a loop's state is whole.

An update that donates its state, or a checkpoint half written, is no place to stop. Inside `held()` the first Ctrl-C waits
for the loop's next `check()`; a second one, of a user who will not wait, raises at once and nothing more is saved. Further
ones change nothing: what is being undone or written is finished. SIGTERM, by which a cluster takes its machines back, always
waits: who sends it does not press twice.

What is raised carries the signal: `KeyboardInterrupt(signal.SIGTERM)`, see `signal_of`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

_NOTICE = b"\nstopping where nothing is lost; Ctrl-C again stops at once\n"
_NOTICE_TERMINATED = b"\nSIGTERM: stopping where nothing is lost\n"

_came = 0  # Ctrl-Cs since the outermost held() began
_terminated = False  # whether a SIGTERM came since


class Interrupted(KeyboardInterrupt):
    """A signal at a `check()`: the state of the loops around it is whole. Any other KeyboardInterrupt says nothing of it."""


def signal_of(error: KeyboardInterrupt) -> signal.Signals:
    """What ended the run: SIGINT or SIGTERM."""
    return signal.SIGTERM if error.args == (signal.SIGTERM,) else signal.SIGINT


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Holds signals inside; one that no `check()` met raises KeyboardInterrupt at the end.

    Does nothing inside another `held()`, outside the main thread, which no signal reaches, and for a signal that is not
    Python's own to handle: ignored, as Ctrl-C in a background job, or handled by another program.
    """
    global _came, _terminated
    ours = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        plain = {signal.SIGINT: (signal.default_int_handler,), signal.SIGTERM: (signal.SIG_DFL, raise_terminated)}
        ours = {number: handler for number, handler in before.items() if handler in plain[number]}
    if not ours:
        yield
        return
    for number in ours:
        signal.signal(number, _on_signal)
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if _came > 1:  # what the second one interrupted may fail in its own way
            raise KeyboardInterrupt(signal.SIGINT) from error
        raise
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        unmet = pending()
        _came, _terminated = 0, False
    if unmet:
        raise KeyboardInterrupt(unmet)


def check() -> None:
    """Raises Interrupted if a signal is held. For points where all state is whole. Does nothing outside the main thread."""
    stop(pending())


def pending() -> int:
    """The signal for which `check()` would raise, else 0: for processes that must stop together."""
    if threading.current_thread() is not threading.main_thread():
        return 0
    return signal.SIGINT if _came else signal.SIGTERM if _terminated else 0


def stop(number: int) -> None:
    """Raises Interrupted for that signal; 0 is none."""
    if number:
        raise Interrupted(signal.Signals(number))


def raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    """A handler of SIGTERM for where nothing is held, as Python's own is for Ctrl-C."""
    raise KeyboardInterrupt(signal.SIGTERM)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _came, _terminated
    if number == signal.SIGTERM:
        notice, _terminated = None if _terminated else _NOTICE_TERMINATED, True
    else:
        _came += 1
        notice = _NOTICE if _came == 1 else None
    if notice:
        with contextlib.suppress(OSError):
            os.write(2, notice)  # print could meet itself here
    elif number == signal.SIGINT and _came == 2:
        raise KeyboardInterrupt(signal.SIGINT)
