"""Trains one policy under three rewards in a world where leaving the cache pays, and evaluates each with live tools.

Command:  python experiments/reward_hacking/run.py --out runs/reward_hacking
Cost:     about 6 CPU-minutes a seed; goes on where it was stopped; --smoke is two steps of a tiny model, for the tests
Writes:   result.json, figure.png and table.md beside this file, or in the folder named by --result
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import figure
import world
from random_groups import DIVIDED, mean_advantages

from cacherl_jax import metrics
from cacherl_jax.cache.lookup import CachedTools, record_transcript
from cacherl_jax.cache.store import MemoryStore
from cacherl_jax.config import (
    PAPER_CACHE,
    Config,
    GrpoConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    SftConfig,
    smoke,
)
from cacherl_jax.evaluate import process_accuracy
from cacherl_jax.model import qwen3
from cacherl_jax.reward import monitor
from cacherl_jax.rollout import runner
from cacherl_jax.rollout.engine import Engine
from cacherl_jax.run_directory import keep_settings
from cacherl_jax.text import chat
from cacherl_jax.text.tokenizer import Tokenizer, train_tokenizer
from cacherl_jax.train import grpo, sft
from cacherl_jax.trajectory import Trajectory
from cacherl_jax.types import Task
from cacherl_jax.whole_files import write_json

# How tiers count. All three pay the paper's process reward, which does not know what was asked.
ARMS = ("paper", "none", "calibrated")
AGENTS = ("expert", "expert", "hasty")
HERE, SEEDS = Path(__file__).parent, [0, 1, 2]


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of the experiment is run."""

    train: int
    held_out: int
    test: int
    groups: int  # of the table of random groups


FULL, SMOKE = Size(2000, 50, 300, 10_000), Size(24, 4, 6, 200)


def configuration(seed: int, small: bool) -> Config:
    config = Config(
        name="reward_hacking",
        seed=seed,
        cache=PAPER_CACHE,
        model=ModelConfig(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=192),
        sft=SftConfig(steps=500, tokens_per_batch=2048, packed_length=128, optimizer=OptimizerConfig(learning_rate=4.5e-3)),
        rollout=RolloutConfig(context=128, max_turns=3, max_turn_tokens=40, max_sampled_tokens=80),
        reward=RewardConfig(process="paper"),
        grpo=GrpoConfig(
            steps=40, prompts=8, group=8, kl_coef=0.0, tokens_per_batch=4096, packed_length=128, checkpoint_every=10,
            validate_every=40, optimizer=OptimizerConfig(name="adamw", learning_rate=3e-4, warmup_steps=2, schedule="constant"),
        ),
    )  # fmt: skip
    return smoke(config) if small else config


