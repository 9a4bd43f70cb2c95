"""Episodes of adversarial text through the agent loop; prints the tables of experiments/faults/noise.md.

Command: python experiments/faults/noise.py --episodes 10000 --seed 1
Cost:    about a CPU-minute on one core
Expect:  no episode fails, every stop reason is reached
"""

import argparse
import faulthandler
import runpy
import time
from collections import Counter
from pathlib import Path

from cacherl_jax.trajectory import StopReason

TESTS = Path(__file__).parents[2] / "tests" / "rollout"
PATIENCE = 120.0  # seconds after which an episode counts as hung, and the program ends with its stack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    play = runpy.run_path(str(TESTS / "noise.py"))["play"]
    stops, errors, counts = Counter(), Counter(), Counter()
    longest, began = 0.0, time.process_time()
    for number in range(args.episodes):
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        before = time.process_time()
        _, trajectory = play(args.seed, number)  # raises where anything does not hold
        longest = max(longest, time.process_time() - before)
        stops[trajectory.stop] += 1
        errors.update(o.result.error or "none: an answer" for o in trajectory.observations)
        counts["turns"] += trajectory.turns
        counts["tokens sampled"] += int(trajectory.sampled_T.sum())
        counts["tokens injected"] += int((~trajectory.sampled_T).sum())
        counts["results cut to their limit"] += sum(o.shown is not None for o in trajectory.observations)
    faulthandler.cancel_dump_traceback_later()
    counts["CPU-seconds"] = round(time.process_time() - began)
    counts["CPU-milliseconds of the longest episode"] = round(longest * 1000)
    table("stop reason", "episodes", {reason.value: stops[reason] for reason in StopReason})
    table("error of an observation", "observations", dict(errors.most_common()))
    table("in all", "", counts)
    if missing := [reason.value for reason in StopReason if not stops[reason]]:
        raise SystemExit(f"never reached: {', '.join(missing)}")


def table(what: str, counted: str, rows: dict[str, int]) -> None:
    print(f"\n| {what} | {counted} |\n|---|---|")
    for name, count in rows.items():
        print(f"| {name} | {count:,} |")


if __name__ == "__main__":
    main()
