"""Are rollouts the same every time? `cacherl rollout` under changed circumstances, and the hashes that it prints.

Command:  python experiments/rollouts/determinism.py --out runs/rollouts
Cost:     about 15 CPU-minutes on two cores; what is finished is kept in --out
Expect:   one hash under all circumstances on one device; results in determinism.json beside this file

The policy is cloned from the expert of the embedded tool world (configs/demo.py, shorter), so that its turns call tools; a store
answers. It plays 24 tasks, four samples each, with 32 compiled rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cacherl_jax.checkpoint import restore_model
from cacherl_jax.config import Config
from cacherl_jax.data.pipeline import Row, collate
from cacherl_jax.model import qwen3
from cacherl_jax.rollout.stream import read_stream
from cacherl_jax.train import step as steps

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "demo.py"
# Shorter; and a vocabulary that divides over tp.
SHORT = ["data.train_tasks=1000", 'data.demonstrators=["expert"]', "sft.steps=250", "tokenizer.vocab_size=1000"]
TASKS, SAMPLES, ROWS = 24, 4, 32
HASHES = ("trajectories_sha256", "tokens_sha256")
# For the gap to the trainer at positions beyond the demo's: turns of 400 tokens at least.
LONG = [
    "rollout.context=2048",
    "rollout.min_tokens=[400,400,400]",
    "rollout.max_turn_tokens=600",
    "rollout.max_sampled_tokens=1800",
]
# Compiled rows a device, of as many devices; (data, tp) of the mesh, processes.
LAYOUTS = {
    "1 device": (32, 1, 1, 1),
    "1 device, 16 rows": (16, 1, 1, 1),
    "1 device, 64 rows": (64, 1, 1, 1),
    "2 devices, data 2": (32, 2, 1, 1),
    "2 devices, tp 2": (32, 1, 2, 1),
    "4 devices, data 4": (32, 4, 1, 1),
    "4 devices, data 2 x tp 2": (32, 2, 2, 1),
    "2 processes of 2 devices, data 4": (32, 4, 1, 2),
    "2 processes of 2 devices, data 2 x tp 2": (32, 2, 2, 2),
}


def environment(devices: int = 1, *, anew: bool = False) -> dict[str, str]:
    """anew: programs are compiled, even where the surroundings keep compiled ones."""
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return os.environ | settings | ({"JAX_ENABLE_COMPILATION_CACHE": "0"} if anew else {})


def make_policy(out: Path) -> Path:
    """The folder of a run whose stage sft is done."""
    for stage in ("record", "think", "sft"):
        settings = [part for setting in SHORT for part in ("--set", setting)]
        command = [sys.executable, "-m", "cacherl_jax.cli", stage, "--config", str(CONFIG), *settings, "--json"]
        subprocess.run([*command, "--out", str(out / "policy")], check=True, env=environment(), stdout=subprocess.DEVNULL)
    return out / "policy"


class Rollouts:
    """Runs of `cacherl rollout` on the same tasks, each in a folder of its own below `out`."""

    def __init__(self, out: Path) -> None:
        self.out, self.policy = out, make_policy(out)
        lines = (self.policy / "record" / "tasks.validation.jsonl").read_text().splitlines()[:TASKS]
        self.tasks = out / "tasks.jsonl"
        self.tasks.write_text("\n".join(lines) + "\n")
        (out / "tasks.few.jsonl").write_text("\n".join(lines[:8]) + "\n")
        for seed in range(3):
            shuffled = random.Random(seed).sample(lines, len(lines))
            (out / f"tasks.shuffled.{seed}.jsonl").write_text("\n".join(shuffled) + "\n")

    def command(self, name: str, *, tasks: Path | None = None, slots: int = ROWS, rows: int = ROWS, more: Sequence[str] = ()):
        return [
            "rollout", "--config", str(CONFIG), "--set", f"rollout.rows={rows}", "--policy", str(self.policy / "sft"),
            "--store", str(self.policy / "record" / "training.sqlite"), "--tasks", str(tasks or self.tasks),
            "--samples", str(SAMPLES), "--seed", "0", "--slots", str(slots), "--out", str(self.out / name), "--json", *more,
        ]  # fmt: skip

    def run(self, name: str, before: Sequence[str] = (), devices: int = 1, anew: bool = False, **options: Any) -> dict[str, Any]:
        """What the command prints. A run that is done is not run again."""
        kept = self.out / name / "rollouts" / "done.json"
        if kept.is_file():
            return json.loads(kept.read_text())
        command = [sys.executable, str(HERE / "play.py"), *before, *self.command(name, **options)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(devices, anew=anew))
        if done.returncode:
            raise RuntimeError(f"{name}: status {done.returncode}\n{done.stderr[-3000:]}")
        print(name, json.loads(done.stdout)["trajectories_sha256"][:16], flush=True)
        return json.loads(done.stdout)

    def interrupted(self, name: str, sent: signal.Signals, after: int) -> dict[str, Any]:
        """The same, stopped by a signal once `after` episodes are on disk, and run again; what was stored must be kept."""
        folder = self.out / name / "rollouts"
        if not (folder / "done.json").is_file():
            streamed = folder / "streamed.0.jsonl"
            child = subprocess.Popen(
                [sys.executable, str(HERE / "play.py"), *self.command(name)],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(),
            )  # fmt: skip
            while not streamed.is_file() or streamed.read_bytes().count(b"\n") < after:
                if child.poll() is not None:
                    raise RuntimeError(f"{name} ended before it was stopped, with status {child.returncode}")
                time.sleep(0.002)
            child.send_signal(sent)
            status = child.wait()
            kept = streamed.read_bytes().split(b"\n")[:-1]
            self.run(name)
            whole = set((folder / "trajectories.jsonl").read_bytes().split(b"\n"))
            if not set(kept) <= whole or len(kept) == TASKS * SAMPLES:
                raise RuntimeError(f"{name}: of {len(kept)} stored episodes {len(set(kept) - whole)} were played again")
            stopped = {"status": status, "episodes_kept": len(kept)}
            (self.out / name / "stopped.json").write_text(json.dumps(stopped))
        found = self.run(name)
        return found | {"stopped": json.loads((self.out / name / "stopped.json").read_text())}

    def processes(self, name: str, count: int, devices: int, **options: Any) -> dict[str, Any]:
        """The same as several processes, each with a folder of its own; they must agree."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{s.getsockname()[1]}"
        children = [
            subprocess.Popen(
                [sys.executable, str(HERE / "play.py"), "--process", f"{i}/{count}", "--address", address,
                 *self.command(f"{name}-{i}", **options)],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(devices // count),
            )
            for i in range(count)
        ]  # fmt: skip
        printed = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]  # jax's transport prints too
        if any(found != printed[0] for found in printed):
            raise RuntimeError(f"{name}: the processes printed different results")
        print(name, printed[0]["trajectories_sha256"][:16], flush=True)
        return printed[0]

    def trajectories(self, name: str) -> dict[tuple[str, int], Any]:
        return read_stream(self.out / name / "rollouts" / "trajectories.jsonl")


