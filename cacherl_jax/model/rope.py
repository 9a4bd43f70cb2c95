"""Frequencies of rotary position embeddings: plain, or by YaRN for contexts beyond those of pretraining.

They depend on the configuration alone, so NumPy computes them once, and a compiled program holds them as constants.
"""

from __future__ import annotations

import math

import numpy as np

from cacherl_jax.config import ModelConfig, YarnConfig


def frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Radians a position for each of head_dim / 2 pairs, [H/2] in float32, and the factor of sines and cosines.

    As transformers computes them in float32, within the last bit. Source: Su et al., arXiv 2104.09864; YaRN: Peng et al.,
    arXiv 2309.00071.
    """
    dim, yarn = config.head_dim, config.yarn
    exponents_h = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    # NumPy's own float32 power is off in the last bit more often than PyTorch's.
    periods_h = np.power(config.rope_theta, exponents_h.astype(np.float64)).astype(np.float32)
    plain_h = np.float32(1) / periods_h
    if yarn.factor == 1:
        return plain_h, 1.0
    stretched_h = np.float32(1) / (np.float32(yarn.factor) * periods_h)
    # Pairs that turn often within the original context stay, those that never turn once are stretched, with a ramp between.
    low, high = (_pair(turns, config) for turns in (yarn.beta_fast, yarn.beta_slow))
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = 0.001 if low == high else high - low
    stay_h = 1 - np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    return stretched_h * (1 - stay_h) + plain_h * stay_h, attention_factor(yarn)


def _pair(turns: float, config: ModelConfig) -> float:
    """The index, not rounded, of the pair that turns so often within the original context."""
    context = config.yarn.original_max_position_embeddings
    return config.head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))


def attention_factor(yarn: YarnConfig) -> float:
    """What sines and cosines are multiplied by: scores grow with its square, as attention over more keys needs it."""
    if yarn.attention_factor is not None:
        return yarn.attention_factor

    def grown(by: float) -> float:
        return 0.1 * by * math.log(yarn.factor) + 1.0

    if yarn.mscale and yarn.mscale_all_dim:
        return grown(yarn.mscale) / grown(yarn.mscale_all_dim)
    return grown(1.0)
