"""The control that the paper lacks: one policy, trained by GRPO with live tools, and from caches of its own recorded calls.

Command:  python experiments/live_control/run.py --seeds 0 1 2 3 4 --out runs/live_control
          python experiments/live_control/run.py --seeds 1 2 3 4 --answers-only --out runs/live_control
          python experiments/live_control/figure.py runs/live_control
Cost:     about 48 CPU-minutes a seed, 22 more of --answers-only; Ctrl-C is safe, the same command goes on; seeds may run in
          processes of their own

A seed: SFT on the demonstrators' transcripts of the hard world. Its policy plays the tasks of GRPO with live tools, which is
recorded together with the demonstrators' calls. From this store the arms train, all from the same weights, on the same tasks, with
the same draws and the same number of rollouts. Every policy is then evaluated on the same unseen tasks with live tools.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cacherl_jax import metrics
from cacherl_jax.cache.entries import Recording
from cacherl_jax.cache.fit import fit
from cacherl_jax.cache.fit import write as write_fitted
from cacherl_jax.cache.imports import describe
from cacherl_jax.cache.lookup import CachedTools, recordings
from cacherl_jax.cache.snapshot import snapshot_id
from cacherl_jax.cache.store import SQLiteStore
from cacherl_jax.config import PAPER_CACHE, CacheConfig, Config, GrpoConfig, load_config, smoke
from cacherl_jax.corpus import live_tools
from cacherl_jax.evaluate.process_accuracy import process_accuracy
from cacherl_jax.model import qwen3
from cacherl_jax.reward.answer import answer_reward
from cacherl_jax.rollout import runner, stream
from cacherl_jax.rollout.engine import Engine
from cacherl_jax.run_directory import RunDirectory, keep_settings
from cacherl_jax.stages import inputs, record, sft, think
from cacherl_jax.train import grpo
from cacherl_jax.trajectories.transcripts import read_transcripts
from cacherl_jax.trajectory import Trajectory
from cacherl_jax.types import Message, Task, Tier, ToolCall, ToolProvider, ToolSpec, Transcript
from cacherl_jax.whole_files import write_json

ROOT = Path(__file__).parents[2]
SAMPLES = 4  # episodes of the initial policy that are recorded of each task
KEPT = ("accuracy", "reward", "answer", "process", "tiers", "stops", "kl", "entropy", "warnings", "sampled_tokens")
EVALUATED = 0  # the sample of an evaluation's draws; greedy anyway


@dataclass(frozen=True)
class Arm:
    """What answers the calls of GRPO: live tools (cache None) or a store that holds `coverage` of the initial policy's calls; and
    what the process, which needs no true results, weighs beside the answer."""

    cache: CacheConfig | None
    coverage: float = 1.0
    process_weight: float = GrpoConfig().process_weight

    @property
    def tools(self) -> str:
        return "live" if self.cache is None else "cache"


OURS = CacheConfig(fuzzy_threshold=2.0, best_effort="off")  # exact after the same writes, adapted where certified, else a miss
EXACT = replace(PAPER_CACHE, fuzzy_threshold=2.0, best_effort="off")
ARMS = {
    "live": Arm(None),
    "ours 100": Arm(OURS),
    "paper 100": Arm(PAPER_CACHE),
    "exact 100": Arm(EXACT),
    "ours 60": Arm(OURS, 0.6),
    "paper 60": Arm(PAPER_CACHE, 0.6),
    "exact 60": Arm(EXACT, 0.6),
}
# Paid by answers alone, a cache has more to lose.
ANSWERS_ONLY = {f"{name} answers": replace(ARMS[name], process_weight=0.0) for name in ("live", "ours 60", "paper 60", "exact 60")}


def world(seed: int) -> Config:
    return replace(load_config(ROOT / "configs" / "hard_world.py"), seed=seed)


class Seed:
    """One seed's folder: the initial policy, its recording, and an arm a folder."""

    def __init__(self, out: Path, config: Config) -> None:
        keep_settings(out, config.to_json())
        self.out, self.run = out, RunDirectory(out / "initial", config)
        for stage in (record.record, think.think, sft.supervised):
            stage(self.run, QUIET)
        self.config = inputs.model_config(self.run)
        self.specs, self.tok = inputs.load_specs(self.run), inputs.load_tokenizer(self.run)
        grpo_config = self.config.grpo
        self.trained = inputs.load_tasks(self.run, "train")[: grpo_config.steps * grpo_config.prompts]
        self.engine = Engine.of_run(self.config, self.tok.stop_ids)

    def initial(self) -> qwen3.Qwen3:
        return inputs.load_policy(self.run, "sft", self.config)

    def play(
        self, policy: qwen3.Qwen3, episodes: Sequence[tuple[Task, int]], tools: ToolProvider | None, path: Path, temperature: float
    ) -> tuple[list[Trajectory], int]:
        """Trajectories, kept in a file as they end, and the number of live calls that all of them took."""
        assert tools is not None, "the world's tools can be run"
        rollout = replace(self.config.rollout, temperature=temperature)
        with stream.TrajectoryStream(path) as streamed:
            played = runner.run(
                self.engine, self.engine.place(policy), self.tok, self.specs, episodes, tools, rollout, self.config.seed,
                finished=stream.read_stream(path).values(), on_done=streamed,
            )  # fmt: skip
        return played, sum(o.tier is Tier.LIVE for t in played for o in t.observations)

    def recorded(self) -> tuple[list[Transcript], int]:
        """What the initial policy did with live tools on the tasks of GRPO, and how many live calls that took."""
        episodes = [(task, sample) for task in self.trained for sample in range(SAMPLES)]
        played, calls = self.play(
            self.initial(),
            episodes,
            live_tools(self.config, "train"),
            self.out / "recording.jsonl",
            self.config.rollout.temperature,
        )
        return [as_transcript(t) for t in played], calls

    def store(self, name: str, arm: Arm) -> tuple[SQLiteStore, dict[str, Any]]:
        """The arm's store, made anew, and what it holds of the initial policy's calls."""
        assert arm.cache is not None
        by_policy, _ = self.recorded()
        demonstrated, _ = read_transcripts(self.run.out / "record" / "transcripts.jsonl")
        kept = kept_keys(by_policy, demonstrated, self.specs, arm.coverage, self.config.seed)
        asked = calls_by_key(by_policy, self.specs)
        path = self.out / name / "store.sqlite"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        store = SQLiteStore(path, mode="rw")
        describe(store, self.specs, arm.cache.key, {"source": "the expert and the initial policy on the embedded world"})
        with store.transaction():
            for transcript in (*demonstrated, *by_policy):
                for key, recording in keyed(transcript, self.specs, arm.cache):
                    if key in kept:
                        store.add(recording)
        if arm.cache.fidelity == "fitted":
            write_fitted(store, fit(store, self.specs, arm.cache))
        held = sum(asked[key] for key in kept) / asked.total() if asked else None
        return store, {"snapshot": snapshot_id(store), "initial_policy_calls_held": held}

    def arm(self, name: str, arm: Arm) -> None:
        """Trains and evaluates one arm, unless that is done; result.json is written last."""
        folder = self.out / name
        if (folder / "result.json").is_file():
            return
        start = time.process_time()
        weighed = replace(self.config.grpo, tools=arm.tools, process_weight=arm.process_weight)
        config = replace(self.config, grpo=weighed, cache=arm.cache or self.config.cache)
        keep_settings(folder, {"config": config.to_json(), "coverage": arm.coverage})
        facts: dict[str, Any] = {}
        tools: ToolProvider | None = live_tools(config, "train")
        if arm.cache is not None:
            store, facts = self.store(name, arm)
            tools = CachedTools(store, self.specs, arm.cache, config.seed)
        assert tools is not None
        held_out, unseen = inputs.load_tasks(self.run, "validation"), inputs.open_cache(self.run, "validation", self.specs)

        def validate(engine: Engine, model: qwen3.Qwen3) -> float:
            greedy = replace(config.rollout, temperature=0.0)
            played = runner.run(
                engine, model, self.tok, self.specs, [(task, EVALUATED) for task in held_out], unseen, greedy, config.seed
            )
            return sum(process_accuracy(t, r.calls_made, self.specs) for t, r in zip(held_out, played, strict=True)) / len(played)

        policy, facts["live_calls_of_rl"] = grpo.train(
            config, self.initial(), self.tok, self.trained, self.specs, tools, folder / "grpo", base=self.run.out / "sft",
            validate=validate, progress=PROGRESS,
        )  # fmt: skip
        facts["rollouts"] = config.grpo.steps * config.grpo.prompts * config.grpo.group
        rows = [row for row in metrics.read_metrics(folder / "grpo" / "metrics.jsonl") if "tiers" in row]
        facts["steps"] = [{name: row[name] for name in KEPT} for row in rows]
        facts |= self.evaluated(policy, folder)
        facts["cpu_seconds"] = round(time.process_time() - start, 1)
        write_json(folder / "result.json", facts)

    def evaluated(self, policy: qwen3.Qwen3, folder: Path) -> dict[str, Any]:
        """Greedy on the test tasks with live tools: a number a task, so that arms can be compared task by task."""
        tasks = inputs.load_tasks(self.run, "test")
        path = folder / "evaluation.jsonl"
        played, _ = self.play(policy, [(task, EVALUATED) for task in tasks], live_tools(self.config, "test"), path, 0.0)
        return {
            "families": [task.family for task in tasks],
            "process": [process_accuracy(task, t.calls_made, self.specs) for task, t in zip(tasks, played, strict=True)],
            "answer": [round(answer_reward(task, t), 4) for task, t in zip(tasks, played, strict=True)],
            "calls": sum(len(t.calls) for t in played) / len(played),
        }

    def without_rl(self) -> None:
        """The initial policy, with the cost of recording it; and the one cloned from the expert's transcripts alone."""
        for name in ("sft", "expert_sft"):
            folder = self.out / name
            if not (folder / "result.json").is_file():
                facts = self.evaluated(inputs.load_policy(self.run, name, self.config), folder)
                if name == "sft":
                    transcripts, calls = self.recorded()
                    demonstrated = self.run.require("record")["train"]["calls"]
                    facts |= {"recorded_episodes": len(transcripts), "live_calls_of_recording": calls}
                    facts["live_calls_of_demonstrations"] = demonstrated  # all tasks, also those that GRPO does not see
                write_json(folder / "result.json", facts)


