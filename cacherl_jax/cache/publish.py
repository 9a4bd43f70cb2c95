"""A store as files that others can read, cite and check: JSON Lines and a manifest, laid out as a Hugging Face dataset.

README.md          dataset card; its front matter names the licence, the files and the type of every column
entries.jsonl      one result of one key a line, in order of arrival
recordings.jsonl   one observation a line, in order of arrival: the entry's line number, the episode, the time
manifest.json      snapshot id, counts, metadata, SHA-256 of both files
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cacherl_jax.cache.entries import Entry, Recording, content_digest
from cacherl_jax.cache.snapshot import snapshot_id
from cacherl_jax.cache.store import Store, StoreError
from cacherl_jax.types import Kind, ToolResult

FORMAT_VERSION = 1
ENTRIES = {
    "key": "string", "tool": "string", "arguments": "string", "writes": "string", "content": "string", "error": "string",
    "kind": "string", "count": "int64", "recorded_at": "float64", "surrogates": "string",
}  # fmt: skip
RECORDINGS = {"entry": "int64", "episode": "string", "recorded_at": "float64", "surrogates": "string"}
# The hub's identifiers of licences that corpora of tool calls come with; others are written out.
HUB_LICENCES = {
    "apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "odc-by", "gpl-3.0", "unknown",
}  # fmt: skip


def export(store: Store, folder: Path) -> dict[str, Any]:
    """Writes a store, quarantined entries apart, to a new folder and returns its manifest. Source and licence are the
    store's metadata. Raises StoreError where the folder exists; nothing is left behind when it fails."""
    if folder.exists():
        raise StoreError(f"{folder} exists; a store is exported to a new folder")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        with store.reading():
            lines: dict[tuple[bytes, bytes], int] = {}
            tools = set()
            with _JsonLines(partial / "entries.jsonl") as out:
                for line, entry in enumerate(store.entries()):
                    lines[entry.key, content_digest(entry.kind, entry.result)] = line
                    tools.add(entry.tool)
                    out.write(_entry_row(entry))
            calls = 0
            with _JsonLines(partial / "recordings.jsonl") as out:
                for r in store.recordings():
                    calls += 1
                    line = lines[r.key, content_digest(r.kind, r.result)]
                    out.write({"entry": line, "episode": r.episode, "recorded_at": r.recorded_at})
            metadata = store.metadata()
            manifest = {
                "format": "cacherl store",
                "version": FORMAT_VERSION,
                "snapshot": snapshot_id(store),
                "key": metadata.get("key"),
                "source": metadata.get("source"),
                "licence": metadata.get("licence"),
                "counts": {"entries": len(lines), "recordings": calls, "tools": len(tools)},
                "files": {name: _sha256(partial / name) for name in ("entries.jsonl", "recordings.jsonl")},
                "metadata": metadata,
            }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(_card(manifest), encoding="utf-8")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def import_(folder: Path, store: Store) -> str:
    """Reads an exported folder into an empty store and returns its snapshot id. Of an exported snapshot the store becomes
    that snapshot, frozen, with the times of its recordings and its taking.

    Raises StoreError, with nothing written, for a folder without a manifest, files that differ from it, or a store in use.
    """
    manifest = _manifest(folder)
    for name, expected in manifest["files"].items():
        found = _sha256(folder / name) if (folder / name).is_file() else "no file"
        if found != expected:
            raise StoreError(f"{folder / name} is not the file that manifest.json names (SHA-256 {expected}, found {found})")
    with store.transaction():
        if next(store.entries(), None) is not None or store.quarantined():
            raise StoreError("an import needs an empty store; this one holds entries")
        try:
            entries = [_recording_of(row) for row in _rows(folder / "entries.jsonl")]
            for row in _rows(folder / "recordings.jsonl"):
                store.add(_observed(entries[row["entry"]], row["episode"], row["recorded_at"]))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise StoreError(f"{folder} cannot be read ({type(error).__name__}: {error})") from error
        # "snapshot" freezes the store and comes last.
        for name, value in sorted(manifest["metadata"].items(), key=lambda item: item[0] == "snapshot"):
            store.set_metadata(name, value)
        identity = snapshot_id(store)
        if identity != manifest["snapshot"]:
            raise StoreError(f"{folder} holds the snapshot {identity}, its manifest says {manifest['snapshot']}")
    return identity


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        form, version = manifest["format"], manifest["version"]
        complete = {*manifest["files"]} == {"entries.jsonl", "recordings.jsonl"} and isinstance(manifest["metadata"], dict)
        complete = complete and isinstance(manifest["snapshot"], str)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is no manifest of an exported store ({type(error).__name__}: {error})") from error
    if form != "cacherl store" or version != FORMAT_VERSION or not complete:
        raise StoreError(f"{path} has format {form!r}, version {version!r}; this program reads 'cacherl store', {FORMAT_VERSION}")
    return manifest


