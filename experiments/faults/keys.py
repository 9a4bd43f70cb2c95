"""The properties of keys on many Hypothesis examples; writes the table of experiments/faults/keys.md.

Command: python experiments/faults/keys.py --examples 100000 --seed 0
Cost:    about 10 CPU-minutes on one core
Expect:  no property fails
"""

import argparse
import runpy
import time
from pathlib import Path

import hypothesis

TESTS = Path(__file__).parents[2] / "tests" / "cache"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100_000, help="in all, shared out over the properties")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    properties = runpy.run_path(str(TESTS / "key_properties.py"))["PROPERTIES"]
    each = -(-args.examples // len(properties))
    print("| property | examples | CPU-s | holds |\n|---|---|---|---|")
    for holds in properties:
        began = time.process_time()
        run = hypothesis.settings(max_examples=each, deadline=None, database=None, print_blob=True)(holds)
        hypothesis.seed(args.seed)(run)()  # raises with the smallest example that fails
        print(f"| {holds.__name__.replace('_', ' ')} | {each:,} | {time.process_time() - began:.0f} | yes |", flush=True)


if __name__ == "__main__":
    main()
