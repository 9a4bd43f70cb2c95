"""Where recorded results live: entries by key, several results a key with their counts. Two stores, one contract.

A snapshot id names content alone: neither time nor the order of insertion changes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cacherl_jax.types import Kind, ToolResult

SCHEMA_VERSION = 2


class StoreError(RuntimeError):
    """A store that cannot be used: another version, damaged, or absent."""


@dataclass(frozen=True)
class Recording:
    """One answered call as it was observed: what fills a store, and what rules and fidelities are learnt from.

    episode: the dialogue or run it is from. recorded_at: Unix seconds, None where the corpus does not say.
    """

    key: bytes
    tool: str
    arguments: str  # canonical, or as recorded in a raw store
    writes: str  # the relevant earlier writes, one a line; "" for none
    result: ToolResult
    episode: str = ""
    kind: Kind = Kind.RECORDED
    recorded_at: float | None = None


@dataclass(frozen=True)
class Entry:
    """One result of one key, with what all its recordings say. count: their number. recorded_at: of the newest.
    first: the entry's rank of arrival in the store."""

    key: bytes
    tool: str
    arguments: str
    writes: str
    result: ToolResult
    kind: Kind
    count: int
    recorded_at: float | None
    first: int

    @property
    def hash(self) -> str:
        """Names the entry by content: key, kind, result, error."""
        return hashlib.sha256(self.key + content_digest(self.kind, self.result)).hexdigest()


def content_digest(kind: Kind, result: ToolResult) -> bytes:
    """SHA-256 of what was answered."""
    # surrogatepass: payloads with lone surrogates are recorded data, not ours to refuse.
    return hashlib.sha256(f"{kind}\n{result.error or ''}\n{result.content}".encode("utf-8", "surrogatepass")).digest()


class Store(Protocol):
    """What the cache needs of a store."""

    def add(self, recording: Recording) -> None:
        """Counts one observation; its result becomes an entry of the key unless it is one."""
        ...

    def get(self, key: bytes) -> list[Entry]:
        """All results of a key, most frequent first; ties in order of arrival."""
        ...

    def of_tool(self, tool: str) -> list[Entry]:
        """All entries of a tool, ordered by hash."""
        ...

    def entries(self) -> Iterator[Entry]: ...

    def recordings(self) -> Iterator[Recording]:
        """Every observation, in order of arrival."""
        ...

    def metadata(self) -> dict[str, str]:
        """What is known of the store as a whole: key mode, source, licence, fitted rules."""
        ...

    def set_metadata(self, name: str, value: str) -> None: ...


def snapshot_id(store: Store) -> str:
    """SHA-256 over the sorted content of all entries."""
    lines = sorted(
        hashlib.sha256(
            b"\0".join([e.key, e.tool.encode("utf-8", "surrogatepass"), content_digest(e.kind, e.result), b"%d" % e.count])
        ).digest()
        for e in store.entries()
    )
    return hashlib.sha256(b"".join(lines)).hexdigest()


def _ranked(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda e: (-e.count, e.first))


class MemoryStore:
    """A store in this process."""

    def __init__(self) -> None:
        self._by_key: dict[bytes, dict[bytes, Entry]] = {}
        self._recordings: list[Recording] = []
        self._metadata: dict[str, str] = {}

    def add(self, recording: Recording) -> None:
        r = recording
        results = self._by_key.setdefault(r.key, {})
        digest = content_digest(r.kind, r.result)
        old = results.get(digest)
        count, first = (old.count + 1, old.first) if old else (1, len(self._recordings))
        newest = max((t for t in (r.recorded_at, old and old.recorded_at) if t is not None), default=None)
        results[digest] = Entry(r.key, r.tool, r.arguments, r.writes, r.result, r.kind, count, newest, first)
        self._recordings.append(r)

    def get(self, key: bytes) -> list[Entry]:
        return _ranked(list(self._by_key.get(key, {}).values()))

    def of_tool(self, tool: str) -> list[Entry]:
        return sorted((e for e in self.entries() if e.tool == tool), key=lambda e: e.hash)

    def entries(self) -> Iterator[Entry]:
        for results in self._by_key.values():
            yield from results.values()

    def recordings(self) -> Iterator[Recording]:
        return iter(self._recordings)

    def metadata(self) -> dict[str, str]:
        return dict(self._metadata)

    def set_metadata(self, name: str, value: str) -> None:
        self._metadata[name] = value


_SCHEMA = """
CREATE TABLE IF NOT EXISTS metadata (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS entries (
    first INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL, digest BLOB NOT NULL, tool TEXT NOT NULL,
    arguments TEXT NOT NULL, writes TEXT NOT NULL, content TEXT NOT NULL, error TEXT, kind TEXT NOT NULL,
    count INTEGER NOT NULL, recorded_at REAL, UNIQUE (key, digest)
);
CREATE INDEX IF NOT EXISTS entries_of_tool ON entries (tool);
CREATE TABLE IF NOT EXISTS recordings (entry INTEGER NOT NULL REFERENCES entries (first), episode TEXT NOT NULL, recorded_at REAL);
"""
_COLUMNS = "key, tool, arguments, writes, content, error, kind, count, recorded_at, first"


