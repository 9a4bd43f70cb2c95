"""Where recorded results live: entries by key, several results a key with their counts. Two stores, one contract.

A store is open (it takes recordings) or frozen (a snapshot: see snapshot.py), which every change is refused to. Both stores
may be used by several threads; an SQLite store also by several processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from cacherl_jax.cache.entries import Entry, Recording, content_digest
from cacherl_jax.types import Kind, ToolResult

SCHEMA_VERSION = 2
# How long a writer waits for the others, in seconds. A bulk import holds the store for as long as it runs.
BUSY_SECONDS = 120.0


class StoreError(RuntimeError):
    """A store that cannot be used or changed as asked: another version, damaged, absent, locked or frozen."""


class Store(Protocol):
    """What the cache needs of a store. Changes to a frozen store raise StoreError."""

    def add(self, recording: Recording) -> None:
        """Counts one observation; its result becomes an entry of the key unless it is one. Kept when this returns, or with
        the transaction around it."""
        ...

    def get(self, key: bytes) -> list[Entry]:
        """All results of a key, most frequent first; ties in order of arrival."""
        ...

    def of_tool(self, tool: str) -> list[Entry]:
        """All entries of a tool, ordered by hash."""
        ...

    def entries(self) -> Iterator[Entry]:
        """Every entry, in order of arrival."""
        ...

    def recordings(self) -> Iterator[Recording]:
        """Every observation, in order of arrival."""
        ...

    def metadata(self) -> dict[str, str]:
        """What is known of the store as a whole: key (mode), source, licence, rules, fidelity; of a snapshot also snapshot
        (its id) and taken_at (Unix seconds)."""
        ...

    def set_metadata(self, name: str, value: str) -> None:
        """Naming its "snapshot" freezes the store."""
        ...

    def set_aside(self, entry: Entry, reason: str) -> None:
        """Quarantines an entry: it and its recordings, later ones included, are in the store but in no answer of it."""
        ...

    def restore(self, entry: Entry) -> None:
        """Takes an entry out of quarantine."""
        ...

    def quarantined(self) -> list[tuple[Entry, str]]:
        """The entries set aside and why, in order of arrival."""
        ...

    def transaction(self) -> AbstractContextManager[Any]:
        """Everything changed inside is kept together or, on an exception, not at all."""
        ...

    def reading(self) -> AbstractContextManager[Any]:
        """Everything read inside is of one moment, whatever others write."""
        ...


def _ranked(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda e: (-e.count, e.first)) if len(entries) > 1 else entries


def _refuse_frozen(name: object, snapshot: str | None) -> None:
    if snapshot is not None:
        raise StoreError(
            f"store {name} is the frozen snapshot {snapshot[:12]}; change the store it was taken from, then take another"
        )


def _age(recorded_at: float | None, taken_at: float | None) -> float | None:
    return None if recorded_at is None or taken_at is None else max(0.0, taken_at - recorded_at)


class MemoryStore:
    """A store in this process."""

    def __init__(self) -> None:
        self._by_key: dict[bytes, dict[bytes, Entry]] = {}
        self._recordings: list[tuple[bytes, bytes, str, float | None]] = []  # key, digest, episode, recorded_at
        self._metadata: dict[str, str] = {}
        self._aside: dict[tuple[bytes, bytes], str] = {}  # (key, digest) -> reason
        self._lock = threading.RLock()

    def add(self, recording: Recording) -> None:
        r = recording
        digest = content_digest(r.kind, r.result)
        with self._lock:
            _refuse_frozen("in memory", self._metadata.get("snapshot"))
            results = self._by_key.setdefault(r.key, {})
            old = results.get(digest)
            if old is None:
                first = len(self._recordings)
                results[digest] = Entry(r.key, r.tool, r.arguments, r.writes, r.result, r.kind, 1, r.recorded_at, first)
            else:
                newest = max((t for t in (r.recorded_at, old.recorded_at) if t is not None), default=None)
                results[digest] = dataclasses.replace(old, count=old.count + 1, recorded_at=newest)
            self._recordings.append((r.key, digest, r.episode, r.recorded_at))

    def _shown(self, entry: Entry) -> Entry:
        taken_at = self._metadata.get("taken_at")
        return entry if taken_at is None else dataclasses.replace(entry, age=_age(entry.recorded_at, float(taken_at)))

    def get(self, key: bytes) -> list[Entry]:
        results = self._by_key.get(key, {})
        return _ranked([self._shown(e) for digest, e in results.items() if (key, digest) not in self._aside])

    def of_tool(self, tool: str) -> list[Entry]:
        return sorted((e for e in self.entries() if e.tool == tool), key=lambda e: e.hash)

    def entries(self) -> Iterator[Entry]:
        with self._lock:
            found = [e for key, results in self._by_key.items() for d, e in results.items() if (key, d) not in self._aside]
        return map(self._shown, sorted(found, key=lambda e: e.first))

    def recordings(self) -> Iterator[Recording]:
        for key, digest, episode, recorded_at in list(self._recordings):
            if (key, digest) not in self._aside:
                e = self._by_key[key][digest]
                yield Recording(key, e.tool, e.arguments, e.writes, e.result, episode, e.kind, recorded_at)

    def metadata(self) -> dict[str, str]:
        return dict(self._metadata)

    def set_metadata(self, name: str, value: str) -> None:
        _refuse_frozen("in memory", self._metadata.get("snapshot"))
        self._metadata[name] = value

    def set_aside(self, entry: Entry, reason: str) -> None:
        _refuse_frozen("in memory", self._metadata.get("snapshot"))
        self._aside[entry.key, content_digest(entry.kind, entry.result)] = reason

    def restore(self, entry: Entry) -> None:
        _refuse_frozen("in memory", self._metadata.get("snapshot"))
        self._aside.pop((entry.key, content_digest(entry.kind, entry.result)), None)

    def quarantined(self) -> list[tuple[Entry, str]]:
        found = [(self._by_key[key][digest], reason) for (key, digest), reason in self._aside.items()]
        return sorted(found, key=lambda pair: pair[0].first)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        with self._lock:
            by_key = {key: dict(results) for key, results in self._by_key.items()}
            before = by_key, list(self._recordings), dict(self._metadata), dict(self._aside)
            try:
                yield
            except BaseException:
                self._by_key, self._recordings, self._metadata, self._aside = before
                raise

    def reading(self) -> AbstractContextManager[Any]:
        return self._lock


_SCHEMA = (
    "CREATE TABLE metadata (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    # A text with lone surrogates is no UTF-8: it is kept as a blob of surrogatepass bytes. quarantine: why set aside.
    "CREATE TABLE entries (first INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL, digest BLOB NOT NULL,"
    " count INTEGER NOT NULL, recorded_at REAL, kind TEXT NOT NULL, quarantine TEXT, tool TEXT NOT NULL,"
    " arguments TEXT NOT NULL, writes TEXT NOT NULL, error TEXT, content TEXT NOT NULL, UNIQUE (key, digest))",
    "CREATE INDEX entries_of_tool ON entries (tool)",
    "CREATE TABLE recordings (entry INTEGER NOT NULL REFERENCES entries (first), episode TEXT NOT NULL, recorded_at REAL)",
)
_COLUMNS = "key, tool, arguments, writes, content, error, kind, count, recorded_at, first"
_KINDS = {kind.value: kind for kind in Kind}


class SQLiteStore:
    """A store in one file, in WAL mode: writers take turns, readers never wait, nothing acknowledged is lost.

    mode "rw" creates the file where absent; "r" refuses to write and to create. Raises StoreError for a file that is no
    store, was cut, or has another schema version; the file is left as it is.
    """

    def __init__(self, path: Path, mode: str) -> None:
        self.path, self._mode = path, mode
        self._snapshot: str | None = None
        self._taken_at: float | None = None
        self._lock = threading.RLock()
        if mode == "r" and not path.is_file():
            raise StoreError(f"store {path} does not exist; record or import one first")
        try:
            self._db = sqlite3.connect(
                f"{path.resolve().as_uri()}?mode={'ro' if mode == 'r' else 'rwc'}",
                uri=True,
                timeout=BUSY_SECONDS,
                isolation_level=None,  # transactions are opened by hand
                check_same_thread=False,  # the lock keeps threads apart
            )
        except sqlite3.OperationalError as error:
            raise StoreError(f"store {path} cannot be opened ({error})") from error
        try:
            self._open_in_turn(mode)
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise StoreError(f"store {path} is damaged or no store at all ({error}); the file was not changed") from error
        except StoreError:
            self._db.close()
            raise

    def _open_in_turn(self, mode: str) -> None:
        # Where several processes create a store at once, SQLite refuses all but one without waiting.
        until = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                return self._open(mode)
            except sqlite3.OperationalError as error:
                if not getattr(error, "sqlite_errorname", "").startswith("SQLITE_BUSY") or time.monotonic() > until:
                    raise
            time.sleep(0.01)

    def _tables(self) -> set[str]:
        return {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}

    def _open(self, mode: str) -> None:
        self._db.execute("PRAGMA synchronous = FULL")  # some builds of SQLite trade power loss for speed
        if mode == "rw" and not self._tables():
            self._db.execute("PRAGMA journal_mode = WAL")
            with self.transaction():
                if not self._tables():  # another process may have been faster
                    for statement in _SCHEMA:
                        self._db.execute(statement)
                    self._db.execute("INSERT INTO metadata VALUES ('schema_version', ?)", (str(SCHEMA_VERSION),))
        if "metadata" not in self._tables():
            raise StoreError(f"{self.path} is an SQLite file but no store of cacherl")
        row = self._db.execute("SELECT value FROM metadata WHERE name = 'schema_version'").fetchone()
        if row != (str(SCHEMA_VERSION),):
            raise StoreError(
                f"store {self.path} has schema version {row and row[0]}, this program reads {SCHEMA_VERSION}; "
                "record or import it anew"
            )
        (state,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise StoreError(f"store {self.path} is damaged ({state}); the file was not changed")
        self._read_snapshot()

    def _read_snapshot(self) -> None:
        metadata = self.metadata()
        self._snapshot = metadata.get("snapshot")
        self._taken_at = float(metadata["taken_at"]) if "taken_at" in metadata else None

    def __enter__(self) -> SQLiteStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def to_single_file(self) -> None:
        """Leaves WAL mode: the file can be copied, and read from where nothing can be written."""
        self._db.execute("PRAGMA journal_mode = DELETE")

    @contextlib.contextmanager
    def _between(self, begin: str) -> Iterator[None]:
        """A transaction; inside another one, a part of it that can fail alone."""
        with self._lock:
            inside = self._db.in_transaction
            try:
                self._db.execute("SAVEPOINT part" if inside else begin)
            except sqlite3.OperationalError as error:
                raise StoreError(f"store {self.path} cannot be changed now ({error}); is another program writing?") from error
            try:
                yield
                self._db.execute("RELEASE part" if inside else "COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK TO part" if inside else "ROLLBACK")
                self._read_snapshot()
                raise

    def transaction(self) -> AbstractContextManager[None]:
        return self._between("BEGIN IMMEDIATE")

    def reading(self) -> AbstractContextManager[None]:
        return self._between("BEGIN")

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        if self._mode == "r":
            raise StoreError(f"store {self.path} was opened to be read; nothing is written")
        _refuse_frozen(self.path, self._snapshot)
        with self.transaction():
            yield

    def set_metadata(self, name: str, value: str) -> None:
        with self._change():
            self._db.execute("INSERT OR REPLACE INTO metadata VALUES (?, ?)", (name, value))
            if name in ("snapshot", "taken_at"):
                self._read_snapshot()

    def metadata(self) -> dict[str, str]:
        return dict(self._db.execute("SELECT name, value FROM metadata WHERE name != 'schema_version'"))

    def add(self, recording: Recording) -> None:
        r = recording
        texts = [_stored(text) for text in (r.tool, r.arguments, r.writes, r.result.error, r.result.content)]
        digest = content_digest(r.kind, r.result)
        with self._change():  # an entry and its recording are written together
            (entry,) = self._db.execute(
                "INSERT INTO entries (key, digest, count, recorded_at, kind, tool, arguments, writes, error, content)"
                " VALUES (?, ?, 1, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key, digest) DO UPDATE SET count = count + 1,"
                " recorded_at = max(ifnull(recorded_at, excluded.recorded_at), ifnull(excluded.recorded_at, recorded_at))"
                " RETURNING first",
                (r.key, digest, r.recorded_at, r.kind.value, *texts),
            ).fetchone()
            self._db.execute("INSERT INTO recordings VALUES (?, ?, ?)", (entry, _stored(r.episode), r.recorded_at))

    def _entries(self, condition: str, *values: Any) -> sqlite3.Cursor:
        return self._db.execute(f"SELECT {_COLUMNS} FROM entries WHERE {condition}", values)

    def get(self, key: bytes) -> list[Entry]:
        return _ranked([self._entry(row) for row in self._entries("key = ? AND quarantine IS NULL", key).fetchall()])

    def of_tool(self, tool: str) -> list[Entry]:
        rows = self._entries("tool = ? AND quarantine IS NULL", _stored(tool))
        return sorted((self._entry(row) for row in rows), key=lambda e: e.hash)

    def entries(self) -> Iterator[Entry]:
        return map(self._entry, self._entries("quarantine IS NULL ORDER BY first"))

    def _entry(self, row: tuple) -> Entry:
        key, tool, arguments, writes, content, error, kind, count, recorded_at, first = row
        if bytes in (type(tool), type(arguments), type(writes), type(content), type(error)):
            tool, arguments, writes, content, error = map(_text, (tool, arguments, writes, content, error))
        age = _age(recorded_at, self._taken_at)
        return Entry(key, tool, arguments, writes, ToolResult(content, error), _KINDS[kind], count, recorded_at, first, age)

    def recordings(self) -> Iterator[Recording]:
        rows = self._db.execute(
            "SELECT key, tool, arguments, writes, content, error, episode, kind, recordings.recorded_at"
            " FROM recordings JOIN entries ON entry = first WHERE quarantine IS NULL ORDER BY recordings.rowid"
        )
        for key, *texts, kind, recorded_at in rows:
            tool, arguments, writes, content, error, episode = map(_text, texts)
            yield Recording(key, tool, arguments, writes, ToolResult(content, error), episode, _KINDS[kind], recorded_at)

    def _set_quarantine(self, entry: Entry, reason: str | None) -> None:
        with self._change():
            digest = content_digest(entry.kind, entry.result)
            self._db.execute("UPDATE entries SET quarantine = ? WHERE key = ? AND digest = ?", (reason, entry.key, digest))

    def set_aside(self, entry: Entry, reason: str) -> None:
        self._set_quarantine(entry, reason)

    def restore(self, entry: Entry) -> None:
        self._set_quarantine(entry, None)

    def quarantined(self) -> list[tuple[Entry, str]]:
        rows = self._db.execute(f"SELECT quarantine, {_COLUMNS} FROM entries WHERE quarantine NOT NULL ORDER BY first")
        return [(self._entry(row[1:]), row[0]) for row in rows]


def _stored(text: str | None) -> str | bytes | None:
    """The text as SQLite takes it."""
    if text is None or text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
    return text


def _text(stored: str | bytes | None) -> Any:
    return stored.decode("utf-8", "surrogatepass") if isinstance(stored, bytes) else stored
