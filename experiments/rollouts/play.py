"""A `cacherl` command with what the command line does not offer: tools that take their time, several processes.

Command:  python experiments/rollouts/play.py [--longest SECONDS --pace SEED] [--process I/N --address HOST:PORT] VERB ...
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

from cacherl_jax import cli
from cacherl_jax.types import Observation, Task, ToolCall, ToolProvider, ToolSession
from cacherl_jax.verbs import rollout as rollout_verb


class Paced:
    """A provider whose answers take a time drawn from 0 to `longest` seconds, each in a thread of its own."""

    blocking = True

    def __init__(self, inner: ToolProvider, longest: float, seed: int) -> None:
        self._inner, self._longest, self._rng = inner, longest, random.Random(seed)

    def start(self, task: Task, sample: int) -> ToolSession:
        inner, longest, rng = self._inner.start(task, sample), self._longest, self._rng

        class Session:
            def execute(self, call: ToolCall, index: int) -> Observation:
                time.sleep(rng.uniform(0, longest))
                return inner.execute(call, index)

        return Session()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--longest", type=float, help="seconds that a tool takes at most")
    parser.add_argument("--pace", type=int, default=0, help="seed of the seconds")
    parser.add_argument("--process", help="I/N: this one and their number")
    parser.add_argument("--address", help="of process 0")
    args, command = parser.parse_known_args()
    if args.process:
        import jax

        index, count = args.process.split("/")
        jax.distributed.initialize(args.address, int(count), int(index))
    if args.longest is not None:
        provider = rollout_verb._provider

        def paced(*arguments: Any) -> Paced:
            return Paced(provider(*arguments), args.longest, args.pace)

        rollout_verb._provider = paced
    return cli.main(command)


if __name__ == "__main__":
    raise SystemExit(main())
