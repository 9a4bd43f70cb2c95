"""How busy are the rows, and does anything compile anew? Runs of the runner, watched dispatch by dispatch.

Command:  python experiments/rollouts/rows.py --out runs/rollouts       (after determinism.py, whose policy it plays too)
Cost:     about 5 CPU-minutes on two cores; what is measured is kept in --out
Expect:   with instant tools n of n + 1 dispatches of a turn that takes n; no compilation in 1,000 episodes; rows.json

Turn lengths are drawn: a model of one small layer samples nearly at random, a turn ends at any of a set of stop ids after a
floor, and whatever was sampled reads as one tool call. What rows do depends on lengths and latencies, not on what is said.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from play import Paced

from cacherl_jax.cache.imports import described
from cacherl_jax.cache.lookup import CachedTools
from cacherl_jax.cache.store import SQLiteStore
from cacherl_jax.checkpoint import restore_model
from cacherl_jax.config import Config, ModelConfig, RolloutConfig
from cacherl_jax.model import qwen3
from cacherl_jax.rollout import runner
from cacherl_jax.rollout.engine import Engine
from cacherl_jax.text import chat
from cacherl_jax.text.tokenizer import Tokenizer, train_tokenizer
from cacherl_jax.trajectory import Source, Trajectory
from cacherl_jax.types import Kind, Message, Observation, Task, Tier, ToolCall, ToolProvider, ToolResult, ToolSpec

HERE = Path(__file__).parent
ROWS, TURNS = 32, 3
SPEC = ToolSpec("find", "", {"type": "object", "properties": {"q": {"type": "string"}}})
CALL = '</think><tool_call>\n{"name": "find", "arguments": {"q": "a"}}\n</tool_call>'
# Tokens of a turn: a floor and, after it, one stop id in so many. The last is like a thinking model's.
LENGTHS = {"short": (4, 10), "middling": (16, 20), "long": (60, 60), "thinking": (150, 200)}


class Anything:
    """Equal to any id: every turn counts as ended."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # pyright: ignore[reportAssignmentType]


class Calling:
    """A tokenizer to which every sampled turn reads as one call."""

    im_end = Anything()

    def __init__(self, tok: Tokenizer) -> None:
        self.encode, self.encode_parts, self.encode_content = tok.encode, tok.encode_parts, tok.encode_content

    def decode(self, ids: Sequence[int]) -> str:
        return CALL


class Instant:
    """Answers at once, with a text whose length depends on the episode."""

    blocking = False

    def start(self, task: Task, sample: int) -> Any:
        class Session:
            def execute(self, call: ToolCall, index: int) -> Observation:
                words = random.Random(f"{task.id}/{sample}/{index}").randint(1, 60)
                return Observation(call, ToolResult("found " * words), Tier.EXACT, Kind.RECORDED)

        return Session()


TOK = train_tokenizer(["found find a word"] * 3, chat.template_runs([SPEC]), 320)
MODEL = ModelConfig(
    vocab_size=TOK.vocab_size, hidden_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, intermediate_size=16,
    embedding_range=0.02,
)  # fmt: skip


def task_of(number: int, words: int) -> Task:
    return Task(f"t-{number}", "f", "train", ("find",), (Message("user", "word " * words),), ((),))


def watched(engine: Engine, *arguments: Any) -> tuple[list[Trajectory], list[runner.Dispatch], float]:
    """Trajectories, dispatches and wall seconds of one run, after another one that compiled its programs."""
    dispatches: list[runner.Dispatch] = []
    began = time.monotonic()
    trajectories = runner.run(engine, *arguments, on_dispatch=dispatches.append)
    return trajectories, dispatches, time.monotonic() - began


