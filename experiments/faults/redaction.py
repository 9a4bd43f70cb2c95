"""What the rules for secrets would take out of the recorded corpora; the table of experiments/faults/redaction.md.

Command: python experiments/faults/redaction.py DATA
Cost:    about two CPU-minutes on one core
Expect:  nothing but what redaction.md lists
"""

import argparse
import time
from collections import Counter
from pathlib import Path

from cacherl_jax.cache.redact import redact
from cacherl_jax.data.sources import SOURCES

CORPORA = {
    "SGD train": ("sgd", "sgd/train"),
    "SGD dev": ("sgd", "sgd/dev"),
    "tau-bench airline runs": ("tau_bench", "tau-bench"),
    "tau-bench retail ground truth": ("tau_bench", "tau-bench/derived/retail_tasks_train.jsonl"),
    "LiveMCPBench": ("livemcpbench", "livemcpbench"),
    "STAR": ("star", "star"),
    "Taskmaster-4": ("taskmaster4", "taskmaster4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the corpora")
    args = parser.parse_args()
    print("| corpus | calls | in arguments | in results | CPU-s | characters |\n|---|---|---|---|---|---|")
    for name, (source, path) in CORPORA.items():
        found: dict[str, Counter[str]] = {"calls": Counter(), "results": Counter()}
        calls = characters = 0
        spent = 0.0
        for transcript in SOURCES[source](args.data / path).transcripts():
            for message in transcript.messages:
                texts = [("calls", c.arguments) for c in message.tool_calls]
                texts += [("results", message.content)] if message.role == "tool" else []
                calls += len(message.tool_calls)
                for where, text in texts:
                    characters += len(text)
                    began = time.process_time()
                    clean = redact(text, lambda rule, counts=found[where]: counts.update([rule]))
                    spent += time.process_time() - began
                    if clean != text:
                        start = next(i for i, (a, b) in enumerate(zip(text, clean, strict=False)) if a != b)
                        print(f"    {transcript.id}: ...{clean[max(0, start - 60) : start + 40]!r}...")
        cells = [", ".join(f"{rule} {n}" for rule, n in sorted(c.items())) or "0" for c in found.values()]
        print(f"| {name} | {calls:,} | {cells[0]} | {cells[1]} | {spent:.1f} | {characters:,} |", flush=True)


if __name__ == "__main__":
    main()
