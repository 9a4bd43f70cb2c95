"""`cacherl rollout`: plays tasks with a policy, every tool call answered from a store, into a folder of trajectories.

    OUT/rollouts/settings.json           what decides the tokens: configuration, store, tasks, weights
    OUT/rollouts/streamed.PROCESS.jsonl  episodes as they end; the same command goes on from there
    OUT/rollouts/trajectories.jsonl      all of them, in the order of the tasks
    OUT/rollouts/done.json               the result

Weights and tokenizer are a finished stage's, those of a folder made by `cacherl convert`, or random ones made from the seed
with a tokenizer trained on the tasks and the store: enough to try a configuration, its speed and its reproducibility.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacherl_jax.config import CACHE_PARTS, Config, ConfigError, RolloutConfig
from cacherl_jax.config.basics import parts

if TYPE_CHECKING:
    from cacherl_jax.cache.store import SQLiteStore
    from cacherl_jax.model import qwen3
    from cacherl_jax.rollout.fork import Replay
    from cacherl_jax.text.tokenizer import Tokenizer
    from cacherl_jax.trajectory import Trajectory
    from cacherl_jax.types import Task, ToolSpec

# What decides the tokens. Slots do not: rows in use change nothing.
_PARTS = (
    "inputs",
    "seed",
    "model",
    "mesh",
    "memory.compute",
    *CACHE_PARTS,
    "tokenizer",
    *parts("rollout", RolloutConfig, slots=()),
)


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--store", type=Path, required=True, help="the store that answers, an SQLite file")
    verb.add_argument("--tasks", type=Path, required=True, help="tasks as JSON Lines, such as a run's record/tasks.train.jsonl")
    verb.add_argument("--policy", type=Path, help="a finished stage, or a converted folder; without it: random weights")
    verb.add_argument("--samples", type=int, default=1, help="episodes a task (default 1)")
    verb.add_argument("--slots", type=int, help="rows in use, of all devices; short for --set rollout.slots=N")
    verb.add_argument("--replay", type=Path, metavar="FILE", help="trajectories to begin as; --turns of them, or all")
    verb.add_argument("--turns", type=int, metavar="K", help="with --replay: turns to repeat before the policy goes on")
    verb.add_argument("--without", metavar="ENTRY", help="answer as if the store had no such entry (its hash)")


def rollout(args: argparse.Namespace, config: Config, progress: Any) -> dict[str, Any]:
    """Returns counts, digests and the number of compiled programs. Raises ConfigError for what does not fit together."""
    from cacherl_jax.cache.imports import described
    from cacherl_jax.cache.snapshot import snapshot_id
    from cacherl_jax.cache.store import SQLiteStore
    from cacherl_jax.run_directory import RunDirectory

    if args.slots is not None:
        config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, slots=args.slots))
    tasks, samples = _tasks(args.tasks), args.samples
    if samples < 1:
        raise ConfigError(f"--samples {samples}: expected 1 or more")
    replays = _replays(args, tasks, samples)
    with SQLiteStore(args.store, mode="r") as store:
        specs, key = described(store)
        for task in tasks:
            if unknown := [name for name in task.tools if name not in specs]:
                raise ConfigError(f"--tasks {args.tasks}: task {task.id!r} lists tool {unknown[0]!r}, which {args.store} lacks")
        config = dataclasses.replace(config, cache=dataclasses.replace(config.cache, key=key))
        tok, config, model = _policy(args, config, tasks, store)
        inputs = {
            "store": snapshot_id(store),
            "tasks": _sha256(task.to_json() for task in tasks),
            "samples": samples,
            "weights": _fingerprint(model),
            "replay": _sha256([args.turns, *(r.trajectory.digest() for r in replays.values())]) if replays else "",
            "without": args.without or "",
        }
        run = RunDirectory(args.out, config, inputs)
        episodes = [(task, sample) for task in tasks for sample in range(samples)]

        def body(folder: Path) -> dict[str, Any]:
            provider = _provider(args, store, specs, config)
            return _play(folder, config, tok, model, specs, episodes, provider, replays, progress) | {"inputs": inputs}

        return run.run("rollouts", _PARTS, body)


def _play(
    folder: Path,
    config: Config,
    tok: Tokenizer,
    model: qwen3.Qwen3,
    specs: Mapping[str, ToolSpec],
    episodes: Sequence[tuple[Task, int]],
    provider: Any,
    replays: Mapping[tuple[str, int], Replay],
    progress: Any,
) -> dict[str, Any]:
    import jax

    from cacherl_jax import interrupts, processes
    from cacherl_jax.rollout import runner
    from cacherl_jax.rollout.engine import Engine
    from cacherl_jax.rollout.stream import TrajectoryStream, read_stream
    from cacherl_jax.whole_files import write_lines

    engine = Engine.of_run(config, tok.stop_ids)
    path = folder / f"streamed.{jax.process_index()}.jsonl"
    finished = read_stream(path)
    bar = progress(total=len(episodes), desc="rollout", initial=len(finished))
    with interrupts.held(), TrajectoryStream(path) as streamed, bar:

        def on_done(trajectory: Trajectory) -> None:
            streamed(trajectory)
            bar.update(1)

        trajectories = runner.run(
            engine, engine.place(model), tok, specs, episodes, provider, config.rollout, config.seed,
            replays=replays, finished=finished.values(), on_done=on_done,
        )  # fmt: skip
    if processes.is_first():
        write_lines(folder / "trajectories.jsonl", (t.to_json() for t in trajectories))
    result = summary(trajectories) | {"compilations": engine.compilations()}
    path.unlink()
    return result


def summary(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Counts, and digests that do not depend on the order of the episodes.

    tokens_sha256 covers the ids and who wrote them; trajectories_sha256 all that is stored but the times.
    """
    tokens = sorted((t.task_id, t.sample, t.tokens_T.tobytes().hex(), t.sampled_T.tobytes().hex()) for t in trajectories)
    return {
        "episodes": len(trajectories),
        "tokens_sha256": _sha256(tokens),
        "trajectories_sha256": _sha256(sorted(t.digest() for t in trajectories)),
        "tokens": sum(len(t.tokens_T) for t in trajectories),
        "sampled_tokens": int(sum(t.sampled_T.sum() for t in trajectories)),
        "stop_reasons": dict(sorted(Counter(t.stop.value for t in trajectories).items())),
        "tiers": dict(sorted(Counter(o.tier.value for t in trajectories for o in t.observations).items())),
    }


