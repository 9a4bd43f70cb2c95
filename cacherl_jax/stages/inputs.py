"""What stages hand to each other through the run's folder: tools, tasks, stores, the tokenizer, the model."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path

from cacherl_jax import checkpoint, model_folder
from cacherl_jax.cache.best_effort import open_simulator
from cacherl_jax.cache.lookup import CachedTools
from cacherl_jax.cache.snapshot import snapshot_id
from cacherl_jax.cache.store import SQLiteStore, StoreError
from cacherl_jax.config import CACHE_PARTS, REWARD_PARTS, TEACHER_PARTS, Config, ConfigError, ModelConfig
from cacherl_jax.mesh import make_mesh
from cacherl_jax.model import qwen3
from cacherl_jax.rollout.engine import Engine
from cacherl_jax.run_directory import RunDirectory
from cacherl_jax.text.tokenizer import Tokenizer
from cacherl_jax.tools.registry import specs_from_json
from cacherl_jax.trajectory import Trajectory
from cacherl_jax.types import Task, ToolSpec

SPLITS = ("train", "validation", "test")
POLICIES = ("sft", "expert_sft", "grpo")

# The configuration that each stage depends on.
RECORD = ("seed", "data", *CACHE_PARTS)
THINK = (*RECORD, *TEACHER_PARTS, "tokenizer", "weights")
MODEL = ("model", "mesh", "memory.compute")  # the rest of memory changes rounding at most
SFT = (*THINK, *MODEL, "sft", "rollout.context", "rollout.max_tool_tokens")
GRPO = (*THINK, *MODEL, "sft", "rollout", *REWARD_PARTS, "grpo")
REJECTION = (*GRPO, "iterate.rejection")
MERGED = (*REJECTION, "iterate.mix")  # all that stands on what earlier rounds accepted

EVAL_SAMPLE = 0

STORES = {"train": "training.sqlite", "validation": "validation.sqlite", "test": "evaluation.sqlite"}


def load_specs(run: RunDirectory) -> dict[str, ToolSpec]:
    return specs_from_json(json.loads((run.out / "record" / "tools.json").read_text()))


def load_tasks(run: RunDirectory, split: str) -> list[Task]:
    lines = (run.out / "record" / f"tasks.{split}.jsonl").read_text().splitlines()
    return [Task.from_json(json.loads(line)) for line in lines]


def load_tokenizer(run: RunDirectory) -> Tokenizer:
    return Tokenizer.load(run.out / "think" / "tokenizer")


# What of a ModelConfig does not define the function that given weights compute.
FREE = {"dtype", "initializer_range", "embedding_range"}


def check_weights(config: Config) -> None:
    """Raises ConfigError unless `config.model` says what the model in `config.weights` is, and with the fields that differ."""
    if not config.weights:
        return
    folder = Path(config.weights)
    if not model_folder.is_converted(folder):
        raise ConfigError(f"weights={config.weights!r} is no folder made by `cacherl convert`: it holds no model.json")
    given, asked = (dataclasses.asdict(c) for c in (model_folder.model_config(folder), config.model))
    if not asked["vocab_size"]:
        asked["vocab_size"] = given["vocab_size"]
    differing = [f"model.{k}={asked[k]!r}, there {given[k]!r}" for k in given if k not in FREE and given[k] != asked[k]]
    if differing:
        raise ConfigError(f"the configuration does not describe the model in {folder}: {'; '.join(differing)}")


def model_config(run: RunDirectory) -> Config:
    """The run's configuration with the vocabulary's size filled in: of the weights it starts from, else the one it names,
    else the tokenizer's. Raises ConfigError when the tokenizer has more tokens than the model."""
    config, tokens = run.config, run.require("think")["vocab_size"]
    size = model_folder.model_config(Path(config.weights)).vocab_size if config.weights else config.model.vocab_size
    if size and size < tokens:
        raise ConfigError(f"the tokenizer has {tokens} tokens, the model's vocabulary {size}")
    model: ModelConfig = dataclasses.replace(config.model, vocab_size=size or tokens)
    return dataclasses.replace(config, model=model)


def open_cache(run: RunDirectory, split: str, specs: Mapping[str, ToolSpec]) -> CachedTools:
    store, config = SQLiteStore(run.out / "record" / STORES[split], mode="r"), run.config.cache
    recorded, found = run.require("record")[split]["snapshot"], snapshot_id(store)
    if found != recorded:
        raise StoreError(f"store {store.path} has changed since it was recorded: snapshot {found}, recorded as {recorded}")
    # Replies of one split's calls are kept apart: what training was told is never told in evaluation.
    simulator = open_simulator(config, run.out / "record" / f"simulated.{split}.sqlite")
    return CachedTools(store, specs, config, run.config.seed, simulator=simulator)


def load_policy(run: RunDirectory, stage: str, config: Config) -> qwen3.Qwen3:
    """The trained model of a finished stage."""
    like = checkpoint.abstract_model(config.model, make_mesh(config.mesh))
    return checkpoint.restore_model(run.out / stage / "checkpoints", like)


@functools.lru_cache(maxsize=1)
def open_engine(config: Config, stop_ids: tuple[int, ...]) -> Engine:
    """The run's engine; the last one opened is kept with its programs, since a run of rounds plays many policies by one."""
    return Engine.of_run(config, stop_ids)


def load_trajectories(path: Path) -> list[Trajectory]:
    return [Trajectory.from_json(json.loads(line)) for line in path.read_text().splitlines()]


def given_tokenizer(config: Config) -> Path | None:
    """The folder of the tokenizer that the configuration names, itself or with its weights; None: one is trained."""
    if config.tokenizer.path:
        return Path(config.tokenizer.path)
    return model_folder.tokenizer_folder(Path(config.weights)) if config.weights else None