def on_one_device(runs: Rollouts, repetitions: int) -> dict[str, list[dict[str, Any]]]:
    """The results of every circumstance that must change nothing."""
    rng = random.Random(0)
    ends = [rng.randrange(8, TASKS * SAMPLES - 24) for _ in range(6)]
    return {
        "repeated": [runs.run(f"repeat-{i}", anew=True) for i in range(repetitions)],
        "slots 1": [runs.run("slots-1", slots=1)],
        "slots 4": [runs.run("slots-4", slots=4)],
        "tasks shuffled": [runs.run(f"shuffled-{i}", tasks=runs.out / f"tasks.shuffled.{i}.jsonl") for i in range(3)],
        "tools of 0 to 50 ms": [runs.run(f"paced-{i}", ["--longest", "0.05", "--pace", str(i)]) for i in range(3)],
        "kill -9 and resumed": [runs.interrupted(f"killed-{i}", signal.SIGKILL, ends[i]) for i in range(3)],
        "Ctrl-C and resumed": [runs.interrupted(f"stopped-{i}", signal.SIGINT, ends[3 + i]) for i in range(3)],
    }


def on_layouts(runs: Rollouts) -> dict[str, Any]:
    """Tokens and logprobs under other meshes and compiled rows, compared with one device's."""
    base, found = runs.trajectories("repeat-0"), {}
    for layout, (rows, data, tp, processes) in LAYOUTS.items():
        name = "layout-" + layout.replace(",", "").replace(" ", "-")
        mesh = ["--set", f"mesh.data={data}", "--set", f"mesh.tp={tp}"]
        options = {"rows": rows, "slots": 0, "more": mesh}
        if processes == 1:
            result, where = runs.run(name, devices=data * tp, **options), name
        else:
            result, where = runs.processes(name, processes, data * tp, **options), f"{name}-0"
        found[layout] = {key: result[key] for key in HASHES} | compared(base, runs.trajectories(where))
    return found


