"""Calls of many rows: together or in turn, in call order, never waited for beyond their time."""

import subprocess
import sys
import textwrap
import threading

import pytest

from cacherl_jax.rollout import tool_calls
from cacherl_jax.rollout.tool_calls import ToolCalls, make_calls
from cacherl_jax.tools.functions import FunctionTools, tool
from cacherl_jax.tools.registry import LiveToolError, forbid_live
from cacherl_jax.types import Effects, Kind, Observation, Tier, ToolCall, ToolFailure, ToolResult, ToolSpec

SPECS = {"read": ToolSpec("read", "", {}), "write": ToolSpec("write", "", {}, Effects(writes=("x",)))}


class Gated:
    """A session whose calls wait for a gate of their name, `answer[x]`; notes what began and what was under way with it."""

    def __init__(self):
        self.gates, self.began, self.running, self.most, self.threads = {}, [], 0, 0, {}
        self.changed = threading.Condition()

    def gate(self, x):
        with self.changed:
            return self.gates.setdefault(x, threading.Event())

    def open(self, *xs):
        for x in xs:
            self.gate(x).set()

    def until_begun(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.began) >= count, 60)

    def execute(self, call, index):
        x = call.parsed()["x"]
        with self.changed:
            self.began.append(x)
            self.threads[x] = threading.current_thread()
            self.running += 1
            self.most = max(self.most, self.running)
            self.changed.notify_all()
        assert self.gate(x).wait(60)
        with self.changed:
            self.running -= 1
        if x == "bug":
            raise ZeroDivisionError("oops")
        made = Observation(call, ToolResult(f"{x} at {index}"), Tier.LIVE, Kind.LIVE)
        if x == "fail":
            raise ToolFailure(made)
        return made


def calls(*xs, name="read", first=0):
    return [(first + i, ToolCall.of(name, x=x)) for i, x in enumerate(xs)]


def texts(answers):
    return [a if isinstance(a, ToolFailure) else a.result.error or a.result.content for a in answers]


@pytest.fixture
def session():
    made = Gated()
    yield made
    made.open(*made.began)  # no thread is left waiting


@pytest.fixture
def tools():
    made = ToolCalls(SPECS, 60.0)
    yield made
    made.close()


def test_reads_of_a_turn_run_together_and_answer_in_call_order(tools, session):
    assert tools.submit(3, session, calls("a", "b", "c", first=5), blocking=True) is None
    session.until_begun(3)
    for x in "cba":
        assert tools.done() == {}
        session.open(x)
        session.threads[x].join()
    tools.wait()
    ((row, answers),) = tools.done().items()
    assert row == 3 and texts(answers) == ["a at 5", "b at 6", "c at 7"] and session.most == 3
    assert tools.done() == {}


def test_calls_of_a_turn_with_a_write_run_one_after_the_other(tools, session):
    made = [*calls("a"), *calls("b", name="write", first=1), *calls("c", first=2)]
    session.open("b", "c")
    tools.submit(0, session, made, blocking=True)
    session.until_begun(1)
    assert tools.done() == {} and session.began == ["a"]
    session.open("a")
    tools.wait()
    assert texts(tools.done()[0]) == ["a at 0", "b at 1", "c at 2"]
    assert session.began == ["a", "b", "c"] and session.most == 1


def test_rows_do_not_wait_for_each_other(tools, session):
    other = Gated()
    tools.submit(0, session, calls("slow"), blocking=True)
    tools.submit(1, other, calls("fast"), blocking=True)
    other.open("fast")
    tools.wait()
    assert tools.done().keys() == {1}
    with pytest.raises(ValueError, match="row 0 still waits"):
        tools.submit(0, other, calls("fast"), blocking=True)
    session.open("slow")
    tools.wait()
    assert tools.done().keys() == {0}
    tools.wait()  # nothing to wait for


def test_tools_that_answer_at_once_need_no_thread(tools, session):
    session.open("a", "fail", "b")
    before = threading.active_count()
    answers = tools.submit(0, session, calls("a", "fail", "b"), blocking=False)
    assert threading.active_count() == before
    assert texts(answers)[0] == "a at 0" and isinstance(answers[1], ToolFailure) and session.began == ["a", "fail"]
    assert tools.done() == {}