class SQLiteStore:
    """A store in one file, in WAL mode: one writer and many readers, nothing acknowledged is lost.

    mode "rw" creates the file where absent; "r" refuses to write and to create. Raises StoreError for a file that is no
    store, was cut, or has another schema version; the file is left as it is.
    """

    def __init__(self, path: Path, mode: str) -> None:
        self.path = path
        if mode == "r" and not path.is_file():
            raise StoreError(f"store {path} does not exist; record or import one first")
        self._db = sqlite3.connect(f"file:{path.resolve()}?mode={'ro' if mode == 'r' else 'rwc'}", uri=True)
        self._db.text_factory = lambda raw: raw.decode("utf-8", "surrogatepass")
        self._db.isolation_level = None  # transactions are opened by hand
        try:
            self._open(mode)
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise StoreError(f"store {path} is damaged or no store at all ({error}); the file was not changed") from error
        except StoreError:
            self._db.close()
            raise

    def _open(self, mode: str) -> None:
        tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if mode == "rw" and not tables:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.executescript(_SCHEMA)
            self.set_metadata("schema_version", str(SCHEMA_VERSION))
        elif "metadata" not in tables:
            raise StoreError(f"{self.path} is an SQLite file but no store of cacherl")
        version = self.metadata().get("schema_version")
        if version != str(SCHEMA_VERSION):
            raise StoreError(
                f"store {self.path} has schema version {version}, this program reads {SCHEMA_VERSION}; record or import it anew"
            )
        (state,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise StoreError(f"store {self.path} is damaged ({state}); the file was not changed")

    def __enter__(self) -> SQLiteStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything added inside is kept together or, on an exception, not at all."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def set_metadata(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO metadata VALUES (?, ?)", (name, value))

    def metadata(self) -> dict[str, str]:
        return dict(self._db.execute("SELECT name, value FROM metadata"))

    def add(self, recording: Recording) -> None:
        # An entry and its recording are written together, by a transaction of their own unless one is open.
        with contextlib.nullcontext() if self._db.in_transaction else self.transaction():
            self._add(recording)

    def _add(self, r: Recording) -> None:
        texts = [t.encode("utf-8", "surrogatepass") for t in (r.tool, r.arguments, r.writes, r.result.content)]
        (entry,) = self._db.execute(
            "INSERT INTO entries (key, digest, tool, arguments, writes, content, error, kind, count, recorded_at)"
            " VALUES (?, ?, CAST(? AS TEXT), CAST(? AS TEXT), CAST(? AS TEXT), CAST(? AS TEXT), ?, ?, 1, ?)"
            " ON CONFLICT (key, digest) DO UPDATE SET count = count + 1,"
            " recorded_at = max(ifnull(recorded_at, excluded.recorded_at), ifnull(excluded.recorded_at, recorded_at))"
            " RETURNING first",
            (r.key, content_digest(r.kind, r.result), *texts, r.result.error, r.kind.value, r.recorded_at),
        ).fetchone()
        self._db.execute("INSERT INTO recordings VALUES (?, ?, ?)", (entry, r.episode, r.recorded_at))

    def get(self, key: bytes) -> list[Entry]:
        rows = self._db.execute(f"SELECT {_COLUMNS} FROM entries WHERE key = ?", (key,))
        return _ranked([_entry(row) for row in rows])

    def of_tool(self, tool: str) -> list[Entry]:
        rows = self._db.execute(f"SELECT {_COLUMNS} FROM entries WHERE tool = ?", (tool,))
        return sorted((_entry(row) for row in rows), key=lambda e: e.hash)

    def entries(self) -> Iterator[Entry]:
        for row in self._db.execute(f"SELECT {_COLUMNS} FROM entries ORDER BY first"):
            yield _entry(row)

    def recordings(self) -> Iterator[Recording]:
        rows = self._db.execute(
            "SELECT key, tool, arguments, writes, content, error, episode, kind, recordings.recorded_at"
            " FROM recordings JOIN entries ON entry = first ORDER BY recordings.rowid"
        )
        for key, tool, arguments, writes, content, error, episode, kind, recorded_at in rows:
            yield Recording(key, tool, arguments, writes, ToolResult(content, error), episode, Kind(kind), recorded_at)


def _entry(row: tuple) -> Entry:
    key, tool, arguments, writes, content, error, kind, count, recorded_at, first = row
    return Entry(key, tool, arguments, writes, ToolResult(content, error), Kind(kind), count, recorded_at, first)