class Seed:
    """One seed's world, tokenizer and SFT model, and a policy trained from it for each arm."""

    def __init__(self, out: Path, seed: int, size: Size, small: bool) -> None:
        self.out, self.seed = out / f"seed{seed}", seed
        self.progress = metrics.progress_factory(True)
        self.tasks = {
            split: world.tasks(split, count, seed)
            for split, count in zip(world.SPLITS, (size.train, size.held_out, size.test), strict=True)
        }
        transcripts = world.recorded(self.tasks["train"], AGENTS, seed)
        self.tok = _tokenizer(transcripts)
        config = configuration(seed, small)
        model = dataclasses.replace(config.model, vocab_size=self.tok.vocab_size)
        self.config = dataclasses.replace(config, model=model)
        keep_settings(self.out, {"config": self.config.to_json(), "size": dataclasses.asdict(size)})
        rows, too_long = sft.transcript_rows(
            self.tok, transcripts, world.SPECS, context=config.rollout.context, max_tool_tokens=config.rollout.max_tool_tokens
        )
        assert not too_long, f"{too_long} transcripts are longer than the context"
        self.engine = Engine.of_run(self.config, self.tok.stop_ids)
        self.reference = sft.train(self.config, rows, self.out / "sft", progress=self.progress)

    def cache(self, split: str) -> CachedTools:
        """A store of the expert's calls alone."""
        store = MemoryStore()
        for transcript in world.recorded(self.tasks[split], ("expert",), self.seed):
            record_transcript(store, transcript, world.SPECS, self.config.cache.key)
        return CachedTools(store, world.SPECS, self.config.cache, self.seed)

    def play(self, model: qwen3.Qwen3, split: str, provider: Any) -> list[Trajectory]:
        """Each task once, drawn as in training."""
        episodes: list[tuple[Task, int]] = [(task, 0) for task in self.tasks[split]]
        return runner.run(
            self.engine, self.engine.place(model), self.tok, world.SPECS, episodes, provider, self.config.rollout, self.seed
        )

    def live(self, model: qwen3.Qwen3) -> dict[str, Any]:
        """Process and answer accuracy on test tasks with the live tool."""
        played = self.play(model, "test", world.Warehouse(self.seed))
        return process_accuracy.evaluate(self.tasks["test"], played, world.SPECS).to_json()

    def run(self, arm: str) -> dict[str, Any]:
        """Training under one reward: what every step's rollouts were worth, and the policy with live tools after it."""
        folder = self.out / arm
        done = folder / "result.json"
        if done.is_file():
            return json.loads(done.read_text())
        reward = dataclasses.replace(self.config.reward, tier=arm)
        how = dataclasses.replace(self.config.grpo, divide_by_std=arm in DIVIDED)
        config, held_out = dataclasses.replace(self.config, reward=reward, grpo=how), self.cache("validation")

        def validate(engine: Engine, model: qwen3.Qwen3) -> float:
            played = self.play(model, "validation", held_out)
            return process_accuracy.evaluate(self.tasks["validation"], played, world.SPECS).process.mean

        model, live_calls = grpo.train(
            config, self.reference, self.tok, self.tasks["train"], world.SPECS, self.cache("train"), folder,
            base=self.out / "sft", validate=validate, progress=self.progress,
        )  # fmt: skip
        steps, warned = watched(folder)
        result = {"steps": steps, "warned": warned, "live_calls": live_calls, "live": self.live(model)}
        write_json(done, result)
        return result


def _tokenizer(transcripts: list[Any]) -> Tokenizer:
    texts = [text for t in transcripts for m in t.messages for text in (m.reasoning or "", m.content)]
    runs = chat.template_runs(list(world.SPECS.values()))
    return train_tokenizer(texts, runs, 256 + 60 + len(set(runs)))


def watched(folder: Path) -> tuple[list[dict[str, float]], dict[str, dict[str, Any]]]:
    """What the monitor said of every step's rollouts, and of each of its warnings the first step and the text."""
    steps: list[dict[str, float]] = []
    warned: dict[str, dict[str, Any]] = {}
    for row in metrics.read_metrics(folder / "metrics.jsonl"):
        if "monitor" in row:
            shown = {"left": "gone", "reward": "reward", "reference": "reference"}
            steps.append({name: monitor.Moments(*row["monitor"][of]).mean for name, of in shown.items()})
            for text in row["warnings"]:
                warned.setdefault(text.partition(":")[0], {"step": row["step"], "text": text})
    return steps, warned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reward_hacking"), help="folder of the runs; the same one goes on")
    parser.add_argument("--result", type=Path, default=HERE, help="folder of the figures; another one for less than all")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS))
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.result == HERE and (args.smoke or args.arms != list(ARMS) or args.seeds != SEEDS):
        parser.error("figures of a part would replace those of the whole; name another --result")
    size = SMOKE if args.smoke else FULL
    seeds: dict[str, Any] = {}
    for number in args.seeds:
        start = time.process_time()
        seed = Seed(args.out, number, size, args.smoke)
        before = seed.out / "sft" / "live.json"
        if not before.is_file():
            write_json(before, seed.live(seed.reference))
        seeds[str(number)] = {"sft": json.loads(before.read_text())} | {arm: seed.run(arm) for arm in args.arms}
        print(f"seed {number}: {time.process_time() - start:.0f} CPU-seconds", file=sys.stderr)
    result = {"seeds": seeds, "random_groups": mean_advantages(size.groups)}
    args.result.mkdir(parents=True, exist_ok=True)
    write_json(args.result / "result.json", result)
    figure.draw(result, args.result / "figure.png")
    (args.result / "table.md").write_text(figure.tables(result))


if __name__ == "__main__":
    main()
