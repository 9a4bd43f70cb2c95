"""One training step in two compiled parts: gradients of a batch, and the update.

A batch of rollouts has rows of many lengths, so it is split into a few fixed shapes; their gradients are summed, each
weighted by its share of the loss-carrying tokens, and one update follows. The sum equals the gradient of the whole batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from cacherl_jax.model import qwen3
from cacherl_jax.train import losses
from cacherl_jax.types import Batch

jax.tree_util.register_dataclass(Batch, data_fields=[f.name for f in dataclasses.fields(Batch)], meta_fields=[])

# Tokens whose logits exist at one time: [LOGIT_CHUNK, V] is the largest array over the vocabulary.
LOGIT_CHUNK = 4096


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training changes: the model, the optimizer's state, and the number of updates made."""

    model: Any  # qwen3.Qwen3; optax types know arrays alone
    opt_state: Any
    step: jax.Array

    @classmethod
    def create(cls, model: qwen3.Qwen3, tx: optax.GradientTransformation) -> TrainState:
        return cls(model, tx.init(cast(Any, model)), jnp.zeros((), jnp.int32))


def _logprobs(model: qwen3.Qwen3, batch: Batch) -> tuple[jax.Array, jax.Array]:
    hidden_BTD = qwen3.forward(model, batch.tokens_BT, batch.segment_ids_BT)
    return losses.token_logprobs(hidden_BTD, qwen3.unembedding(model), batch.tokens_BT, chunk=LOGIT_CHUNK)


@jax.jit
def score(model: qwen3.Qwen3, batch: Batch) -> jax.Array:
    """Logprob of every token of the batch given those before it, [B, T] float32; entry 0 of a row is 0."""
    return _logprobs(model, batch)[0]


Metrics = dict[str, jax.Array]
Gradients = tuple[Any, Metrics, jax.Array]  # of one batch: gradients, metrics, logprobs_BT by the model they were taken at


@jax.jit
def sft_gradients(model: qwen3.Qwen3, batch: Batch, share: jax.Array) -> Gradients:
    """Gradients and metrics of the SFT loss on one batch, both scaled by `share`, its part of the step's tokens."""

    def loss_fn(model: qwen3.Qwen3) -> tuple[jax.Array, tuple[Metrics, jax.Array]]:
        logprobs_BT, _ = _logprobs(model, batch)
        loss, metrics = losses.sft_loss(logprobs_BT, batch.loss_mask_BT)
        return loss, (metrics | {"loss": loss}, logprobs_BT)

    return _gradients(loss_fn, model, share)


@partial(jax.jit, static_argnames=("clip_low", "clip_high", "kl_coef", "importance_cap"))
def grpo_gradients(
    model: qwen3.Qwen3,
    batch: Batch,
    share: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    importance_cap: float,
) -> Gradients:
    """Gradients and metrics of the GRPO loss on one batch, scaled by `share`."""

    def loss_fn(model: qwen3.Qwen3) -> tuple[jax.Array, tuple[Metrics, jax.Array]]:
        logprobs_BT, entropy_BT = _logprobs(model, batch)
        loss, metrics = losses.grpo_loss(
            logprobs_BT,
            batch.behavior_logprobs_BT,
            batch.ref_logprobs_BT,
            batch.loss_mask_BT,
            batch.advantages_BT,
            batch.old_logprobs_BT,
            clip_low=clip_low,
            clip_high=clip_high,
            kl_coef=kl_coef,
            importance_cap=importance_cap,
        )
        entropy = losses.masked_mean(entropy_BT, losses.predicted(batch.loss_mask_BT))
        return loss, (metrics | {"loss": loss, "entropy": entropy}, logprobs_BT)

    return _gradients(loss_fn, model, share)


def _gradients(loss_fn: Callable[..., Any], model: qwen3.Qwen3, share: jax.Array) -> Gradients:
    gradients, (metrics, logprobs_BT) = jax.grad(loss_fn, has_aux=True)(model)
    return *jax.tree.map(lambda x: x * share, (gradients, metrics)), logprobs_BT


@partial(jax.jit, donate_argnums=0)
def _add(total: tuple[Any, Metrics], more: tuple[Any, Metrics]) -> tuple[Any, Metrics]:
    return jax.tree.map(jnp.add, total, more)


def accumulate(
    gradients_of: Callable[[qwen3.Qwen3, Batch, jax.Array], Gradients], model: qwen3.Qwen3, batches: Iterable[Batch]
) -> tuple[Any, Metrics, list[jax.Array]]:
    """The gradients and metrics of all `batches` as if they were one, weighted by loss-carrying tokens, and the logprobs_BT
    of each batch by `model`.

    Raises ValueError when no token of any batch carries loss.
    """
    batches = list(batches)
    tokens = [float(batch.loss_mask_BT[:, 1:].sum()) for batch in batches]
    if not sum(tokens):
        raise ValueError("no token of the batch carries loss")
    total: tuple[Any, Metrics] | None = None
    logprobs = []
    for batch, count in zip(batches, tokens, strict=True):
        gradients, metrics, logprobs_BT = gradients_of(model, batch, jnp.float32(count / sum(tokens)))
        total = (gradients, metrics) if total is None else _add(total, (gradients, metrics))
        logprobs.append(logprobs_BT)
    assert total is not None
    return total[0], total[1], logprobs


def make_update(tx: optax.GradientTransformation) -> Callable[[TrainState, Any], tuple[TrainState, jax.Array]]:
    """The compiled update: (state, gradients) -> (state, norm of the gradients). The old state is donated."""

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, gradients: Any) -> tuple[TrainState, jax.Array]:
        updates, opt_state = tx.update(gradients, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        return TrainState(model, opt_state, state.step + 1), optax.tree.norm(gradients)

    return update