def facts(engine: Engine, trajectories: list[Trajectory], dispatches: list[runner.Dispatch], wall: float) -> dict[str, Any]:
    """Shares over the dispatches at whose launch episodes still waited for a row, and over all for ready rows."""
    turns = [s.stop - s.start for t in trajectories for s in t.segments if s.source is Source.SAMPLED]
    n = float(np.mean([-(-length // engine.steps) for length in turns]))
    queue = [d for d in dispatches if d.queued]
    rows = engine.rows * len(queue)
    waited = sum(d.device_seconds for d in dispatches)
    return {
        "episodes": len(trajectories),
        "tokens_a_turn": round(float(np.mean(turns)), 1),
        "decode_steps": engine.steps,
        "dispatches_a_turn": round(n, 2),
        "n_of_n_plus_1": round(n / (n + 1), 4),
        "dispatches_with_a_queue": len(queue),
        "rows_that_keep_a_token": round(sum(d.advanced for d in queue) / rows, 4),
        "row_steps_that_keep_a_token": round(sum(d.tokens for d in queue) / rows / engine.steps, 4),
        "ready_rows_that_advance": round(sum(d.advanced for d in dispatches) / sum(d.ready for d in dispatches), 4),
        "rows_that_wait_for_tools": round(1 - sum(d.ready for d in queue) / sum(d.used for d in queue), 4),
        "wall_ms_a_dispatch": round(wall / len(dispatches) * 1e3, 3),
        "waited_for_the_device_ms": round(waited / len(dispatches) * 1e3, 3),
        "share_not_waiting": round(1 - waited / wall, 4),
    }


def drawn(length: str, steps: int, longest: float | None, episodes: int) -> dict[str, Any]:
    """Turns of drawn lengths; tools at once, or of 0 to `longest` seconds."""
    floor, one_in = LENGTHS[length]
    most = floor + 3 * one_in
    config = RolloutConfig(
        rows=ROWS, context=100 + TURNS * (most + 100), decode_steps=steps, max_turns=TURNS, max_turn_tokens=most,
        max_sampled_tokens=TURNS * most, max_tool_tokens=64, min_tokens=(floor,) * TURNS,
    )  # fmt: skip
    engine = Engine(MODEL, config, range(0, MODEL.vocab_size, one_in))
    model = engine.place(qwen3.init(MODEL, jax.random.key(0)))
    provider: ToolProvider = Instant() if longest is None else Paced(Instant(), longest, 0)
    play = [(task_of(i, i % 40 + 1), sample) for i in range(episodes // 4) for sample in range(4)]
    runner.run(engine, model, Calling(TOK), {"find": SPEC}, play[:8], Instant(), config, 1)  # pyright: ignore[reportArgumentType]
    return facts(engine, *watched(engine, model, Calling(TOK), {"find": SPEC}, play, provider, config, 0))


def policy_of(out: Path, steps: int, longest: float | None) -> dict[str, Any]:
    """The policy of determinism.py at its own turn lengths, its calls answered by the cache."""
    run = out / "policy"
    tok = Tokenizer.load(run / "think" / "tokenizer")
    config = Config.from_json(json.loads((run / "run.json").read_text())["config"])
    shape = dataclasses.replace(config.model, vocab_size=tok.vocab_size)
    rollout = dataclasses.replace(config.rollout, rows=ROWS, decode_steps=steps)
    engine = Engine(shape, rollout, [tok.im_end])
    model = engine.place(restore_model(run / "sft" / "checkpoints", qwen3.init(shape, jax.random.key(0))))
    lines = (run / "record" / "tasks.validation.jsonl").read_text().splitlines()[:50]
    play = [(Task.from_json(json.loads(line)), sample) for line in lines for sample in range(4)]
    with SQLiteStore(run / "record" / "training.sqlite", mode="r") as store:
        specs, key = described(store)
        cached = CachedTools(store, specs, dataclasses.replace(config.cache, key=key), 0)
        runner.run(engine, model, tok, specs, play[:8], cached, rollout, 1)
        provider = cached if longest is None else Paced(cached, longest, 0)
        return facts(engine, *watched(engine, model, tok, specs, play, provider, rollout, 0))


def compilations(episodes: int) -> dict[str, Any]:
    """Programs compiled by a warm-up that reads prompts of every width, and by ragged episodes after it."""
    rng = random.Random(0)
    config = RolloutConfig(rows=16, context=2048, decode_steps=8, max_turns=4, max_turn_tokens=200, max_tool_tokens=2000)
    engine = Engine(MODEL, config, range(0, MODEL.vocab_size, 16))
    model = engine.place(qwen3.init(MODEL, jax.random.key(0)))

    def play(tasks: list[Task], group: int, config: RolloutConfig) -> int:
        asked = [(task, sample) for task in tasks for sample in range(group)]
        tools = Instant()
        return len(runner.run(engine, model, Calling(TOK), {"find": SPEC}, asked, tools, config, 0))  # pyright: ignore[reportArgumentType]

    warm = play([task_of(i, words) for i, words in enumerate([1, 10, 20, 60, 120, 250, 500, 800])], 3, config)
    before, played, runs = engine.compilations(), 0, 0
    while played < episodes:
        turn = rng.randint(8, 300)
        changed = dataclasses.replace(
            config,
            slots=rng.randint(1, 16),
            max_turns=rng.randint(1, 6),
            max_turn_tokens=turn,
            max_sampled_tokens=rng.randint(8, 900),
            max_tool_tokens=rng.randint(1, 128),
            min_tokens=tuple(rng.randrange(turn) for _ in range(rng.randrange(3))),
            temperature=rng.choice([0.0, 0.5, 1.0]),
        )
        tasks = [task_of(runs * 100 + i, int(2 ** rng.uniform(0, 9.7))) for i in range(rng.randint(1, 12))]
        played, runs = played + play(tasks, rng.choice([1, 2, 3, 5, 8, 16]), changed), runs + 1
    new = engine.compilations() - before
    return {"warm_up_episodes": warm, "warm_up_compilations": before, "episodes": played, "runs": runs, "new_compilations": new}


def main() -> None:
    parser = argparse.ArgumentParser(description="How busy are the rows, and does anything compile anew?")
    parser.add_argument("--out", type=Path, required=True, help="the --out of determinism.py")
    args = parser.parse_args()
    kept = args.out / "rows.json"  # what is measured is not measured again
    result: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}

    def put(name: str, measure: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        if name not in result:
            result[name] = measure(*arguments)
            kept.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(result[name]), flush=True)

    put("compilations", compilations, 1000)
    for steps in (1, 2, 4, 8):
        put(f"instant, policy, {steps} steps", policy_of, args.out, steps, None)
    for length in LENGTHS:
        for steps in (1, 4, 8):
            put(f"instant, {length}, {steps} steps", drawn, length, steps, None, 192)
    for length, steps in [("short", 1), ("middling", 1), ("middling", 4), ("long", 4), ("thinking", 4), ("thinking", 8)]:
        put(f"0 to 2 s, {length}, {steps} steps", drawn, length, steps, 2.0, 192)
    put("0 to 2 s, policy, 4 steps", policy_of, args.out, 4, 2.0)
    (HERE / "rows.json").write_text(kept.read_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
