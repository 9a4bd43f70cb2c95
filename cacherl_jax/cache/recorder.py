"""Recording from live tools into a store, each answer with its time: episode by episode, or a file of calls in bulk.

A call is asked of its tool once, however many threads and processes want it (single flight). That holds for tools that only
answer: calls that write, that are stochastic or depend on the time, and calls of unlabelled tools run each time, in their
episode's live session. Stored are answers and the errors that a tool itself gives (a negative result). What passes is not:
a timeout, a rate limit, a lost connection go back to the caller as typed errors and leave no trace in the store. After a
write whose outcome is unknown nothing more of its episode is stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cacherl_jax.cache.imports import describe
from cacherl_jax.cache.key import KeyMode, Write, call_key
from cacherl_jax.cache.lookup import stored_form, write_of
from cacherl_jax.cache.redact import redact_call, redact_result
from cacherl_jax.cache.store import Recording, Store, StoreError
from cacherl_jax.tools.functions import FunctionTools, load_tools
from cacherl_jax.tools.registry import check_call, error_result, specs_from_json
from cacherl_jax.tools.threads import in_thread
from cacherl_jax.types import Kind, Message, Observation, Task, Tier, ToolCall, ToolProvider, ToolResult, ToolSession, ToolSpec

# Errors of the way to a tool, not of the tool. A tool raises ToolError with one of these kinds to say that it may be asked again.
TRANSIENT = frozenset({"timeout", "rate_limit", "connection"})
Done = Mapping[tuple[str, bytes], list[ToolResult]]  # (episode, key) -> results that a store holds already


def repeatable(spec: ToolSpec | None, mode: KeyMode) -> bool:
    """Whether a stored answer stands for another execution: the key says all that the answer depends on."""
    if spec is None or spec.effects.writes or spec.effects.stochastic or spec.effects.time_dependent:
        return False
    return mode == "state" or not spec.effects.reads


class RecordingTools:
    """The tools of `provider`, whose answers are stored as they come. timeout: seconds a call may take, None for no limit."""

    blocking = True

    def __init__(
        self,
        provider: ToolProvider,
        store: Store,
        specs: Mapping[str, ToolSpec],
        mode: KeyMode,
        *,
        timeout: float | None = None,
        clock: Callable[[], float] = time.time,
        done: Done | None = None,
    ) -> None:
        self.store, self.specs = store, specs
        self.mode: KeyMode = mode
        self._provider, self._timeout, self._clock = provider, timeout, clock
        self._left = Counter({place: len(results) for place, results in (done or {}).items()})  # not to be stored again
        self._lock = threading.Lock()

    def start(self, task: Task, sample: int) -> RecordingSession:
        return self.session(f"{task.id}/{sample}", self._provider.start(task, sample))

    def session(self, episode: str, live: ToolSession) -> RecordingSession:
        return RecordingSession(self, episode, live)

    def ask(self, live: ToolSession, call: ToolCall, index: int) -> Observation:
        """The tool's own answer; a failure on the way to it is a typed error."""
        try:
            if self._timeout is None:
                return live.execute(call, index)
            return in_thread(lambda: live.execute(call, index)).result(self._timeout)
        except TimeoutError:
            result = error_result("timeout", f"{call.name} gave no answer in {self._timeout or 0:g} s")
        except ConnectionError as error:
            result = error_result("connection", str(error)[:120])
        return Observation(call, result, Tier.LIVE, Kind.LIVE)

    def keep(self, recording: Recording) -> None:
        place = (recording.episode, recording.key)
        with self._lock:
            if self._left[place] > 0:
                self._left[place] -= 1
                return
        self.store.add(recording)

    def now(self) -> float:
        return self._clock()


class RecordingSession:
    """One episode on live tools."""

    def __init__(self, tools: RecordingTools, episode: str, live: ToolSession) -> None:
        self._tools, self._episode, self._live = tools, episode, live
        self._earlier: list[Write] = []
        self._doubtful = False  # whether an earlier write took place is unknown

    def execute(self, call: ToolCall, index: int) -> Observation:
        tools, spec = self._tools, self._tools.specs.get(call.name)
        asked = redact_call(call)
        key = call_key(asked, spec, tools.mode, self._earlier)
        if repeatable(spec, tools.mode) and not self._doubtful:
            return _single_flight(tools.store, key, call, lambda: self._run(call, index, asked, key))
        observation = self._run(call, index, asked, key)
        if observation.result.error in TRANSIENT and (spec is None or spec.effects.writes):
            self._doubtful = True
        self._earlier += write_of(asked, spec, observation.result)
        return observation

    def _run(self, call: ToolCall, index: int, asked: ToolCall, key: bytes) -> Observation:
        tools = self._tools
        observation = tools.ask(self._live, call, index)
        if observation.result.error not in TRANSIENT and not self._doubtful:
            arguments, writes = stored_form(asked, tools.specs.get(call.name), tools.mode, self._earlier)
            result = redact_result(observation.result)
            tools.keep(Recording(key, call.name, arguments, writes, result, self._episode, Kind.RECORDED, tools.now()))
        return observation