@pytest.mark.parametrize("name", ["read", "write"])
def test_answers_end_at_the_first_failure_in_call_order(tools, session, name):
    session.open("a", "fail", "b")
    answers = tools.answers(session, calls("a", "fail", "b", name=name))
    assert texts(answers)[0] == "a at 0" and isinstance(answers[1], ToolFailure) and len(answers) == 2
    assert ("b" in session.began) == (name == "read")


def test_a_late_call_is_a_typed_error_that_no_reward_rests_on(session):
    tools = ToolCalls(SPECS, 0.05)
    tools.submit(0, session, calls("never"), blocking=True)
    tools.wait()
    (late,) = tools.done()[0]
    assert (late.result.error, late.tier, late.kind, late.fidelity) == ("timeout", Tier.MISS, Kind.SIMULATED, 0.0)
    assert late.call == ToolCall.of("read", x="never") and "0.05 s" in late.result.content


@pytest.fixture
def clock(monkeypatch):
    """The time that deadlines are set by, in a list to be changed."""
    now = [0.0]
    monkeypatch.setattr(tool_calls.time, "monotonic", lambda: now[0])
    return now


def test_while_a_late_call_runs_its_session_is_left_alone(tools, session, clock):
    session.open("a", "b")
    tools.submit(0, session, calls("late", "a", name="write"), blocking=True)
    clock[0] = 61.0
    answers = tools.done()[0]
    assert texts(answers) == ["timeout", "timeout"] and "not called" in answers[1].result.content
    tools.submit(0, session, calls("b"), blocking=True)
    assert texts(tools.done()[0]) == ["timeout"] and session.began == ["late"]
    other = Gated()
    other.open("b")
    assert texts(tools.answers(other, calls("b"))) == ["b at 0"]  # other episodes have their tools
    session.open("late")
    for _ in range(6000):
        answers = tools.answers(session, calls("b"))
        if texts(answers) != ["timeout"]:
            break
        threading.Event().wait(0.01)
    assert texts(answers) == ["b at 0"]  # it has returned: this one has its tools again


def test_a_broken_tool_reaches_the_caller_with_its_name(tools, session):
    session.open("bug")
    for attempt in (
        lambda: make_calls(session, calls("bug")),
        lambda: tools.answers(session, calls("bug")),
    ):
        with pytest.raises(ZeroDivisionError, match="oops") as broken:
            attempt()
        assert broken.value.__notes__ == ['in a call of tool read: {"x": "bug"}']


def test_live_tools_stay_forbidden_in_threads(tools):
    @tool()
    def read(x: int) -> int:
        return x

    provider = FunctionTools([read])
    assert provider.blocking
    assert tools.answers(provider.start(None, 0), calls(1))[0].result.content == "1"
    with forbid_live(), pytest.raises(LiveToolError, match="read"):
        tools.answers(provider.start(None, 0), calls(1))


def test_after_close_nothing_more_starts(tools, session):
    tools.submit(0, session, calls("a", "b", name="write"), blocking=True)
    session.until_begun(1)
    tools.close()
    session.open("a", "b")
    tools.wait()
    assert tools.done() == {} and session.began == ["a"]


def test_a_call_that_never_returns_does_not_keep_the_interpreter():
    program = """
        import threading
        from cacherl_jax.rollout.tool_calls import ToolCalls
        from cacherl_jax.types import ToolCall, ToolSpec

        class Stuck:
            def execute(self, call, index):
                threading.Event().wait()

        tools = ToolCalls({"f": ToolSpec("f", "", {})}, 0.05)
        print(tools.answers(Stuck(), [(0, ToolCall("f", "{}"))])[0].result.error)
        tools.submit(0, Stuck(), [(0, ToolCall("f", "{}"))], blocking=True)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "timeout\n", "")


def test_time_counts_from_a_calls_own_start(tools, session, clock):
    """The second call of a turn has its whole time, however long the first took."""
    tools.submit(0, session, calls("a", "b", name="write"), blocking=True)
    clock[0] = 55.0
    session.open("a")
    while len(session.began) < 2:
        assert tools.done() == {}
    clock[0] = 114.0
    assert tools.done() == {}
    clock[0] = 115.5
    assert texts(tools.done()[0]) == ["a at 0", "timeout"]
