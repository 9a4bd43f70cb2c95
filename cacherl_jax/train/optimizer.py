"""Optimizers from optax, with the schedule and clipping that a configuration asks for.

What is trained, a Qwen3 or a lora.Adapter, holds the matrices of all layers stacked. Optimizers that treat matrices as such
(Muon, Adafactor) are told here which weights are stacks of them.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from cacherl_jax.config import OptimizerConfig


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The transformation for a run of `steps` updates: clip by global norm, then AdamW; Adafactor, at absolute rates and
    without momentum; or Muon on matrices with Adam on embeddings and norms.

    Sources: Loshchilov and Hutter, arXiv 1711.05101; Shazeer and Stern, arXiv 1804.04235;
    https://kellerjordan.github.io/posts/muon.
    """
    rate = _schedule(config, config.learning_rate, steps)
    if config.name == "muon":
        optimizer = muon(
            rate,
            adam_learning_rate=_schedule(config, config.adam_learning_rate, steps),
            adam_b1=config.b1,
            adam_b2=config.b2,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_dimension_numbers,
        )
    else:
        scale = (
            _scale_by_adam(config.b1, config.b2, jnp.dtype(config.moments)) if config.name == "adamw" else _scale_by_factored_rms()
        )
        optimizer = optax.chain(scale, optax.add_decayed_weights(config.weight_decay), optax.scale_by_learning_rate(rate))
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


# ---- matrices --------------------------------------------------------------------------------------------------------


def _stacked(path: Any) -> bool:
    """Whether axis 0 stacks layers: in a model's layers, and in all of an adapter. Of three axes it is a stack of matrices
    [L, in, out]."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return "layers" in names or "a" in names or "b" in names


def _dimension_numbers(params: Any) -> Any:
    """Muon's for every parameter, a stacking axis being a batch; None for those that Adam updates."""

    def of(path: Any, leaf: Any) -> MuonDimensionNumbers | None:
        matrices = _stacked(path) and len(leaf.shape) == 3
        return MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,)) if matrices else None

    return jax.tree_util.tree_map_with_path(of, params)


# ---- AdamW -----------------------------------------------------------------------------------------------------------


def _scale_by_adam(b1: float, b2: float, dtype: jnp.dtype, eps: float = 1e-8) -> optax.GradientTransformation:
    """As optax.scale_by_adam, computed in float32, with both moments stored in `dtype` whatever that of the weights.

    In bfloat16 the second moment is rounded up or down at random, right in the mean: to the nearest, a change of less than
    1/512, such as every fall at b2 = 0.999, would be lost for ever. The draws follow from the number of updates.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = (optax.tree.zeros_like(params, dtype=dtype) for _ in range(2))  # an update donates each: no shared buffers
        return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=mu, nu=nu)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        gradients, mu, nu = (optax.tree.cast(tree, jnp.float32) for tree in (gradients, state.mu, state.nu))
        mu = optax.tree.update_moment(gradients, mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(gradients, nu, b2, 2)
        mu_hat, nu_hat = optax.tree.bias_correction(mu, b1, count), optax.tree.bias_correction(nu, b2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu_hat, nu_hat)
        if dtype == jnp.bfloat16:
            leaves, tree = jax.tree.flatten(nu)
            keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), len(leaves))
            nu = jax.tree.unflatten(tree, [_stochastic_bfloat16(x, k) for x, k in zip(leaves, keys, strict=True)])
        return updates, optax.ScaleByAdamState(count=count, mu=optax.tree.cast(mu, dtype), nu=optax.tree.cast(nu, dtype))

    return optax.GradientTransformation(init, cast(Any, update))


def _stochastic_bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
    """Float32 x to one of its two neighbours in bfloat16, the nearer the likelier."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


# ---- Adafactor -------------------------------------------------------------------------------------------------------


def _scale_by_factored_rms() -> optax.GradientTransformation:
    """Adafactor's scaling of each layer's matrix by itself, in float32: optax would factor a stack over its two longest axes,
    of which one may be that of layers, and clip all layers as one."""
    one = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0))

    def matrices(tree: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        """Stacks [L, in, out] or [L, n], and the rest, in float32."""
        stacks, rest = [], []
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            (stacks if _stacked(path) else rest).append(x.astype(jnp.float32))
        return stacks, rest

    def init(params: Any) -> tuple[Any, Any]:
        stacks, rest = matrices(params)
        return jax.vmap(one.init)(stacks), one.init(rest)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        stacks, rest = matrices(gradients)
        # In the parameters' place stand arrays of their shapes: nothing else of them is read.
        stacks, of_stacks = jax.vmap(one.update)(stacks, state[0], stacks)
        rest, of_rest = one.update(rest, state[1], rest)
        scaled_stacks, scaled_rest = iter(cast(Any, stacks)), iter(cast(Any, rest))

        def back(path: Any, _: jax.Array) -> jax.Array:
            return next(scaled_stacks if _stacked(path) else scaled_rest)

        return jax.tree_util.tree_map_with_path(back, gradients), (of_stacks, of_rest)

    return optax.GradientTransformation(init, cast(Any, update))
