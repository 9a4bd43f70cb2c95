"""The programs that a run would compile, with abstract arguments: shapes, dtypes and shardings. No weights are made.

A training step is two programs. `gradients` takes the weights and one batch; what it does not take but lies in HBM
meanwhile is `resident`: the optimizer's state, a GRPO run's reference, and, where several batches make an update, the sum
of the earlier ones' gradients. `update` takes the state and the gradients; the batch and a frozen base lie beside it. A step
of GRPO begins with rollouts: `decode` is the engine's, beside all that the trainer holds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cacherl_jax import mesh as meshes
from cacherl_jax.adapter_folder import abstract_adapter
from cacherl_jax.checkpoint import abstract_model, abstract_state
from cacherl_jax.config import Config, ModelConfig, RolloutConfig
from cacherl_jax.data.pipeline import bucket_lengths, rows_per_batch
from cacherl_jax.model import attention, qwen3
from cacherl_jax.rollout import engine
from cacherl_jax.train import step as steps
from cacherl_jax.train.optimizer import make_optimizer
from cacherl_jax.types import Batch

STOP_IDS = (151_645, 151_643)  # Qwen3's <|im_end|> and <|endoftext|>; which ones they are changes no program's size


@dataclass(frozen=True, eq=False)
class Program:
    """How to lower a jitted function with its arguments; `resident` bytes a chip lie in HBM beside them."""

    name: str
    lower: Callable[..., Any]
    arguments: tuple
    resident: int = 0
    trains: bool = True  # on a batch, whose figures are given; False for a dispatch of rollouts


@dataclass(frozen=True)
class Work:
    """What is compiled: rows of `length` tokens on all chips, and how many such batches at most make an update."""

    rows: int
    length: int
    batches: int = 1


def bytes_of(tree: Any) -> int:
    """Bytes a chip of arrays with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda s, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shardings, shapes)


# ---- training --------------------------------------------------------------------------------------------------------


def training_work(config: Config, step: str, mesh: Mesh) -> Work:
    """A batch at the longest length that the run compiles. GRPO: as many as there are if every episode fills its row."""
    part = config.sft if step == "sft" else config.grpo
    lengths = (part.packed_length,) if part.packed_length else bucket_lengths(config.rollout.context)
    attention.refuse_lengths(lengths, mesh, qwen3.Execution(mesh, config.memory).dtype(config.model))
    length = lengths[-1]
    rows = rows_per_batch(length, part.tokens_per_batch, meshes.row_ways(mesh))
    if step == "sft":
        return Work(rows, length, config.sft.accumulate)
    episodes = -(-config.grpo.prompts * config.grpo.group // config.grpo.minibatches)
    return Work(rows, length, -(-episodes // (rows * max(1, length // config.rollout.context))))


def batch_of(work: Work, mesh: Mesh, *, old: bool) -> Batch:
    """`old`: with the logprobs by the policy before the step's first update, as steps of several updates have them."""

    def field(name: str) -> jax.ShapeDtypeStruct | None:
        if name == "old_logprobs_BT" and not old:
            return None
        dtype = jnp.int32 if name in ("tokens_BT", "segment_ids_BT") else jnp.float32
        return jax.ShapeDtypeStruct((work.rows, work.length), dtype, sharding=NamedSharding(mesh, meshes.TOKENS_BT))

    return Batch(**{f.name: field(f.name) for f in dataclasses.fields(Batch)})


def training(config: Config, step: str, mesh: Mesh) -> tuple[list[Program], int, Work]:
    """The step's programs, the bytes a chip that lie in HBM when it begins, and the work."""
    work = training_work(config, step, mesh)
    part = config.sft if step == "sft" else config.grpo
    tx = make_optimizer(part.optimizer, part.steps)
    model = abstract_model(config.model, mesh)
    trained, frozen = (abstract_adapter(config.model, part.lora, mesh), model) if part.lora.rank else (model, None)
    state = abstract_state(trained, tx, mesh)
    batch = batch_of(work, mesh, old=step == "grpo" and config.grpo.minibatches > 1)
    share = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P()))
    execution = qwen3.Execution(mesh, config.memory)
    gradients_of: Any = partial(steps.sft_gradients.lower, execution=execution)
    if step == "grpo":
        gradients_of = partial(steps.grpo_gradients.lower, grpo=config.grpo, execution=execution)
    # With an adapter the frozen base is the reference.
    reference = bytes_of(model) if step == "grpo" and frozen is None else 0
    summed = bytes_of(trained) if work.batches > 1 else 0
    gradients = Program("gradients", gradients_of, (trained, frozen, batch, share), bytes_of(state.opt_state) + reference + summed)
    update = Program("update", steps.make_update(tx, state).lower, (state, trained), bytes_of((frozen, batch)) + reference)
    arguments = bytes_of((state, frozen, batch)) + reference
    if step == "sft":
        return [gradients, update], arguments, work
    (decode,), _, _ = rollouts(config, "decode", mesh)
    beside = dataclasses.replace(decode, resident=arguments - bytes_of(batch), trains=False)
    return [gradients, update, beside], arguments, work


# ---- rollouts --------------------------------------------------------------------------------------------------------


def engine_programs(model: ModelConfig, config: RolloutConfig, mesh: Mesh) -> dict[str, tuple[Any, tuple]]:
    """Each compiled function of an engine, by name, with the shapes and shardings of its arguments."""
    own = engine.Engine(model, config, STOP_IDS, mesh)
    rows, ways = meshes.rows_sharding(mesh), meshes.row_ways(mesh)

    def ints(count: int, width: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count * ways, width), jnp.int32, sharding=rows)

    weights = abstract_model(model, mesh)
    state = placed(jax.eval_shape(own._init), engine._layout(meshes.cache_sharding(mesh), rows))
    temperature = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P()))
    prefills = {f"prefill {w}": (own._prefill, (weights, state.cache, ints(n, 3 + w))) for w, n in engine.PREFILLS.items()}
    return prefills | {
        "init": (own._init, ()),
        "copy": (own._copy, (state.cache, ints(engine.COPIES, 2))),
        "decode": (own._decode, (weights, state, ints(config.rows, 7), temperature)),
    }


def rollouts(config: Config, step: str, mesh: Mesh) -> tuple[list[Program], int, Work]:
    """The engine's decode, or its widest prefill, in the layout for rollouts; the work is a dispatch."""
    mesh = meshes.rollout_mesh(mesh, config.rollout.tp)
    width, rows = next(iter(engine.PREFILLS.items()))
    work = Work(rows * meshes.row_ways(mesh), width) if step == "prefill" else Work(config.rollout.rows * meshes.row_ways(mesh), 1)
    name = f"prefill {width}" if step == "prefill" else "decode"
    function, arguments = engine_programs(config.rollout_model, config.rollout, mesh)[name]
    return [Program(step, function.lower, arguments)], bytes_of(arguments), work


def programs(config: Config, step: str, mesh: Mesh) -> tuple[list[Program], int, Work]:
    make: Mapping[str, Any] = {"sft": training, "grpo": training, "prefill": rollouts, "decode": rollouts}
    return make[step](config, step, mesh)