def as_transcript(trajectory: Trajectory) -> Transcript:
    """The episode's live calls with their results: what a recording proxy would have seen."""
    messages: list[Message] = []
    for i, o in enumerate(o for o in trajectory.observations if o.tier is Tier.LIVE):
        call = ToolCall(o.call.name, o.call.arguments, id=f"call_{i}")
        messages.append(Message("assistant", tool_calls=(call,)))
        messages.append(Message("tool", o.result.content, tool_call_id=call.id, error=o.result.error))
    return Transcript(f"{trajectory.task_id}/policy/{trajectory.sample}", trajectory.task_id, "policy", (), tuple(messages))


def keyed(transcript: Transcript, specs: Mapping[str, ToolSpec], cache: CacheConfig) -> Iterator[tuple[bytes, Recording]]:
    """The recordings as this cache keys them, each under its key with the earlier writes: the same calls for every arm."""
    full = recordings(transcript, specs, "state")
    for whole, recording in zip(full, recordings(transcript, specs, cache.key), strict=True):
        yield whole.key, recording


def kept_keys(
    by_policy: Sequence[Transcript], others: Sequence[Transcript], specs: Mapping[str, ToolSpec], coverage: float, seed: int
) -> set[bytes]:
    """Keys of all transcripts in an order drawn by `seed`, until they are at least `coverage` of the calls made by the policy;
    with a coverage of 1 all."""
    asked = calls_by_key(by_policy, specs)
    if coverage == 1:
        return {*asked, *calls_by_key(others, specs)}
    kept: set[bytes] = set()
    held = 0
    for key in sorted({*asked, *calls_by_key(others, specs)}, key=lambda key: hashlib.sha256(b"%d %b" % (seed, key)).digest()):
        if held >= coverage * asked.total():
            break
        kept.add(key)
        held += asked[key]
    return kept


def calls_by_key(transcripts: Iterable[Transcript], specs: Mapping[str, ToolSpec]) -> Counter[bytes]:
    """How often each call was made; the same call after other writes to what it reads is another."""
    return Counter(r.key for t in transcripts for r in recordings(t, specs, "state"))


QUIET = metrics.progress_factory(enabled=False)
PROGRESS = metrics.progress_factory(enabled=os.isatty(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS | ANSWERS_ONLY), default=list(ARMS))
    parser.add_argument("--answers-only", dest="arms", action="store_const", const=list(ANSWERS_ONLY), help="those arms")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="a model that learns nothing, in seconds")
    args = parser.parse_args()
    for number in args.seeds:
        config = smoke(world(number)) if args.smoke else world(number)
        seed = Seed(args.out / f"seed{number}", config)
        seed.without_rl()
        for name in args.arms:
            seed.arm(name, (ARMS | ANSWERS_ONLY)[name])
            facts = json.loads((seed.out / name / "result.json").read_text())
            print(f"seed {number}, {name}: {sum(facts['process']) / len(facts['process']):.3f}", flush=True)


if __name__ == "__main__":
    main()
