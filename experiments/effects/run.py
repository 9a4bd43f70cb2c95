"""Effect labels inferred from recordings, scored against the known ones.

Command: python experiments/effects/run.py --sgd DATA/sgd/train --tau-bench DATA/tau-bench
Cost:    about two CPU-minutes on one core
Expect:  the tables of README.md
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cacherl_jax.cache import effects
from cacherl_jax.cache.lookup import recordings
from cacherl_jax.data import sgd, tau_bench
from cacherl_jax.tools.record import record
from cacherl_jax.tools.registry import run_live
from cacherl_jax.tools.world.database import DAYS, database
from cacherl_jax.tools.world.tasks import make_tasks
from cacherl_jax.tools.world.tools import TOOLS, LiveTools, tool_specs
from cacherl_jax.types import Message, ToolCall, Transcript


def demonstrations(tasks: int, seed: int) -> Iterator[Transcript]:
    members = make_tasks("train", tasks, seed)
    return record(members, ["expert", "stopper", "wanderer"], LiveTools("train", seed), tool_specs(), seed)


def explore(episodes: int, calls: int, seed: int) -> Iterator[Transcript]:
    """An explorer without knowledge of effects: calls with values of the right parameter, drawn from few, half of the time
    a call of the episode again. Ids that results show are tried wherever an id of that letter is wanted."""
    rows, rng = database("train", seed), np.random.default_rng((seed, 7))

    def few(table, n=4):
        return [str(k) for k in rng.permutation(list(getattr(rows, table)))[:n]]

    people, routes = few("people"), few("flights")
    known = {
        "name": people,
        "customer_id": [rows.people[p]["customer_id"] for p in people],
        "account_id": [rows.people[p]["account_id"] for p in people],
        "order_id": [rows.customers[rows.people[p]["customer_id"]]["order_id"] for p in people],
        "city": few("cities"),
        "room_id": few("rooms"),
        "flight_id": [rows.flights[r]["flight_id"] for r in routes],
        "origin": [r.split(">")[0] for r in routes],
        "destination": [r.split(">")[1] for r in routes],
        "booking_id": ["b000"],
        "reservation_id": ["v000"],
        "day": list(DAYS),
        "amount": ["10", "50"],
    }
    known["source"] = known["target"] = known["account_id"]
    for episode in range(episodes):
        db, made, messages = rows.fresh(), [], []
        for _ in range(calls):
            if made and rng.random() < 0.5:
                call = made[int(rng.integers(len(made)))]
            else:
                name = str(rng.choice(list(TOOLS)))
                properties = TOOLS[name].spec.parameters["properties"]
                values = {p: str(rng.choice(known[p])) for p in properties}
                call = ToolCall.of(name, **{p: int(v) if p == "amount" else v for p, v in values.items()})
            made.append(call)
            result = run_live(TOOLS[call.name], db, call).result
            shown = json.loads(result.content)
            for field, value in shown.items() if isinstance(shown, dict) else ():
                if field in known and field.endswith("_id") and value not in known[field]:
                    known[field].append(value)
            messages += [Message("assistant", tool_calls=(call,)), Message("tool", result.content, error=result.error)]
        yield Transcript(f"explorer-{episode}", "", "explorer", tuple(TOOLS), tuple(messages))


def report(transcripts, specs) -> dict:
    return effects.infer((r for t in transcripts for r in recordings(t, specs, "canonical")), specs)


def row(name: str, found: dict, specs) -> None:
    """A line of the table of precision and recall, and what was wrong and missed."""
    scored = effects.score(found, specs)
    cells = [f"{found['episodes']:,}", f"{found['calls']:,}"]
    for what in ("relations", "writers", "non_writers"):
        for measure in ("precision", "recall"):
            m = scored[what][measure]
            cells.append("-" if m["share"] is None else f"{m['share']:.2f} of {m['of']}")
    print(f"| {name} | {' | '.join(cells)} | {len(scored['unknown'])} |", flush=True)
    for kind in ("wrong", "missed"):
        if pairs := scored[kind]:
            print(f"    {kind}: {', '.join(f'{w} -> {r}' for w, r in pairs)}", file=sys.stderr)


def hidden_state(found: dict) -> None:
    """SGD's labels against what is seen: the contradictions by kind, and those of every tool that varies."""
    kinds = Counter(c["kind"] for c in found["contradictions"])
    print(f"\nSGD: {len(found['tools'])} tools, {len(found['relations'])} relations, contradictions {dict(kinds)}")
    print("| tool | calls | compared | differ | varies |\n|---|---|---|---|---|")
    for name, t in sorted(found["tools"].items(), key=lambda item: -item[1]["differing"])[:12]:
        print(f"| {name} | {t['calls']:,} | {t['compared']:,} | {t['differing']:,} | {t['varies']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sgd", type=Path, help="folder of SGD's train split")
    parser.add_argument("--tau-bench", type=Path, help="tau-bench's folder")
    args = parser.parse_args()
    print("| recordings | episodes | calls |" + "".join(f" {w} {m} |" for w in ("relations", "writers", "non-writers")
          for m in ("precision", "recall")) + " unknown |\n|" + "---|" * 10)  # fmt: skip
    for seed in (0, 1, 2):
        row(f"world {seed}, demonstrators, 500 tasks", report(demonstrations(500, seed), tool_specs()), tool_specs())
        for episodes in (30, 100, 300):
            row(f"world {seed}, explorer, {episodes} x 30", report(explore(episodes, 30, seed), tool_specs()), tool_specs())
    if args.tau_bench:
        runs = tau_bench.read(args.tau_bench)
        row("tau-bench airline, 200 runs", report(runs.transcripts(), runs.specs), runs.specs)
        for file in ("airline_tasks_test", "retail_tasks_train"):
            truth = tau_bench.read(args.tau_bench / "derived" / f"{file}.jsonl")
            row(f"tau-bench {file}, ground truth", report(truth.transcripts(), truth.specs), truth.specs)
    if args.sgd:
        corpus = sgd.read(args.sgd)
        hidden_state(report(corpus.transcripts(), corpus.specs))


if __name__ == "__main__":
    main()
