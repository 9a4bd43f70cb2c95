"""Which one change of a run that does not fit would help most, by a rough count of what lies in HBM.

The count is good to compare two settings, not to say whether one fits: the change that it picks is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from cacherl_jax.config import Config, ConfigError, with_overrides
from cacherl_jax.plan.topology import GIB, Topology, twice

ROOM = 0.97  # of the limit: what the count may promise


@dataclass(frozen=True)
class Change:
    what: str
    config: Config
    topology: Topology


def candidates(config: Config, topology: Topology, step: str) -> Iterator[Change]:
    """Single changes that can lower the peak, from those that change no result to those that change the method."""

    def setting(*overrides: str) -> Change:
        return Change(" ".join(f"--set {o}" for o in overrides), with_overrides(config, overrides), topology)

    memory, mesh = config.memory, config.mesh
    if step in ("sft", "grpo"):
        part = config.sft if step == "sft" else config.grpo
        if memory.logit_chunk > 256:
            yield setting(f"memory.logit_chunk={1024 if memory.logit_chunk > 1024 else 256}")
        if memory.remat != "full":
            yield setting("memory.remat=full")
        if memory.compute == "weights" and config.model.dtype == "float32":
            yield setting("memory.compute=bfloat16")
        ways = 2
        while mesh.fsdp % ways == 0 and ways <= mesh.fsdp:
            yield setting(f"mesh.fsdp={mesh.fsdp // ways}", f"mesh.seq={mesh.seq * ways}")
            ways *= 2
        if part.optimizer.name == "adamw" and part.optimizer.moments == "float32" and not part.lora.rank:
            yield setting(f"{step}.optimizer.moments=bfloat16")
    else:
        tp = config.rollout.tp or mesh.tp
        if topology.chips % (2 * tp) == 0 and config.model.num_kv_heads % (2 * tp) == 0:
            yield setting(f"rollout.tp={2 * tp}")
        if config.rollout.rows > 1:
            yield setting(f"rollout.rows={config.rollout.rows // 2}")
    if larger := twice(topology):
        ways = larger.chips // topology.chips
        wider = replace(config, mesh=replace(mesh, fsdp=mesh.fsdp * ways))
        yield Change(f"--topology {larger.name} --set mesh.fsdp={mesh.fsdp * ways}", wider, larger)
    if step in ("sft", "grpo") and not (config.sft if step == "sft" else config.grpo).lora.rank:
        yield setting(f"{step}.lora.rank=16")


def count(config: Config, step: str, arguments: int, trained: int, tokens: int) -> int:
    """Bytes a chip, roughly: what lies there when a step begins, gradients, what layers keep, one layer, logits.

    trained: bytes of the gradients. tokens: of a chip.
    """
    if step not in ("sft", "grpo"):
        return arguments
    c, memory, tp = config.model, config.memory, config.mesh.tp
    width = 2 if "bfloat16" in (memory.compute, c.dtype) else 4
    products = (2 * c.hidden_size + 2 * (c.num_heads + c.num_kv_heads) * c.head_dim // tp + 3 * c.intermediate_size // tp) * width
    kept = {"full": c.hidden_size * width, "dots": products, "none": 2 * products}[memory.remat]
    logits = 3 * 4 * min(memory.logit_chunk, tokens) * c.vocab_size // tp
    return arguments + trained + tokens * (c.num_layers * kept + 2 * products) + logits


def most_promising(
    config: Config, topology: Topology, step: str, peak: int, programs: Callable[[Config, Topology], Any]
) -> Change | None:
    """The first change that the count, set right by what the present setting was found to need, lets fit; else the one that
    lowers it most. None where nothing is left to change."""

    def counted(c: Config, t: Topology) -> int:
        from cacherl_jax.plan.programs import bytes_of

        parts, arguments, work = programs(c, t)
        tokens = work.rows * work.length // (t.chips // c.mesh.tp)
        return count(c, step, arguments, bytes_of(parts[0].arguments[0]), tokens)

    error = peak - counted(config, topology)
    best: tuple[int, Change] | None = None
    for change in candidates(config, topology, step):
        try:
            expected = counted(change.config, change.topology) + error
        except ConfigError:  # does not divide
            continue
        if expected <= ROOM * change.topology.chip.hbm_gib * GIB:
            return change
        if best is None or expected < best[0]:
            best = expected, change
    return best[1] if best and best[0] < peak else None