def _sha256(rows: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def _tasks(path: Path) -> list[Task]:
    from cacherl_jax.types import Task

    tasks: dict[str, Task] = {}
    lines = path.read_text().removesuffix("\n").split("\n")  # not splitlines(): texts may hold other ends of lines
    for number, line in enumerate(lines, 1):
        try:
            task = Task.from_json(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--tasks {path}:{number} is no task: {error!r}") from error
        if task.id in tasks:
            raise ConfigError(f"--tasks {path}:{number}: task {task.id!r} appears twice")
        tasks[task.id] = task
    if not tasks:
        raise ConfigError(f"--tasks {path} holds no task")
    return list(tasks.values())


def _replays(args: argparse.Namespace, tasks: Sequence[Task], samples: int) -> dict[tuple[str, int], Replay]:
    if args.replay is None:
        if args.turns is not None:
            raise ConfigError("--turns says how much of --replay FILE to repeat, and no file was given")
        return {}
    from cacherl_jax.rollout.fork import Replay
    from cacherl_jax.rollout.stream import read_stream

    if args.turns is not None and args.turns < 0:
        raise ConfigError(f"--turns {args.turns}: expected 0 or more")
    if not args.replay.is_file():
        raise ConfigError(f"--replay {args.replay} does not exist")
    try:
        read = read_stream(args.replay)
    except ValueError as error:
        raise ConfigError(f"--replay: {error}") from error
    asked = {(task.id, sample) for task in tasks for sample in range(samples)}
    stored = {episode: t for episode, t in read.items() if episode in asked}
    replays = {e: Replay(t, t.turns if args.turns is None else min(args.turns, t.turns)) for e, t in stored.items()}
    if not replays:
        raise ConfigError(f"--replay {args.replay} holds no trajectory of these tasks")
    return replays


def _provider(args: argparse.Namespace, store: SQLiteStore, specs: Mapping[str, ToolSpec], config: Config) -> Any:
    from cacherl_jax.cache.best_effort import open_simulator
    from cacherl_jax.cache.counterfactual import without_entry
    from cacherl_jax.cache.lookup import CachedTools

    simulator = open_simulator(config.cache, args.store.with_suffix(".simulated.sqlite"))
    answering = without_entry(store, args.without) if args.without else store
    return CachedTools(answering, specs, config.cache, config.seed, simulator=simulator)


def _policy(
    args: argparse.Namespace, config: Config, tasks: Sequence[Task], store: SQLiteStore
) -> tuple[Tokenizer, Config, qwen3.Qwen3]:
    import jax

    from cacherl_jax import model_folder
    from cacherl_jax.checkpoint import abstract_model, restore_model
    from cacherl_jax.mesh import make_mesh
    from cacherl_jax.model import qwen3
    from cacherl_jax.text.tokenizer import Tokenizer

    if args.policy is not None:
        tok = Tokenizer.load(model_folder.tokenizer_folder(args.policy))
    elif config.tokenizer.path:
        tok = Tokenizer.load(Path(config.tokenizer.path))
    else:
        tok = _trained_tokenizer(config, tasks, store)
    if args.policy is not None and model_folder.is_converted(args.policy):
        config = dataclasses.replace(config, model=model_folder.model_config(args.policy))
    else:
        # A stage that started from given weights has a vocabulary larger than its tokenizer.
        size = tok.vocab_size if args.policy is None else model_folder.model_config(args.policy).vocab_size
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
    mesh = make_mesh(config.mesh)
    if args.policy is None:
        return tok, config, qwen3.init(config.model, jax.random.key(config.seed), mesh)
    return tok, config, restore_model(args.policy / "checkpoints", abstract_model(config.model, mesh))


def _trained_tokenizer(config: Config, tasks: Sequence[Task], store: SQLiteStore) -> Tokenizer:
    from cacherl_jax.cache.imports import described
    from cacherl_jax.text import chat
    from cacherl_jax.text.tokenizer import train_tokenizer

    specs, _ = described(store)
    used = {name for task in tasks for name in task.tools}
    texts = [message.content for task in tasks for message in task.messages]
    texts += [text for entry in store.entries() for text in (entry.arguments, entry.result.content)]
    try:
        runs = chat.template_runs([spec for name, spec in specs.items() if name in used])
        return train_tokenizer(texts, runs, config.tokenizer.vocab_size)
    except ValueError as error:
        raise ConfigError(f"tokenizer.vocab_size: {error}; or name a --policy, whose tokenizer is used") from error


def _fingerprint(model: qwen3.Qwen3) -> str:
    """Of the weights' bits, made where they lie; the same for every layout."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def mixed(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        index = sum(
            (jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(step) for axis, step in enumerate(_steps(x.shape))),
            jnp.uint32(0),
        )
        word = (bits ^ (index * jnp.uint32(2654435761))) * jnp.uint32(2246822519)
        word = (word ^ (word >> 15)) * jnp.uint32(3266489917)
        return jnp.stack([word.sum(dtype=jnp.uint32), (word ^ (word >> 13)).sum(dtype=jnp.uint32)])

    return _sha256([[str(x.dtype), *x.shape, *mixed(x).tolist()] for x in jax.tree.leaves(model)])


def _steps(shape: Sequence[int]) -> list[int]:
    """By how much an element's number grows along each axis."""
    steps = [1]
    for size in reversed(shape[1:]):
        steps.append(steps[-1] * size)
    return steps[::-1]
