"""Ctrl-C waits for a point where state is whole, once, and SIGTERM always; both are left alone where they are not ours."""

import signal
import threading

import pytest

from cacherl_jax import interrupts


def press():
    signal.raise_signal(signal.SIGINT)


def terminate():
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture(autouse=True)
def ctrl_c():
    """Python's own handling of Ctrl-C, also where the tests were started in the background, with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "held() left its handler behind"
    signal.signal(signal.SIGINT, before)


def held(*steps):
    """Takes the steps while Ctrl-C is held; returns how many were taken, and what ended them."""
    taken = 0
    try:
        with interrupts.held():
            for step in steps:
                step()
                taken += 1
    except BaseException as error:
        return taken, error
    return taken, None


def test_the_first_waits_for_a_check_and_the_next_hold_knows_nothing_of_it():
    taken, error = held(interrupts.check, press, int, interrupts.check, int)
    assert taken == 3 and type(error) is interrupts.Interrupted
    assert held(interrupts.check) == (1, None)


def test_one_that_no_check_met_takes_effect_at_the_end():
    taken, error = held(press, int)
    assert taken == 2 and type(error) is KeyboardInterrupt  # not Interrupted: nothing says that the state is whole


def test_the_second_raises_where_it_comes_and_further_ones_do_not():
    reached = []

    def hurried():
        try:
            press()
            reached.append("after the second")
        finally:
            press()
            reached.append("cleaned up")

    taken, error = held(press, hurried)
    assert reached == ["cleaned up"] and taken == 1 and type(error) is KeyboardInterrupt


def test_what_fails_after_one_is_its_own_error_and_after_two_is_ctrl_c():
    def fails():
        raise OSError("disk full")

    def disguised():
        try:
            press()
        except KeyboardInterrupt:
            raise RuntimeError("a library's own words for it") from None

    assert isinstance(held(press, fails)[1], OSError)
    error = held(press, disguised)[1]
    assert isinstance(error, KeyboardInterrupt) and isinstance(error.__cause__, RuntimeError)


def test_an_inner_hold_is_part_of_the_outer():
    taken, error = held(lambda: held(press), int, interrupts.check)
    assert taken == 2 and type(error) is interrupts.Interrupted


def test_other_handlers_are_left_alone_and_without_a_hold_nothing_is_checked():
    seen = []
    for handler in (signal.SIG_IGN, lambda number, frame: seen.append(number)):
        signal.signal(signal.SIGINT, handler)
        assert held(press, interrupts.check) == (2, None)
        assert signal.getsignal(signal.SIGINT) is handler
    assert seen == [signal.SIGINT]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts.check()
    with pytest.raises(KeyboardInterrupt):
        press()
    interrupts.check()


def test_a_thread_neither_holds_nor_is_stopped():
    ends = []

    def elsewhere():
        thread = threading.Thread(target=lambda: ends.append(held(interrupts.check)))
        thread.start()
        thread.join()

    elsewhere()
    taken, error = held(press, elsewhere, interrupts.check)
    assert ends == [(1, None)] * 2 and taken == 2 and type(error) is interrupts.Interrupted


def test_sigterm_waits_however_often_it_comes_and_says_that_it_was_the_one():
    taken, error = held(terminate, terminate, terminate, interrupts.check)
    assert taken == 3 and type(error) is interrupts.Interrupted and interrupts.signal_of(error) is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    taken, error = held(terminate, int)
    assert taken == 2 and type(error) is KeyboardInterrupt and interrupts.signal_of(error) is signal.SIGTERM
    taken, error = held(terminate, press, interrupts.check)
    assert taken == 2 and interrupts.signal_of(error) is signal.SIGINT  # the user is there
    assert held(terminate, press, press)[0] == 2
    assert interrupts.signal_of(KeyboardInterrupt()) is signal.SIGINT


def test_sigterm_is_held_where_the_program_handles_it_by_itself():
    before = signal.signal(signal.SIGTERM, interrupts.raise_terminated)
    try:
        assert held(terminate, int, interrupts.check)[0] == 2
        with pytest.raises(KeyboardInterrupt) as raised:
            terminate()
        assert interrupts.signal_of(raised.value) is signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
