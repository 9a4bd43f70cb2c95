"""What every reader of recorded conversations gives: tools by name, transcripts in file order, and a line for each record
that was left out. One record that cannot be read costs only itself; a folder without the expected files is refused.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cacherl_jax.config import ConfigError
from cacherl_jax.types import Effects, Message, ToolCall, ToolSpec, Transcript

Report = Callable[[str], None]  # takes what was left out of a record that is read otherwise
UNREADABLE = (ValueError, OSError, EOFError, RecursionError, zlib.error, lzma.LZMAError, tarfile.TarError)
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, RecursionError)


@dataclass
class Recorded:
    """A corpus, opened. `problems` grows while `transcripts` reads: "FILE, RECORD: reason" for all that is left out.

    records: the named records of a file, in order; raises one of UNREADABLE where the file cannot be read (on).
    convert: a record as a transcript; raises one of MALFORMED for a record without sense.
    schemas: the files that `specs` come from, where these are not inferred.
    """

    files: tuple[Path, ...]
    specs: dict[str, ToolSpec]
    records: Callable[[Path], Iterable[tuple[str, Any]]]
    convert: Callable[[Any, Report], Transcript]
    licence: str
    attribution: str
    schemas: tuple[Path, ...] = ()
    problems: list[str] = field(default_factory=list)

    def transcripts(self) -> Iterator[Transcript]:
        """Every readable record in file order. An id that occurred before gets a number: an id names one dialogue."""
        self.problems.clear()
        seen: Counter[str] = Counter()
        for path in self.files:
            try:
                for name, record in self.records(path):
                    place = f"{path.name}, {name}"
                    try:
                        transcript = self.convert(record, lambda reason, place=place: self.problems.append(f"{place}: {reason}"))
                        seen[transcript.id] += 1
                    except MALFORMED as error:
                        self.problems.append(f"{place}: {type(error).__name__} {error}")
                        continue
                    again = seen[transcript.id]
                    yield transcript if again == 1 else replace(transcript, id=f"{transcript.id}#{again}")
            except UNREADABLE as error:
                self.problems.append(f"{path.name}: {error}")


# ---- files -----------------------------------------------------------------------------------------------------------


def find(folder: Path, pattern: str) -> tuple[Path, ...]:
    """The files that match, or match with .gz appended, in name order; of a file in both forms, the uncompressed."""
    found = {path.name.removesuffix(".gz"): path for path in [*folder.glob(f"{pattern}.gz"), *folder.glob(pattern)]}
    return tuple(found[name] for name in sorted(found) if found[name].is_file())


def read_bytes(path: Path) -> bytes:
    """A file's content, decompressed."""
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def read_schema(path: Path) -> Any:
    """The content of a file that a corpus cannot be read without. Raises ConfigError where it is no JSON."""
    try:
        return json.loads(read_bytes(path))
    except UNREADABLE as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def list_records(what: str, id_field: str) -> Callable[[Path], Iterator[tuple[str, Any]]]:
    """Records of a file that holds one JSON list, named by their id or else their place in it."""

    def records(path: Path) -> Iterator[tuple[str, Any]]:
        content = json.loads(read_bytes(path))
        if not isinstance(content, list):
            raise ValueError(f"holds {type(content).__name__}, expected a list of {what}s")
        for number, record in enumerate(content):
            name = record.get(id_field, number) if isinstance(record, dict) else number
            yield f"{what} {name}", record

    return records


def line_records(path: Path) -> Iterator[tuple[str, bytes]]:
    """Lines of a JSON Lines file that are not empty, not yet parsed: a cut line costs only itself."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", line


def manifest(root: Path, paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of the uncompressed content of files below `root` by their names without .gz; of a folder, of all in it."""
    return {path.relative_to(root).as_posix().removesuffix(".gz"): _digest(path) for path in paths}


def _digest(path: Path) -> str:
    if path.is_dir():
        lines = [f"{child.name} {_digest(child)}\n" for child in sorted(path.iterdir())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    return hashlib.sha256(read_bytes(path)).hexdigest()


# ---- what recordings say ---------------------------------------------------------------------------------------------


def infer_specs(transcripts: Iterable[Transcript], effects: Mapping[str, Effects] | None = None) -> dict[str, ToolSpec]:
    """Permissive definitions of the tools called: the arguments and JSON types seen, none required. In order of names."""
    seen: dict[str, dict[str, set[str]]] = {}
    for transcript in transcripts:
        for call in (call for message in transcript.messages for call in message.tool_calls):
            arguments = seen.setdefault(call.name, {})
            try:
                for name, value in call.parsed().items():
                    arguments.setdefault(name, set()).add(_json_type(value))
            except (ValueError, RecursionError):
                continue  # text that is no JSON object says nothing about arguments
    specs = {}
    for name in sorted(seen):
        properties = {argument: {"type": _one_or_more(kinds)} for argument, kinds in seen[name].items()}
        known = (effects or {}).get(name, Effects())
        specs[name] = ToolSpec(name, "", {"type": "object", "properties": properties}, known)
    return specs


def _json_type(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    kinds = {int: "integer", float: "number", str: "string", list: "array", dict: "object", type(None): "null"}
    return kinds[type(value)]


def _one_or_more(kinds: set[str]) -> str | list[str]:
    if "number" in kinds:
        kinds = kinds - {"integer"}
    return next(iter(kinds)) if len(kinds) == 1 else sorted(kinds)


def pair_results(messages: Iterable[Message], report: Report) -> tuple[Message, ...]:
    """The messages with each turn's results in the order of its calls, as the rendering and the cache expect them.

    Results name their calls by `tool_call_id`; those without an id belong to the calls left, in order. Reported and left
    out: results without a call, calls without a result where others of the turn have one, and calls without a name.
    """
    out: list[Message] = []
    results: list[Message] = []
    asking: Message | None = None

    def close() -> None:
        if asking is None:
            for result in results:
                report(f"a tool's result without a call: {result.content[:60]!r}")
            return
        answered = _answers(asking.tool_calls, results, report)
        kept = {}
        for i, call in enumerate(asking.tool_calls):
            if call.name and (i in answered or not answered):
                kept[i] = call
            elif call.name:
                report(f"call of {call.name} without a result")
        if kept or asking.content or asking.reasoning or not asking.tool_calls:
            out.append(replace(asking, tool_calls=tuple(kept.values())))
        out.extend(answered[i] for i in kept if i in answered)

    for message in messages:
        if message.role == "tool":
            results.append(message)
            continue
        close()
        results, asking = [], message if message.role == "assistant" else None
        if asking is None:
            out.append(message)
    close()
    return tuple(out)


def _answers(calls: tuple[ToolCall, ...], results: list[Message], report: Report) -> dict[int, Message]:
    """The results by the places of their calls."""
    answered: dict[int, Message] = {}
    unnamed = []
    for result in results:
        wanted = result.tool_call_id
        named = [i for i, call in enumerate(calls) if wanted and call.id == wanted and i not in answered]
        if named:
            answered[named[0]] = result
        else:
            unnamed.append(result)
    for result in unnamed:
        # An id that is no call's is a mistake where the calls have ids; without ids, order alone tells.
        left = [i for i, call in enumerate(calls) if i not in answered and not (result.tool_call_id and call.id)]
        if left:
            answered[left[0]] = result
        else:
            report(f"a tool's result without a call: {result.content[:60]!r}")
    return answered
