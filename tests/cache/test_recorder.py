"""Recording from live tools: each missing call once, failures on the way never stored, and nothing lost or doubled by a kill."""

import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from cacherl_jax.cache.lookup import CachedTools
from cacherl_jax.cache.recorder import RecordingTools, read_calls, record_calls
from cacherl_jax.cache.store import MemoryStore, SQLiteStore, StoreError
from cacherl_jax.config import CacheConfig
from cacherl_jax.tools.functions import FunctionTools, tool
from cacherl_jax.tools.registry import LiveToolError, ToolError, forbid_live
from cacherl_jax.types import Kind, Task, Tier, ToolCall

TASK = Task("t", "family", "train", (), (), ((),))


class Bank:
    """A state and its tools, which note what was run."""

    def __init__(self):
        self.ran, self.lock, self.release = Counter(), threading.Lock(), threading.Event()

    def note(self, name):
        with self.lock:
            self.ran[name] += 1

    def tools(self):
        bank = self

        @tool()
        def rate(currency: str, api_key: str = "") -> str:
            bank.note("rate")
            if currency == "slow":
                bank.release.wait(10)
            if currency == "none":
                raise ToolError("not_found", "no such currency")
            if currency == "busy":
                raise ToolError("rate_limit", "later")
            if currency == "lost":
                raise ConnectionResetError("peer")
            if currency == "bug":
                raise ZeroDivisionError("oops")
            time.sleep(0.05 if currency == "wait" else 0)
            return f"{currency} is dear, key {api_key}"

        @tool(reads="money", state=True)
        def balance(accounts: dict) -> int:
            bank.note("balance")
            return accounts["a"]

        @tool(reads="money", writes="money", state=True)
        def pay(accounts: dict, amount: int) -> str:
            bank.note("pay")
            if amount == 99:
                bank.release.wait(10)
            accounts["a"] -= amount
            return "ok"

        return FunctionTools([rate, balance, pay], state=lambda: {"a": 100})


@pytest.fixture
def bank():
    made = Bank()
    yield made
    made.release.set()


def rate(currency, **more):
    return ToolCall.of("rate", currency=currency, **more)


BALANCE = ToolCall.of("balance")


def pay(amount):
    return ToolCall.of("pay", amount=amount)


def recorder(bank, store, mode="state", **options):
    provider = bank.tools()
    return RecordingTools(provider, store, provider.specs, mode, clock=lambda: 1234.0, **options)


def test_what_is_recorded_is_served(bank):
    store = MemoryStore()
    session = recorder(bank, store).start(TASK, 3)
    first = session.execute(rate("EUR"), 0)
    assert (first.tier, first.kind) == (Tier.LIVE, Kind.LIVE)
    again = session.execute(rate("EUR"), 0)
    assert (again.tier, again.kind, again.result) == (Tier.EXACT, Kind.RECORDED, first.result)
    for call in (BALANCE, pay(10), BALANCE, rate("none")):
        session.execute(call, 0)
    assert bank.ran == {"rate": 2, "balance": 2, "pay": 1}
    (r, *rest) = store.recordings()
    assert (r.tool, r.episode, r.kind, r.recorded_at) == ("rate", "t/3", Kind.RECORDED, 1234.0)
    assert [x.result.error for x in rest] == [None, None, None, "not_found"]  # the tool's error is its answer
    cached = CachedTools(store, bank.tools().specs, CacheConfig(), seed=0).start(TASK, 0)
    served = [cached.execute(call, 0) for call in (BALANCE, pay(10), BALANCE, rate("none"))]
    assert [o.result.content for o in served][:3] == ["100", '"ok"', "90"] and served[3].result.error == "not_found"
    assert {o.tier for o in served} == {Tier.EXACT}


def test_a_write_runs_in_its_own_episode_each_time(bank):
    store = MemoryStore()
    tools = recorder(bank, store)
    for sample in (0, 1):
        session = tools.start(TASK, sample)
        answers = [session.execute(c, 0).result.content for c in (pay(10), BALANCE, pay(10), BALANCE)]
        assert answers == ['"ok"', "90", '"ok"', "80"]
    assert bank.ran == {"pay": 4, "balance": 2}
    blind = recorder(bank, MemoryStore(), "canonical").start(TASK, 0)  # without state in the key no read stands for another
    assert [blind.execute(c, 0).result.content for c in (BALANCE, pay(10), BALANCE)] == ["100", '"ok"', "90"]


