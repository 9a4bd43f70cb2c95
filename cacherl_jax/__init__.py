"""CacheRL in JAX: multi-step tool-calling agents by SFT and GRPO, without a live tool in reinforcement learning."""

from importlib import metadata

from cacherl_jax.versions import check_pair

check_pair(metadata.version("jax"), metadata.version("flax"))
