"""What the sides of rollouts.py have in common: sizes, and how a side takes orders, as those of training.py do. Standard
library alone, for any environment.

A side is a process of its own. It reads a JSON object a line ({"program": name, ...arguments}), runs that program, and
answers one JSON line: CPU seconds of the whole process, what the program gave, programs that XLA compiled.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

VOCAB, LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 8192, 4, 256, 4, 2, 64, 768
ROPE_THETA, EPS = 1e6, 1e-6

ROWS, CONTEXT = 8, 1024  # rows of a batch and rollouts of a group; tokens that a cache holds
PROMPT, NEW, FEW = 128, 128, 16  # decode: tokens of a prompt, tokens sampled after it in a long and in a short call

TURNS = 4  # of an episode: each calls the tool, the last is stopped by the limit on turns
OPENING = 192  # tokens of system message, tool, user message and generation prompt
TURN = 40  # tokens sampled in a turn, <|im_end|> included
INJECTED = 40  # tokens between two turns: the tool's answer and the template around it
RESPONSE = 512  # what an episode may take after its opening

TOOL = "lookup"
DESCRIPTION = "The record of an item."
PARAMETERS = {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]}
ARGUMENTS = '{"item": "a-17"}'
CALL = f'\n</think>\n\n<tool_call>\n{{"name": "{TOOL}", "arguments": {ARGUMENTS}}}\n</tool_call>'  # one token


def words(count: int, first: int = 1000) -> str:
    """Text of `count` tokens, none of which starts a scripted turn."""
    return "".join(f" w{first + i:04d}" for i in range(count))


def padded(count: int, length: Callable[[str], int]) -> str:
    """The text of words for which `length` gives `count`. Raises ValueError where even one word is too long."""
    short = count - length(words(1)) + 1  # without a word, what stands around it may merge
    if short < 1 or length(words(short)) != count:
        raise ValueError(f"cannot make {count} tokens: one word gives {length(words(1))}, {short} words {length(words(short))}")
    return words(short)


def count_compilations() -> dict[str, float]:
    """A tally that grows with every program that XLA compiles in this process."""
    import jax

    tally = {"compilations": 0, "compile_seconds": 0.0}

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            tally["compilations"] += 1
            tally["compile_seconds"] += seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    return tally


def sampled(rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What an answer says of sampled ids, a list a row: how many, and their hash."""
    ids = [[int(i) for i in row] for row in rows]
    return {"tokens": sum(map(len, ids)), "hash": hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]}


def serve(
    programs: Mapping[str, Callable[..., Any]],
    tally: Mapping[str, float],
    versions: str,
    describe: Callable[[Any], dict[str, Any]] = sampled,
) -> None:
    """Answers orders until standard input ends. `describe` makes a part of the answer of what a program returns; what it
    takes, such as waiting for an array, counts."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        before = dict(tally)
        began = time.process_time()
        described = describe(programs[order.pop("program")](**order))
        cpu = time.process_time() - began
        answer = {"cpu": cpu, **described, **{name: tally[name] - before[name] for name in tally}}
        print(json.dumps(answer), file=answers, flush=True)
