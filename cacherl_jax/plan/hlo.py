"""What a compiled program's text says that its memory statistics do not: which collectives run, of how many bytes, how often."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

OPS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
COLLECTIVE = re.compile(rf"= (.*?) ({OPS})(-start)?\(")
ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+)[ (].*\{\s*$")
CALLED = re.compile(
    r"(?:calls|to_apply|true_computation|false_computation|called_computations|branch_computations)=(\{[^}]*\}|%?[\w.-]+)"
)
WHILE = re.compile(r"\bwhile\(.*\bcondition=%?([\w.-]+), body=%?([\w.-]+)")
KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
LIMIT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")


@dataclass(frozen=True)
class Collective:
    """`count` instructions alike. loops: the trip counts of the loops around them, outermost first; None: known at run time.

    bytes: of the result on one device. of: the end of the name of the operation that it was made for.
    """

    op: str
    bytes: int
    loops: tuple[int | None, ...]
    of: str
    count: int

    @property
    def times(self) -> int:
        """How often they run in all; a loop of unknown length counts once."""
        return self.count * math.prod(n or 1 for n in self.loops)


def size(hlo_type: str) -> int:
    """Bytes of an array, or of all of a tuple."""
    return sum(map(_bytes, ARRAY.findall(hlo_type)))


def _bytes(array: tuple[str, str]) -> int:
    kind, dims = array
    bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
    return math.ceil(math.prod(int(n) for n in dims.split(",") if n) * bits / 8)


def collectives(text: str) -> list[Collective]:
    """The collectives of a program, `compiled.as_text()`: those that run most bytes first.

    TPUs run one beside other work in several fusions, each of which names it with its channel: it counts once.
    """
    found: Counter[tuple] = Counter()
    seen: set[tuple] = set()
    for lines, loops in _reached(*_computations(text), ()):
        for line in lines:
            if match := COLLECTIVE.search(line):
                channel = re.search(r"\bchannel_id=(\d+)", line)
                if channel and (channel[1], loops) in seen:
                    continue
                seen.add((channel and channel[1], loops))
                path = re.search(r'op_name="([^"]*)"', line)
                source = re.sub(r"/(dot_general|gather)$", "", path[1] if path else "").rsplit("/", 1)[-1]
                found[match[2], _result(match[1], match[2], bool(match[3])), loops, source] += 1
    out = [Collective(op, n, loops, of, count) for (op, n, loops, of), count in found.items()]
    return sorted(out, key=lambda c: (-c.bytes * c.times, c.op, c.of, c.bytes))


def _result(hlo_type: str, op: str, started: bool) -> int:
    """The start of a gather or permute has a tuple of its operands, its results, and counters."""
    arrays = [array for array in ARRAY.findall(hlo_type) if array[1] or not started]
    if started and op != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]
    return sum(map(_bytes, arrays))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the one that runs first."""
    parts: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if (header := HEADER.match(line)) and " = " not in line.split("{")[0].split("->")[0]:
            lines = parts.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)
    return parts, entry


def _reached(parts: dict[str, list[str]], name: str, loops: tuple[int | None, ...]) -> Iterator[tuple[list[str], tuple]]:
    """Every computation that runs from `name` on, as often as it is called, with the loops around it."""
    lines = parts.get(name, [])
    yield lines, loops
    for line in lines:
        if loop := WHILE.search(line):
            yield from _reached(parts, loop[2], (*loops, _trips(line, parts.get(loop[1], []))))
        for called in CALLED.findall(line):
            for inner in re.findall(r"[\w.-]+", called):
                if inner in parts:
                    yield from _reached(parts, inner, loops)


def _trips(line: str, condition: list[str]) -> int | None:
    """The backend's word, or the constant that a loop counts up to from 0, as those of jax do; None if it has no such."""
    if known := KNOWN.search(line):
        return int(known[1])
    limits = [int(found[1]) for text in condition if (found := LIMIT.search(text))]
    return limits[0] if len(limits) == 1 and any("direction=LT" in text for text in condition) else None


def to_json(found: list[Collective]) -> list[dict[str, Any]]:
    return [{**asdict(c), "loops": list(c.loops), "times": c.times} for c in found]
