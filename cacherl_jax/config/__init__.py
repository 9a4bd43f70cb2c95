"""Configuration: frozen dataclasses, strict in names and types. A part lives in the module of its subject; run.py holds a
whole run and its way from and to JSON."""

from cacherl_jax.config.basics import ConfigError, EndpointConfig
from cacherl_jax.config.cache import CACHE_PARTS, PAPER_CACHE, CacheConfig, SimulatorConfig
from cacherl_jax.config.data import DataConfig, TokenizerConfig
from cacherl_jax.config.grpo import GrpoConfig, StopRules, WatchConfig
from cacherl_jax.config.iterate import IterateConfig, MixConfig, RejectionConfig
from cacherl_jax.config.model import LoraConfig, MemoryConfig, MeshConfig, ModelConfig, YarnConfig
from cacherl_jax.config.reward import REWARD_PARTS, JudgeConfig, RewardConfig
from cacherl_jax.config.rollout import MIN_TURN, EvalConfig, RolloutConfig
from cacherl_jax.config.run import Config, load_config, with_overrides
from cacherl_jax.config.smoke import smoke
from cacherl_jax.config.teacher import TEACHER_PARTS, TeacherConfig
from cacherl_jax.config.training import OptimizerConfig, SftConfig

__all__ = [
    "CACHE_PARTS",
    "MIN_TURN",
    "PAPER_CACHE",
    "REWARD_PARTS",
    "TEACHER_PARTS",
    "CacheConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EndpointConfig",
    "EvalConfig",
    "GrpoConfig",
    "IterateConfig",
    "JudgeConfig",
    "LoraConfig",
    "MemoryConfig",
    "MeshConfig",
    "MixConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RejectionConfig",
    "RewardConfig",
    "RolloutConfig",
    "SftConfig",
    "SimulatorConfig",
    "StopRules",
    "TeacherConfig",
    "TokenizerConfig",
    "WatchConfig",
    "YarnConfig",
    "load_config",
    "smoke",
    "with_overrides",
]