# ---- single flight ---------------------------------------------------------------------------------------------------

_flights: dict[tuple[Any, bytes], Future[Observation]] = {}
_flights_lock = threading.Lock()
_lock_files: dict[Path, int] = {}


def _forget_flights() -> None:
    """A forked process has none of its parent's threads."""
    global _flights_lock
    _flights.clear()
    _flights_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_flights)


def _single_flight(store: Store, key: bytes, call: ToolCall, run: Callable[[], Observation]) -> Observation:
    """The stored answer of a key, or that of the one execution that all who ask meanwhile wait for."""
    if (found := _stored(store, key, call)) is not None:
        return found
    path: Path | None = getattr(store, "path", None)
    name = (path.resolve() if path else id(store), key)
    with _flights_lock:
        flight = _flights.get(name)
        if first := flight is None:
            flight = _flights[name] = Future()
    if not first:
        answer = flight.result()
        return _stored(store, key, call) or replace(answer, call=call)
    try:
        with _claimed(path, key) if path else contextlib.nullcontext():
            answer = _stored(store, key, call) or run()
        flight.set_result(answer)
        return answer
    except BaseException as error:
        flight.set_exception(error)
        raise
    finally:
        with _flights_lock:
            _flights.pop(name, None)


def _stored(store: Store, key: bytes, call: ToolCall) -> Observation | None:
    entries = store.get(key)
    return Observation(call, entries[0].result, Tier.EXACT, entries[0].kind, entry=entries[0].hash) if entries else None


@contextlib.contextmanager
def _claimed(path: Path, key: bytes) -> Iterator[None]:
    """Holds a key against other processes: a lock on one byte of the file STORE.lock, which ends with its process.

    Waits by asking again: where several threads wait, a blocking lock would take two processes for deadlocked.
    """
    import fcntl

    with _flights_lock:
        file = path.resolve().with_name(path.name + ".lock")
        if file not in _lock_files:  # one descriptor a process: closing any would end all its locks
            _lock_files[file] = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        descriptor = _lock_files[file]
    place, pause = int.from_bytes(key[:7], "big"), 0.002
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            break
        except (BlockingIOError, PermissionError):
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
    try:
        yield
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, place)


# ---- in bulk ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Episode:
    """Calls to be made one after the other in one live session."""

    name: str
    calls: tuple[ToolCall, ...]