def _entry_row(e: Entry) -> dict[str, Any]:
    texts = {"key": e.key.hex(), "tool": e.tool, "arguments": e.arguments, "writes": e.writes, "content": e.result.content}
    return texts | {"error": e.result.error, "kind": e.kind.value, "count": e.count, "recorded_at": e.recorded_at}


def _recording_of(row: Mapping[str, Any]) -> Recording:
    result = ToolResult(row["content"], row["error"])
    return Recording(bytes.fromhex(row["key"]), row["tool"], row["arguments"], row["writes"], result, kind=Kind(row["kind"]))


def _observed(r: Recording, episode: str, recorded_at: float | None) -> Recording:
    return Recording(r.key, r.tool, r.arguments, r.writes, r.result, episode, r.kind, recorded_at)


@dataclass
class _JsonLines:
    """One JSON object a line, UTF-8. Lone surrogates, which UTF-8 and other readers do not take, are shown as U+FFFD; the
    column "surrogates" keeps such texts whole, as a JSON object of column -> base64 of the surrogatepass bytes."""

    path: Path

    def __enter__(self) -> _JsonLines:
        self._file: BinaryIO = self.path.open("xb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        whole: dict[str, str] = {}
        shown = dict(row)
        for name, value in row.items():
            if isinstance(value, str) and not value.isascii():
                raw = value.encode("utf-8", "surrogatepass")
                readable = raw.decode("utf-8", "replace")
                if readable != value:
                    shown[name], whole[name] = readable, base64.b64encode(raw).decode()
        shown["surrogates"] = json.dumps(whole) if whole else ""
        self._file.write(json.dumps(shown, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:  # in text mode, U+2028 and its kin would end lines
        for line in file:
            row = json.loads(line)
            if row.pop("surrogates"):
                whole = json.loads(json.loads(line)["surrogates"])
                row |= {name: base64.b64decode(text).decode("utf-8", "surrogatepass") for name, text in whole.items()}
            yield row


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _card(manifest: Mapping[str, Any]) -> str:
    """The dataset card. Its front matter is YAML; strings are written as JSON, which YAML includes."""
    licence, source, counts = manifest["licence"], manifest["source"], manifest["counts"]
    slug = "unknown" if licence in (None, "", "not stated") else re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")
    front = [f"license: {slug}"] if slug in HUB_LICENCES else ["license: other", f"license_name: {json.dumps(slug)}"]
    front += ["tags:", "- tool-calls", "- cacherl", "configs:"]
    for name in ("entries", "recordings"):
        front += [f"- config_name: {name}", f"  data_files: {name}.jsonl"] + ["  default: true"] * (name == "entries")
    front.append("dataset_info:")
    for name, columns in (("entries", ENTRIES), ("recordings", RECORDINGS)):
        front += [f"- config_name: {name}", "  features:"]
        front += [line for column, kind in columns.items() for line in (f"  - name: {column}", f"    dtype: {kind}")]
    return "\n".join(
        ["---", *front, "---", ""]
        + ["# Recorded tool calls", ""]
        + [f"{counts['entries']} results of {counts['recordings']} recorded calls of {counts['tools']} tools.", ""]
        + [f"* Source: {source or 'not stated'}", f"* Licence: {licence or 'not stated'}"]
        + [f"* Snapshot: `{manifest['snapshot']}`", f"* Keys: {manifest['key'] or 'not stated'}", ""]
        + ["`entries.jsonl` has one result of one key a line, `recordings.jsonl` one observation a line. `manifest.json` names"]
        + ["the snapshot and the SHA-256 of both files; the import refuses files that differ from it.", ""]
        + ["```python", "from pathlib import Path", "from cacherl_jax.cache.publish import import_"]
        + ["from cacherl_jax.cache.store import SQLiteStore", ""]
        + ['with SQLiteStore(Path("store.sqlite"), mode="rw") as store:', '    import_(Path("this folder"), store)', "```", ""]
    )
