"""Configuration: frozen dataclasses, strict in names and types, to and from JSON. Presets live in configs/, one file a run.

A preset is a Python file with `get_config() -> Config`; presets derive from each other with `dataclasses.replace`.
`--set grpo.steps=4` changes one field; an unknown name or a value of another type is refused before any work.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from cacherl_jax.config.basics import ConfigError, Count, require
from cacherl_jax.config.cache import CacheConfig
from cacherl_jax.config.data import DataConfig, TokenizerConfig
from cacherl_jax.config.grpo import GrpoConfig
from cacherl_jax.config.iterate import IterateConfig
from cacherl_jax.config.model import MemoryConfig, MeshConfig, ModelConfig
from cacherl_jax.config.reward import RewardConfig
from cacherl_jax.config.rollout import EvalConfig, RolloutConfig
from cacherl_jax.config.teacher import TeacherConfig
from cacherl_jax.config.training import SftConfig


@dataclass(frozen=True)
class Config:
    """A whole run. Each stage reads its own part; `seed` reaches every random draw by derivation."""

    name: str = "demo"
    seed: Count = 0
    weights: str = ""  # a folder made by `cacherl convert`, to start from; "": random weights
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    memory: MemoryConfig = MemoryConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    cache: CacheConfig = CacheConfig()
    teacher: TeacherConfig = TeacherConfig()
    sft: SftConfig = SftConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    grpo: GrpoConfig = GrpoConfig()
    eval: EvalConfig = EvalConfig()
    iterate: IterateConfig = IterateConfig()

    def __post_init__(self) -> None:
        require(
            self.cache.on_miss != "live",
            "cache.on_miss='live' cannot be run: no stage of a run may reach a live tool; use error, nearest or fail",
        )
        require(
            not self.grpo.packed_length or self.grpo.packed_length >= self.rollout.context,
            f"grpo.packed_length={self.grpo.packed_length} is below rollout.context={self.rollout.context}; "
            "an episode of that many tokens would fit into no row",
        )
        require(
            self.grpo.stops.soft_tokens <= self.rollout.max_sampled_tokens,
            f"grpo.stops.soft_tokens={self.grpo.stops.soft_tokens} is above rollout.max_sampled_tokens="
            f"{self.rollout.max_sampled_tokens}; every episode would be penalised",
        )

    @property
    def rollout_model(self) -> ModelConfig:
        """The model as rollouts hold it: weights in the dtype of matrix products."""
        compute = self.memory.compute
        return self.model if compute == "weights" else dataclasses.replace(self.model, dtype=compute)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Config:
        """Strict: unknown fields and values of another type raise ConfigError with the field's path."""
        return _validated(_as_tuples(data))


# JSON has no tuples; strict validation wants them back where the dataclass has them.
def _as_tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _as_tuples(v) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(_as_tuples(v) for v in value)
    return value


def _known_fields(cls: type, data: Mapping[str, Any], path: str = "") -> None:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name, value in data.items():
        if name not in fields:
            known = ", ".join(fields)
            raise ConfigError(f"unknown field {path + name!r}; {path.rstrip('.') or 'the config'} has: {known}")
        default = fields[name].default
        if dataclasses.is_dataclass(default) and isinstance(value, Mapping):
            _known_fields(type(default), value, f"{path}{name}.")


_ADAPTER: pydantic.TypeAdapter[Config] = pydantic.TypeAdapter(Config)


def _validated(data: Mapping[str, Any]) -> Config:
    _known_fields(Config, data)
    try:
        # JSON mode: ints are accepted for floats and lists for tuples, nothing else is converted.
        return _ADAPTER.validate_json(json.dumps(data), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise ConfigError(f"{where or 'config'} = {first['input']!r}: {first['msg']}") from error


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with each "a.b=value" applied. Values are JSON; text that is not JSON is taken as a string."""
    data = config.to_json()
    for override in overrides:
        path, eq, text = override.partition("=")
        if not eq:
            raise ConfigError(f"--set {override!r}: expected NAME=VALUE, for example grpo.steps=4")
        node: Any = data
        *parents, leaf = path.strip().split(".")
        for parent in parents:
            if not isinstance(node, dict) or parent not in node:
                raise ConfigError(f"--set {override!r}: no field {parent!r}; known here: {', '.join(node)}")
            node = node[parent]
        if not isinstance(node, dict) or leaf not in node:
            known = ", ".join(node) if isinstance(node, dict) else "none"
            raise ConfigError(f"--set {override!r}: no field {leaf!r}; known here: {known}")
        try:
            node[leaf] = json.loads(text)
        except json.JSONDecodeError:
            node[leaf] = text
    return _validated(data)


def load_config(path: str | Path) -> Config:
    """Runs a preset file and returns its `get_config()`. A .json file is read as written by `Config.to_json`, or as a run's
    run.json, which holds it beside versions."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    if path.suffix == ".json":
        try:
            data = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ConfigError(f"config file {path} is no JSON: {error}") from error
        return Config.from_json(data["config"] if isinstance(data, dict) and "versions" in data else data)
    get_config = runpy.run_path(str(path)).get("get_config")
    if get_config is None:
        raise ConfigError(f"{path} defines no get_config()")
    config = get_config()
    require(isinstance(config, Config), f"get_config() of {path} returned {type(config).__name__}, expected Config")
    return config