def read_calls(path: Path) -> tuple[list[Episode], list[str]]:
    """The episodes of a JSON Lines file, and a line "FILE:LINE: reason" for each that cannot be read.

    A line is a call, {"name": ..., "arguments": {...}} or OpenAI's form with "function"; calls with the same "episode" are
    made in order in one session, others each in its own, named by the call. Raises FileNotFoundError.
    """
    episodes: dict[str, list[ToolCall]] = {}
    repeats: Counter[str] = Counter()
    problems = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            (call,) = Message.from_json({"role": "assistant", "tool_calls": [row]}).tool_calls
            name = row.get("episode")
            if name is None:
                alone = hashlib.sha256(f"{call.name} {call.arguments}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
                repeats[alone] += 1
                name = f"{alone}/{repeats[alone]}"
            episodes.setdefault(str(name), []).append(call)
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            problems.append(f"{path.name}:{number}: {error}")
    return [Episode(name, tuple(calls)) for name, calls in episodes.items()], problems


def record_calls(
    tools: str | FunctionTools,
    calls: Path,
    store: Store,
    *,
    mode: KeyMode = "state",
    workers: int = 8,
    timeout: float | None = 30.0,
    provenance: Mapping[str, str] | None = None,
    progress: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Makes the calls of a file on live tools and stores the answers; run again, it goes on where it was stopped.

    tools: a FunctionTools or its path, "package.module:NAME". workers: episodes at a time. timeout: seconds a call.
    progress: makes the bar, as metrics.progress_factory does. provenance: source and licence, kept in the store.
    Counts: calls in the file; before: answered by an earlier run; recorded; reused: answered by another recorded call;
    errors: those recorded that are the tool's errors; transient: to be tried again by another run; refused: against the
    tool's schema; failed: the tool broke; malformed lines. problems: a line for each of the last three.
    Raises StoreError for a store that is frozen or keyed otherwise, ValueError for a path that leads to no tools.
    """
    provider = load_tools(tools) if isinstance(tools, str) else tools
    episodes, problems = read_calls(calls)
    metadata = store.metadata()
    if metadata.get("key", mode) != mode:
        raise StoreError(f"the store's keys are {metadata['key']!r}, not {mode!r}; record into another store")
    known = specs_from_json(json.loads(metadata.get("tools", "[]")))
    describe(store, known | provider.specs, mode, provenance or {})
    counts = Counter(calls=sum(len(e.calls) for e in episodes), malformed=len(problems))
    episodes, refusals = _accepted(episodes, provider.specs)
    counts["refused"] = len(refusals)
    done = _done(store, episodes)
    recording = RecordingTools(provider, store, provider.specs, mode, timeout=timeout, done=done)
    missing = [episode for episode in episodes if not _answered(episode, recording, done)]
    counts["before"] = counts["calls"] - counts["refused"] - sum(len(e.calls) for e in missing)
    problems += refusals
    bar = progress(total=sum(len(e.calls) for e in missing), desc="record") if progress else contextlib.nullcontext()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="record")
    try:
        with bar as shown:
            for future in as_completed([pool.submit(_make, e, recording, provider) for e in missing]):
                made, said = future.result()
                counts += made
                problems += said
                if shown is not None:
                    shown.update(sum(made[name] for name in ("recorded", "reused", "transient", "failed")))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    names = ("calls", "before", "recorded", "reused", "errors", "transient", "refused", "failed", "malformed")
    return {name: counts[name] for name in names} | {"problems": sorted(problems)}


def _accepted(episodes: Sequence[Episode], specs: Mapping[str, ToolSpec]) -> tuple[list[Episode], list[str]]:
    """The episodes without the calls that no tool's schema admits, and a line for each of those."""
    refusals = {(e.name, i): r for e in episodes for i, c in enumerate(e.calls) if (r := check_call(specs, c)) is not None}
    kept = [Episode(e.name, tuple(c for i, c in enumerate(e.calls) if (e.name, i) not in refusals)) for e in episodes]
    return kept, [f"{name}: {result.content}" for (name, _), result in refusals.items()]


def _done(store: Store, episodes: Sequence[Episode]) -> Done:
    names = {episode.name for episode in episodes}
    done: dict[tuple[str, bytes], list[ToolResult]] = defaultdict(list)
    for r in store.recordings():
        if r.episode in names:
            done[r.episode, r.key].append(r.result)
    return dict(done)


def _answered(episode: Episode, recording: RecordingTools, done: Done) -> bool:
    """Whether the store holds an answer to every call of an episode."""
    earlier: list[Write] = []
    used: Counter[bytes] = Counter()
    for call in map(redact_call, episode.calls):
        spec = recording.specs.get(call.name)
        key = call_key(call, spec, recording.mode, earlier)
        if repeatable(spec, recording.mode):
            if not recording.store.get(key):
                return False
            continue
        results = done.get((episode.name, key), [])
        if used[key] == len(results):
            return False
        earlier += write_of(call, spec, results[used[key]])
        used[key] += 1
    return True


def _make(episode: Episode, recording: RecordingTools, provider: FunctionTools) -> tuple[Counter[str], list[str]]:
    counts: Counter[str] = Counter()
    session = recording.session(episode.name, provider.start(None, 0))
    for index, call in enumerate(episode.calls):
        try:
            observation = session.execute(call, index)
        except StoreError:
            raise
        except Exception as error:  # a broken tool costs its episode, not the run
            counts["failed"] += 1
            return counts, [f"{episode.name}: {call.name} broke: {type(error).__name__}: {error}"]
        if observation.result.error in TRANSIENT:
            counts["transient"] += 1
        elif observation.tier is Tier.EXACT:
            counts["reused"] += 1
        else:
            counts["recorded"] += 1
            counts["errors"] += observation.result.error is not None
    return counts, []
