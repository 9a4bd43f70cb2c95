"""Optimizers from optax, with the schedule and clipping that a configuration asks for."""

from __future__ import annotations

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from cacherl_jax.config import OptimizerConfig


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The transformation for a run of `steps` updates: clip by global norm, then AdamW, or Muon on matrices with Adam on
    embeddings and norms (Muon: https://kellerjordan.github.io/posts/muon)."""
    if config.name == "adamw":
        optimizer = optax.adamw(
            _schedule(config, config.learning_rate, steps), config.b1, config.b2, weight_decay=config.weight_decay
        )
    else:
        optimizer = muon(
            _schedule(config, config.learning_rate, steps),
            adam_learning_rate=_schedule(config, config.adam_learning_rate, steps),
            adam_b1=config.b1,
            adam_b2=config.b2,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_matrices,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def _schedule(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    warmup = min(config.warmup_steps, steps)
    rest = max(1, steps - warmup)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=0.05),
        "linear": optax.linear_schedule(peak, 0.05 * peak, rest),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, max(1, warmup)), after], [warmup])


# Which axes of a stacked weight a matrix product sums over, by the letters of its name. The stacking axis 0 is a batch.
_REDUCTION_AXES = {"DNH": (1,), "DKH": (1,), "NHD": (1, 2), "DF": (1,), "FD": (1,)}


def _matrices(params: Any) -> Any:
    """Muon's dimension numbers for every parameter of a Qwen3; None for those that Adam updates."""

    def of(name: str, shape: tuple[int, ...]) -> MuonDimensionNumbers | None:
        reduction = _REDUCTION_AXES.get(name.rsplit("_", 1)[-1])
        if reduction is None:
            return None
        output = tuple(axis for axis in range(1, len(shape)) if axis not in reduction)
        return MuonDimensionNumbers(reduction_axis=reduction, output_axis=output)

    def walk(path: Any, leaf: Any) -> MuonDimensionNumbers | None:
        names = [str(getattr(key, "name", getattr(key, "key", key))) for key in path]
        return of(next((n for n in reversed(names) if n.rsplit("_", 1)[-1] in _REDUCTION_AXES), ""), leaf.shape)

    return jax.tree_util.tree_map_with_path(walk, params)
