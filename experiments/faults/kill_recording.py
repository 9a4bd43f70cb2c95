"""Kills a recording process at random moments, again and again, on one store: what it acknowledged must be there.

Command:  python experiments/faults/kill_recording.py --kills 1000 --seed 0

Each round forks a process that adds recordings, alone, in transactions, of small and of large payloads, and writes the number
of each acknowledged one to a pipe. After a random time it gets SIGKILL. Then the store is opened and checked: PRAGMA
integrity_check, every acknowledged recording once, and as many recordings as the entries count. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import struct
import sys
import tempfile
import time
from pathlib import Path

from cacherl_jax.cache.entries import Recording
from cacherl_jax.cache.store import SQLiteStore
from cacherl_jax.types import ToolResult

LARGE, SMALL = 300_000, 40  # characters; the large ones span many pages


def recording(number: int) -> Recording:
    """The recording of a number: every fifth repeats the call and the result of the one before."""
    name = number - (number % 5 == 4)
    content = f"{name:07d} " * ((LARGE if name % 31 == 7 else SMALL) // 8)
    return Recording(b"%032d" % name, "tool", f'{{"n":{name}}}', "", ToolResult(content), episode=str(number))


def record(path: Path, start: int, acknowledge: int, seed: int) -> None:
    """Adds recordings from `start` on, for ever. Numbers go to the pipe after the store said that they are kept."""
    rng = random.Random(seed)
    number = start
    with SQLiteStore(path, mode="rw") as store:
        while True:
            together = rng.choice((1, 1, 1, 10))
            if together == 1:
                store.add(recording(number))
            else:
                with store.transaction():
                    for i in range(number, number + together):
                        store.add(recording(i))
            number += together
            os.write(acknowledge, struct.pack("<q", number))


def round_of(path: Path, start: int, rng: random.Random) -> int:
    """One process from its start to its death; the number up to which recordings were acknowledged."""
    reads, writes = os.pipe()
    seed, delay = rng.getrandbits(32), rng.uniform(0.0, 0.12)
    child = os.fork()
    if child == 0:
        try:
            record(path, start, writes, seed)
        finally:
            os._exit(1)
    os.close(writes)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WTERMSIG(status) != signal.SIGKILL:
        raise RuntimeError(f"the recording process ended by itself, status {status}")
    acknowledged = b""
    while part := os.read(reads, 1 << 20):
        acknowledged += part
    os.close(reads)
    whole = len(acknowledged) // 8 * 8
    return struct.unpack("<q", acknowledged[whole - 8 : whole])[0] if whole else start


def check(path: Path, acknowledged: int, checked: int) -> tuple[int, int]:
    """(numbers lost, recordings kept) of a store; `checked` numbers were found before and are only counted."""
    with sqlite3.connect(path) as db:
        (state,) = db.execute("PRAGMA integrity_check").fetchone()
        if state != "ok":
            raise RuntimeError(f"the store is corrupt: {state}")
        (entries,) = db.execute("SELECT sum(count) FROM entries").fetchone()
        kept = [int(episode) for (episode,) in db.execute("SELECT episode FROM recordings ORDER BY rowid")]
    db.close()
    if kept != list(range(len(kept))) or len(kept) != (entries or 0):
        raise RuntimeError(f"{len(kept)} recordings, the last {kept[-1:]}, and entries that count {entries}")
    with SQLiteStore(path, mode="r") as store:
        for number in range(checked, acknowledged):
            expected = recording(number)
            if [e.result for e in store.get(expected.key)] != [expected.result]:
                return acknowledged - number, len(kept)
    return max(0, acknowledged - len(kept)), len(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description="Random kills of a recording process.")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rounds = lost = unacknowledged = 0
        files = 0
        total = start = 0
        while rounds < args.kills:
            # A new store every ten kills: its creation is killed too, and checks stay short.
            path, files, start = Path(folder, f"{files}.sqlite"), files + 1, 0
            for _ in range(min(10, args.kills - rounds)):
                acknowledged = round_of(path, start, rng)
                rounds += 1
                if acknowledged == 0 and not path.exists():
                    continue
                SQLiteStore(path, mode="rw").close()  # killed while it was created, it opens for the next writer
                gone, kept = check(path, acknowledged, start)
                lost += gone
                unacknowledged += kept - acknowledged
                start = kept
            total += start
    figures = {
        "kills": rounds,
        "stores": files,
        "recordings": total,
        "acknowledged_and_lost": lost,
        "kept_before_acknowledged": unacknowledged,
        "corrupt_stores": 0,  # one would have stopped the run
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(figures))
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