def test_failures_on_the_way_are_typed_and_not_stored(bank):
    store = MemoryStore()
    session = recorder(bank, store, timeout=0.1).start(TASK, 0)
    errors = [session.execute(rate(c), 0).result.error for c in ("slow", "busy", "lost")]
    assert errors == ["timeout", "rate_limit", "connection"] and not list(store.entries())
    bank.release.set()
    assert session.execute(rate("slow"), 0).result.error is None and len(list(store.entries())) == 1
    with pytest.raises(ZeroDivisionError):
        session.execute(rate("bug"), 0)


def test_after_a_write_of_unknown_outcome_nothing_more_is_stored(bank):
    store = MemoryStore()
    session = recorder(bank, store, timeout=0.1).start(TASK, 0)
    session.execute(BALANCE, 0)
    assert session.execute(pay(99), 0).result.error == "timeout"
    assert session.execute(BALANCE, 0).tier is Tier.LIVE  # not what was stored before the payment
    assert session.execute(rate("EUR"), 0).tier is Tier.LIVE
    assert [r.tool for r in store.recordings()] == ["balance"]


def test_the_guard_against_live_tools_holds_in_their_threads(bank):
    session = recorder(bank, MemoryStore(), timeout=5).start(TASK, 0)
    with forbid_live(), pytest.raises(LiveToolError):
        session.execute(rate("EUR"), 0)


def test_secrets_are_not_stored_and_calls_with_them_hit(bank):
    store = MemoryStore()
    session = recorder(bank, store).start(TASK, 0)
    live = session.execute(rate("EUR", api_key="k-123"), 0)
    assert "k-123" in live.result.content  # the agent reads what the tool said
    assert session.execute(rate("EUR", api_key="k-456"), 0).tier is Tier.EXACT
    (entry,) = store.entries()
    assert "k-123" not in entry.arguments and "[redacted:field]" in entry.arguments
    cached = CachedTools(store, bank.tools().specs, CacheConfig(), seed=0).start(TASK, 0)
    hit = cached.execute(rate("EUR", api_key="k-789"), 0)
    assert hit.tier is Tier.EXACT and hit.call == rate("EUR", api_key="k-789")


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_64_threads_one_execution(bank, tmp_path, kind):
    store = MemoryStore() if kind == "memory" else SQLiteStore(tmp_path / "s.sqlite", mode="rw")
    tools, gate, seen = recorder(bank, store), threading.Barrier(64), []

    def ask(i):
        session = tools.start(TASK, i)
        gate.wait()
        seen.append(session.execute(rate("wait"), 0))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(64)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert bank.ran["rate"] == 1 and len(seen) == 64 and len({o.result for o in seen}) == 1
    assert Counter(o.tier for o in seen) == {Tier.LIVE: 1, Tier.EXACT: 63}
    assert [r.episode[:2] for r in store.recordings()] == ["t/"]


PROGRAM = """
    import sys, threading, time
    from pathlib import Path
    from cacherl_jax.cache.recorder import RecordingTools
    from cacherl_jax.cache.store import SQLiteStore
    from cacherl_jax.tools.functions import FunctionTools, tool
    from cacherl_jax.types import Task, ToolCall

    FOLDER = Path(sys.argv[1])

    @tool()
    def slow(x: int) -> int:
        with (FOLDER / "ran").open("a") as f:
            f.write("1")
        time.sleep(float(sys.argv[2]))
        return x

    provider = FunctionTools([slow])
    tools = RecordingTools(provider, SQLiteStore(FOLDER / "s.sqlite", mode="rw"), provider.specs, "state")
    ask = lambda i: tools.start(Task("t", "", "train", (), (), ((),)), i).execute(ToolCall.of("slow", x=1), 0)
    print("ready", flush=True)
    sys.stdin.readline()
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    print("done", flush=True)
"""


def asking(folder, seconds):
    program = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(folder), str(seconds)]
    return subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_4_processes_of_16_threads_one_execution_and_a_dead_one_holds_nobody_up(tmp_path):
    children = [asking(tmp_path, 0.5) for _ in range(4)]
    dying = asking(tmp_path, 60)
    for child in (*children, dying):
        assert child.stdout.readline() == "ready\n"
    dying.stdin.write("\n")
    dying.stdin.flush()
    while not (tmp_path / "ran").exists():
        time.sleep(0.01)
    for child in children:  # they wait for the one that will die
        child.stdin.write("\n")
        child.stdin.flush()
    time.sleep(0.2)
    assert (tmp_path / "ran").read_text() == "1"
    dying.send_signal(signal.SIGKILL)
    for child in children:
        out, _ = child.communicate(timeout=60)
        assert out == "done\n"
    dying.communicate()
    assert (tmp_path / "ran").read_text() == "11"  # the dead one's, and one of all others
    with SQLiteStore(tmp_path / "s.sqlite", mode="r") as store:
        assert [e.count for e in store.entries()] == [1]


