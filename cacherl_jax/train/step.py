"""One training step in two compiled parts: gradients of a batch, and the update.

A batch of rollouts has rows of many lengths, so it is split into a few fixed shapes; their gradients are summed, each
weighted by its share of the weights of loss-carrying tokens, and one update follows. The sum equals the gradient of the
whole batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cacherl_jax.config import GrpoConfig
from cacherl_jax.model import lora, qwen3
from cacherl_jax.model.qwen3 import ONE_DEVICE, Execution
from cacherl_jax.train import losses, policy_loss
from cacherl_jax.types import Batch

jax.tree_util.register_dataclass(Batch, data_fields=[f.name for f in dataclasses.fields(Batch)], meta_fields=[])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training changes: the weights that are trained, the optimizer's state, and the number of updates made."""

    model: Any  # a qwen3.Qwen3, or a lora.Adapter of a frozen one; optax types know arrays alone
    opt_state: Any
    step: jax.Array

    @classmethod
    def create(cls, model: qwen3.Qwen3, tx: optax.GradientTransformation) -> TrainState:
        return cls(model, tx.init(cast(Any, model)), jnp.zeros((), jnp.int32))


def _logprobs(
    model: qwen3.Qwen3, batch: Batch, execution: Execution, *, entropy: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    hidden_BTD = qwen3.forward(model, batch.tokens_BT, batch.segment_ids_BT, execution=execution)
    found = losses.token_logprobs(
        hidden_BTD,
        qwen3.unembedding(model),
        batch.tokens_BT,
        chunk=execution.memory.logit_chunk,
        mesh=execution.mesh,
        entropy=entropy,
    )
    return jax.tree.map(lambda x_BT: losses.predicted(x_BT, batch.segment_ids_BT), found)


def _mask(batch: Batch) -> jax.Array:
    return losses.predicted(batch.loss_mask_BT, batch.segment_ids_BT)


@jax.jit
def _loss_weight(batch: Batch) -> jax.Array:
    return _mask(batch).sum()


@partial(jax.jit, static_argnames="execution")
def score(model: qwen3.Qwen3, batch: Batch, *, execution: Execution = ONE_DEVICE) -> jax.Array:
    """Logprob of every token of the batch given those before it in its segment, [B, T] float32; a segment's first token has 0."""
    return _logprobs(model, batch, execution)[0]


Metrics = dict[str, jax.Array]
Gradients = tuple[Any, Metrics, jax.Array]  # of one batch: gradients, metrics, logprobs_BT by the model they were taken at


@partial(jax.jit, static_argnames="execution")
def sft_gradients(
    trained: Any, frozen: qwen3.Qwen3 | None, batch: Batch, share: jax.Array, *, execution: Execution = ONE_DEVICE
) -> Gradients:
    """Gradients and metrics of the SFT loss on one batch, both scaled by `share`, its part of the update's weight.

    `trained` is a model, or the adapter of the model `frozen`; gradients are of `trained` and lie where its weights lie.
    """

    def loss_fn(trained: Any) -> tuple[jax.Array, tuple[Metrics, jax.Array]]:
        logprobs_BT, _ = _logprobs(_model(trained, frozen), batch, execution)
        loss, metrics = losses.sft_loss(logprobs_BT, _mask(batch))
        return loss, (metrics | {"loss": loss}, logprobs_BT)

    return _gradients(loss_fn, trained, share, execution)


@partial(jax.jit, static_argnames=("grpo", "execution"))
def grpo_gradients(
    trained: Any,
    frozen: qwen3.Qwen3 | None,
    batch: Batch,
    share: jax.Array,
    *,
    grpo: GrpoConfig,
    execution: Execution = ONE_DEVICE,
) -> Gradients:
    """Gradients and metrics of the GRPO loss on one batch, as `sft_gradients`."""

    def loss_fn(trained: Any) -> tuple[jax.Array, tuple[Metrics, jax.Array]]:
        logprobs_BT, entropy_BT = _logprobs(_model(trained, frozen), batch, execution, entropy=True)
        mask_BT = _mask(batch)
        loss, metrics = policy_loss.grpo_loss(
            logprobs_BT,
            batch.behavior_logprobs_BT,
            batch.ref_logprobs_BT,
            mask_BT,
            batch.advantages_BT,
            batch.segment_ids_BT,
            batch.old_logprobs_BT,
            grpo=grpo,
        )
        assert entropy_BT is not None
        entropy = losses.masked_mean(entropy_BT, mask_BT)
        return loss, (metrics | {"loss": loss, "entropy": entropy}, logprobs_BT)

    return _gradients(loss_fn, trained, share, execution)


def _model(trained: Any, frozen: qwen3.Qwen3 | None) -> qwen3.Qwen3:
    return trained if frozen is None else lora.attach(frozen, trained)


def _gradients(loss_fn: Callable[..., Any], trained: Any, share: jax.Array, execution: Execution) -> Gradients:
    gradients, (metrics, logprobs_BT) = jax.grad(loss_fn, has_aux=True)(trained)
    gradients, metrics = jax.tree.map(lambda x: x * share, (gradients, metrics))
    return constrained(gradients, execution.mesh), metrics, logprobs_BT


def constrained(weights: Any, mesh: Mesh | None) -> Any:
    """Inside a program: a model, an adapter, or gradients of one, laid out as weights are."""
    if mesh is None:
        return weights
    if isinstance(weights, lora.Adapter):
        shardings: Any = lora.shardings(weights.model, weights.config, mesh)
    else:
        shardings = qwen3.shardings(weights.config, mesh)
    return jax.lax.with_sharding_constraint(weights, shardings)


@partial(jax.jit, donate_argnums=0)
def _add(total: tuple[Any, Metrics], more: tuple[Any, Metrics]) -> tuple[Any, Metrics]:
    return jax.tree.map(jnp.add, total, more)


def accumulate(
    gradients_of: Callable[[Any, qwen3.Qwen3 | None, Batch, jax.Array], Gradients],
    trained: Any,
    frozen: qwen3.Qwen3 | None,
    batches: Iterable[Batch],
    divisor: float | None = None,
) -> tuple[Any, Metrics, list[jax.Array]]:
    """The gradients and metrics of all `batches` as if they were one, and the logprobs_BT of each batch by the model as it is.

    Weighted by the weights of loss-carrying tokens (Batch.loss_mask_BT), of which metrics are the mean. So are loss and
    gradients, or with a `divisor` the weighted sum over it. Raises ValueError when no token of any batch carries loss.
    """
    batches = list(batches)
    weights = [float(_loss_weight(batch)) for batch in batches]
    if not sum(weights):
        raise ValueError("no token of the batch carries loss")
    over = sum(weights) if divisor is None else divisor
    total: tuple[Any, Metrics] | None = None
    logprobs = []
    for batch, weight in zip(batches, weights, strict=True):
        gradients, metrics, logprobs_BT = gradients_of(trained, frozen, batch, jnp.float32(weight / over))
        total = (gradients, metrics) if total is None else _add(total, (gradients, metrics))
        del gradients  # or they would lie beside the next batch's
        logprobs.append(logprobs_BT)
    assert total is not None
    gradients, metrics = total
    if divisor is not None:
        metrics = {name: x if name == "loss" else x * (divisor / sum(weights)) for name, x in metrics.items()}
    return gradients, metrics, logprobs


def make_update(
    tx: optax.GradientTransformation, like: TrainState | None = None
) -> Callable[[TrainState, Any], tuple[TrainState, jax.Array]]:
    """The compiled update: (state, gradients) -> (state, norm of the gradients). The old state is donated.

    The new one lies as `like` says, arrays or shapes with shardings; without it, where the compiler puts it.
    """
    where = None if like is None else (jax.tree.map(lambda x: x.sharding, like), None)

    @partial(jax.jit, donate_argnums=0, out_shardings=where)
    def update(state: TrainState, gradients: Any) -> tuple[TrainState, jax.Array]:
        updates, opt_state = tx.update(gradients, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        return TrainState(model, opt_state, state.step + 1), optax.tree.norm(gradients)

    return update