def compared(base: Mapping[tuple[str, int], Any], other: Mapping[tuple[str, int], Any]) -> dict[str, Any]:
    """Episodes whose tokens differ, and the largest difference of a logprob where they do not."""
    same = [e for e in base if np.array_equal(base[e].tokens_T, other[e].tokens_T)]
    gaps = [float(np.abs(base[e].logprobs_T - other[e].logprobs_T).max()) for e in same]
    return {"episodes_with_other_tokens": len(base) - len(same), "largest_logprob_difference": max(gaps)}


def trainer_gap(runs: Rollouts, name: str, width: int) -> dict[str, Any]:
    """|sampler's logprob - trainer's| over every sampled token, by its position in the episode in steps of `width`."""
    config = Config.from_json(json.loads((runs.out / name / "run.json").read_text())["config"])
    policy = runs.policy / "sft" / "checkpoints"
    model = restore_model(policy, qwen3.init(config.model, jax.random.key(config.seed)))
    played = list(runs.trajectories(name).values())
    by_position: dict[int, list[float]] = {}
    for at in range(0, len(played), 8):
        batch = played[at : at + 8]
        rows = [Row(t.tokens_T, t.sampled_T) for t in batch]
        scored_BT = np.asarray(steps.score(model, collate(rows, config.rollout.context, 8)))
        for t, scored_T in zip(batch, scored_BT, strict=True):
            for n in np.flatnonzero(t.sampled_T):
                gap = abs(float(scored_T[n]) - float(t.logprobs_T[n]))
                by_position.setdefault(int(n) // width, []).append(gap)
    gaps = sorted(gap for part in by_position.values() for gap in part)
    found = {"tokens": len(gaps), "mean": float(np.mean(gaps)), "largest": gaps[-1]}
    return found | {
        "by_position": {
            f"{width * part} to {width * (part + 1) - 1}": {"tokens": len(g), "mean": float(np.mean(g)), "largest": max(g)}
            for part, g in sorted(by_position.items())
        }
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Are rollouts the same every time?")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=20)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = Rollouts(args.out.resolve())
    results = on_one_device(runs, args.repetitions)
    runs.run("long", tasks=runs.out / "tasks.few.jsonl", more=[part for setting in LONG for part in ("--set", setting)])
    first = results["repeated"][0]
    circumstances = {
        name: {"runs": len(found)}
        | {f"distinct_{key}": len({f[key] for f in found}) for key in HASHES}
        | {"as_the_first": all(f[key] == first[key] for f in found for key in HASHES)}
        | ({"stopped": [f["stopped"] for f in found]} if "stopped" in found[0] else {})
        for name, found in results.items()
    }
    result = {
        "first": {key: value for key, value in first.items() if key != "inputs"},
        "hashes_in_all": {key: len({f[key] for found in results.values() for f in found}) for key in HASHES},
        "circumstances": circumstances,
        "layouts": on_layouts(runs),
        "trainer_gap": trainer_gap(runs, "repeat-0", 64),
        "trainer_gap_long_turns": trainer_gap(runs, "long", 256),
    }
    print(json.dumps(result, indent=1))
    (HERE / "determinism.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