# ---- in bulk ---------------------------------------------------------------------------------------------------------


def write_lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(call, **more):
    return {"name": call.name, "arguments": call.parsed(), **more}


def test_a_file_of_calls_and_what_becomes_of_each(bank, tmp_path):
    store = MemoryStore()
    rows = [row(rate(c)) for c in ("EUR", "USD", "EUR", "none", "busy", "bug")] + [row(c, episode="e") for c in (pay(10), BALANCE)]
    rows += [row(ToolCall.of("rate")), row(ToolCall.of("nope")), "{", '{"name": "rate"}', ""]
    rows.append({"function": {"name": "balance", "arguments": "{}"}})
    path = write_lines(tmp_path / "calls.jsonl", rows)
    first = record_calls(bank.tools(), path, store, workers=4)
    problems = first.pop("problems")
    assert first == {
        "calls": 11, "before": 0, "recorded": 6, "reused": 1, "errors": 1, "transient": 1, "refused": 2, "failed": 1,
        "malformed": 2,
    }  # fmt: skip
    assert [p.split(": ", 1)[0] for p in problems if p.startswith("calls")] == ["calls.jsonl:11", "calls.jsonl:12"]
    assert any("ZeroDivisionError: oops" in p for p in problems) and len(problems) == 5
    assert store.metadata()["key"] == "state" and "balance" in store.metadata()["tools"]
    ran = dict(bank.ran)
    second = record_calls(bank.tools(), path, store, workers=4)
    assert (second["before"], second["recorded"], second["transient"], second["failed"]) == (7, 0, 1, 1)
    assert bank.ran - Counter(ran) == {"rate": 2}  # what failed is tried again, nothing else
    with pytest.raises(StoreError, match="'state', not 'raw'"):
        record_calls(bank.tools(), path, store, mode="raw")
    with pytest.raises(FileNotFoundError):
        record_calls(bank.tools(), tmp_path / "absent", store)


def test_equal_calls_without_an_episode_keep_their_names_when_lines_move(tmp_path):
    one = write_lines(tmp_path / "a", [row(rate("EUR")), row(pay(1)), row(pay(1))])
    two = write_lines(tmp_path / "b", [row(pay(1)), row(rate("USD")), row(pay(1)), row(rate("EUR"))])
    names = [{e.name for e in read_calls(path)[0]} for path in (one, two)]
    assert len(names[0]) == 3 and names[0] < names[1]


BULK = """
    import sys, time
    from pathlib import Path
    from cacherl_jax.cache.recorder import record_calls
    from cacherl_jax.cache.store import SQLiteStore
    from cacherl_jax.tools.functions import FunctionTools, tool

    FOLDER = Path(sys.argv[1])

    @tool(reads="n", writes="n", state=True)
    def add(total: dict, x: int) -> int:
        time.sleep(0.01)
        total["n"] += x
        return total["n"]

    provider = FunctionTools([add], state=lambda: {"n": 0})
    with SQLiteStore(FOLDER / "s.sqlite", mode="rw") as store:
        print(record_calls(provider, FOLDER / "calls", store, workers=4)["before"], flush=True)
"""


def test_a_killed_recording_goes_on_where_it_stopped(tmp_path):
    rows = [{"name": "add", "arguments": {"x": 1 + i % 3}, "episode": f"e{i // 5}"} for i in range(100)]
    write_lines(tmp_path / "calls", rows)
    program = [sys.executable, "-c", textwrap.dedent(BULK), str(tmp_path)]
    child = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "s.sqlite").exists() or len(recorded(tmp_path)) < 30:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    before = len(recorded(tmp_path))
    assert 30 <= before < 100
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0  # whole episodes were not run again
    assert Counter(r.episode for r in recorded(tmp_path)) == {f"e{i}": 5 for i in range(20)}  # none lost, none twice
    for episode in range(20):
        results = [int(r.result.content) for r in recorded(tmp_path) if r.episode == f"e{episode}"]
        assert results == [sum(1 + i % 3 for i in range(5 * episode, 5 * episode + k)) for k in range(1, 6)]


def recorded(folder: Path):
    try:
        with SQLiteStore(folder / "s.sqlite", mode="r") as store:
            return list(store.recordings())
    except StoreError:  # not all of it is there yet
        return []
