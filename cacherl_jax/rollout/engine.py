"""Token ids in, token ids out: rows over a dense KV cache, extended by injected ids and by sampling.

Rows are compiled once and may be idle; budgets, temperatures and keys are data. A row's *pending* token is its last one,
not yet in the cache: injecting [a, b, c] reads pending, a, b and leaves c pending; decoding reads pending and samples the
next. Rows are split over the mesh's data axes, each device reading and copying among its own, heads over tp; the weights
have a layout of their own (`place`), so that training may shard them otherwise. Prefill widths follow from a row's own
length, and no program looks at another row: a row's bits do not depend on its company.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cacherl_jax import mesh as meshes
from cacherl_jax.config import Config, ModelConfig, RolloutConfig
from cacherl_jax.model import qwen3
from cacherl_jax.rollout.sampling import logprob_of, sample

# Width of a prefill to the rows that it reads at a time. Longer injections are read in chunks of the widest.
PREFILLS = {1024: 1, 512: 2, 256: 4, 128: 8, 64: 8, 32: 8, 16: 8}
COPIES = 8  # rows copied in one dispatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EngineState:
    """cache of all rows; lengths_B tokens of it are valid; pending_B is each row's last token, not yet in the cache.

    The turn that a row is sampling: budgets_B tokens it may still take (0: the row waits), taken_B it has taken, minimum_B
    it takes before it may stop, keys_B2 its key.
    """

    cache: qwen3.KVCache
    lengths_B: jax.Array
    pending_B: jax.Array
    budgets_B: jax.Array
    taken_B: jax.Array
    minimum_B: jax.Array
    keys_B2: jax.Array


@dataclass(frozen=True)
class Opening:
    """A turn to sample in a row: `length` tokens are in the cache, `pending` comes next; see EngineState for the rest."""

    length: int
    pending: int
    budget: int
    minimum: int
    key_2: np.ndarray


@dataclass(frozen=True)
class Read:
    """Ids to read into the cache of a row from position `start` on."""

    row: int
    start: int
    ids: Sequence[int]


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a dispatch of N steps sampled: row b's tokens are tokens_BN[b, : counts_B[b]]. stopped_B: the last is a stop id.

    logprobs_BN under the policy itself, behavior_BN under what was drawn from: temperature, top-k and top-p applied.
    """

    tokens_BN: np.ndarray
    logprobs_BN: np.ndarray
    behavior_BN: np.ndarray
    counts_B: np.ndarray
    stopped_B: np.ndarray


@dataclass(frozen=True)
class Plan:
    """Dispatches of one round: by width, each a list of `Read`s a shard of rows; then copies (source, target) a shard."""

    reads: Mapping[int, list[list[list[Read]]]]
    copies: list[list[list[tuple[int, int]]]]

    def counts(self) -> list[int]:
        """Dispatches by kind; processes in lockstep run the same number of each."""
        return [*(len(self.reads[width]) for width in PREFILLS), len(self.copies)]


class Engine:
    """Compiled prefill, copy and decode for one model shape, row count and mesh (default: the first device).

    `rows` are those of this process, numbered from 0; `shards` of them, of equal size, lie on devices of their own.
    """

    def __init__(self, model: ModelConfig, config: RolloutConfig, stop_ids: Sequence[int], mesh: Mesh | None = None) -> None:
        self.mesh = mesh if mesh is not None else meshes.one_device()
        self._model = model
        self.context, self.steps = config.context, config.decode_steps
        self.rows_per_shard, self.shards = config.rows, meshes.local_row_ways(self.mesh)
        self.rows = self.rows_per_shard * self.shards
        self._total = self.rows_per_shard * meshes.row_ways(self.mesh)
        self._rows = meshes.rows_sharding(self.mesh)
        sampling = {"steps": config.decode_steps, "stop_ids": tuple(stop_ids), "top_p": config.top_p, "top_k": config.top_k}
        layout = _layout(meshes.cache_sharding(self.mesh), self._rows)
        self._init = jax.jit(partial(_init, model, self._total, config.context), out_shardings=layout)
        # partial: jax.jit of one function shares its programs between engines, and compilations() counts this engine's.
        self._prefill = self._program(partial(_prefill), "mci", "c", donate=1)
        self._copy = self._program(partial(_copy), "ci", "c", donate=0)
        self._decode = self._program(partial(_decode, **sampling), "msir", "so", donate=1)

    @classmethod
    def of_run(cls, config: Config, stop_ids: Sequence[int]) -> Engine:
        """The engine of a run, on its devices, in the layout for rollouts and the dtype of its matrix products."""
        model = config.model
        if config.memory.compute != "weights":
            model = dataclasses.replace(model, dtype=config.memory.compute)
        return cls(model, config.rollout, stop_ids, meshes.rollout_mesh(meshes.make_mesh(config.mesh), config.rollout.tp))

    def _program(self, body: Callable[..., Any], arguments: str, results: str, donate: int) -> Callable[..., Any]:
        """`body` for the rows of one device, on all of them. m model, c cache, s state, i rows first, r the same everywhere."""
        rows, cache = P(meshes.ROWS), P(None, meshes.ROWS)
        specs = {"m": P(), "r": P(), "i": rows, "o": rows, "c": qwen3.KVCache(*_both(cache)), "s": _layout(cache, rows)}
        whole = meshes.cache_sharding(self.mesh)
        placed = {"c": qwen3.KVCache(*_both(whole)), "o": self._rows, "s": _layout(whole, self._rows)}
        mapped = jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=tuple(specs[a] for a in arguments),
            out_specs=specs[results] if len(results) == 1 else tuple(specs[r] for r in results),
            axis_names=set(meshes.ROWS),
            check_vma=False,
        )
        out = placed[results] if len(results) == 1 else tuple(placed[r] for r in results)
        return jax.jit(mapped, donate_argnums=donate, out_shardings=out)

    def place(self, model: qwen3.Qwen3) -> qwen3.Qwen3:
        """The weights in the engine's dtype and layout: heads, ffn and vocabulary over tp, whole on every shard of rows."""
        if model.config.dtype != self._model.dtype:
            model = qwen3.cast(model, self._model.dtype)
        return jax.device_put(model, qwen3.shardings(model.config, self.mesh))

    def init(self) -> EngineState:
        """All rows empty."""
        return self._init()

    def compilations(self) -> int:
        """Programs compiled so far."""
        return sum(program._cache_size() for program in (self._prefill, self._copy, self._decode))  # pyright: ignore[reportAttributeAccessIssue]

    def plan(self, reads: Sequence[Read], copies: Sequence[tuple[int, int]]) -> Plan:
        """The dispatches for `reads`, one a row at most, and after them `copies` (source row, target row) within a shard.

        Raises ValueError for a read that overflows the context.
        """
        by_width: dict[int, list[list[Read]]] = {width: [[] for _ in range(self.shards)] for width in PREFILLS}
        widest = next(iter(PREFILLS))
        for read in reads:
            if read.start + len(read.ids) > self.context:
                raise ValueError(f"row {read.row}: {read.start} + {len(read.ids)} tokens exceed the context of {self.context}")
            for at in range(0, len(read.ids), widest):
                part = read.ids[at : at + widest]
                width = min(w for w in PREFILLS if w >= len(part))
                by_width[width][read.row // self.rows_per_shard].append(Read(read.row, read.start + at, part))
        copied = [[c for c in copies if c[0] // self.rows_per_shard == shard] for shard in range(self.shards)]
        return Plan(
            {width: _dispatches(by_width[width], size) for width, size in PREFILLS.items()},
            [[queue[at : at + COPIES] for queue in copied] for at in range(0, max(map(len, copied)), COPIES)],
        )

    def append(self, model: qwen3.Qwen3, state: EngineState, plan: Plan, counts: Sequence[int] | None = None) -> EngineState:
        """Reads and copies as planned, with empty dispatches up to `counts` where other processes have more. Donates state."""
        *reads, copies = counts if counts is not None else plan.counts()
        cache = state.cache
        for (width, dispatches), count in zip(plan.reads.items(), reads, strict=True):
            for i in range(count):
                jobs = dispatches[i] if i < len(dispatches) else [[]] * self.shards
                cache = self._prefill(model, cache, self._global(self._reads(jobs, width)))
        for i in range(copies):
            pairs = plan.copies[i] if i < len(plan.copies) else [[]] * self.shards
            cache = self._copy(cache, self._global(self._pairs(pairs)))
        return dataclasses.replace(state, cache=cache)

    def _reads(self, jobs: list[list[Read]], width: int) -> np.ndarray:
        """int32 [shards * R, 3 + width]: row within its shard, start, count, ids. Surplus ones name no row."""
        out = np.zeros((self.shards, PREFILLS[width], 3 + width), np.int32)
        out[:, :, 0] = self.rows_per_shard
        for shard, reads in enumerate(jobs):
            for r, read in enumerate(reads):
                out[shard, r, :3] = read.row % self.rows_per_shard, read.start, len(read.ids)
                out[shard, r, 3 : 3 + len(read.ids)] = read.ids
        return out.reshape(-1, 3 + width)

    def _pairs(self, pairs: list[list[tuple[int, int]]]) -> np.ndarray:
        """int32 [shards * COPIES, 2]: source and target within the shard; surplus ones copy row 0 onto itself."""
        out = np.zeros((self.shards, COPIES, 2), np.int32)
        for shard, copies in enumerate(pairs):
            for i, (source, target) in enumerate(copies):
                out[shard, i] = source % self.rows_per_shard, target % self.rows_per_shard
        return out.reshape(-1, 2)

    def _global(self, local: np.ndarray) -> Any:
        """The rows of all processes as one array. One process needs no copy."""
        return local if jax.process_count() == 1 else jax.make_array_from_process_local_data(self._rows, local)

    def decode(
        self, model: qwen3.Qwen3, state: EngineState, openings: Mapping[int, Opening], temperature: float
    ) -> tuple[EngineState, Any]:
        """Opens turns in rows, then samples up to `decode_steps` tokens in every row with a budget left. Donates state.

        Returns at once: what was sampled is on its way, and `read` waits for it.
        """
        controls = np.zeros((self.rows, 7), np.int32)
        for row, o in openings.items():
            controls[row] = 1, o.length, o.pending, o.budget, o.minimum, *o.key_2.view(np.int32)
        state, out = self._decode(model, state, self._global(controls), np.float32(temperature))
        out.copy_to_host_async()
        return state, out

    def read(self, out: Any) -> Decoded:
        """What a dispatch sampled in the rows of this process; waits until it is there."""
        local = np.ascontiguousarray(meshes.local_rows(out))
        N = self.steps
        tokens_BN, logprobs_BN, behavior_BN, counts_B, stopped_B = np.split(local, [N, 2 * N, 3 * N, 3 * N + 1], axis=1)
        return Decoded(
            tokens_BN, logprobs_BN.view(np.float32), behavior_BN.view(np.float32), counts_B[:, 0], stopped_B[:, 0].astype(bool)
        )


def _layout(cache: Any, rows: Any) -> Any:
    """A state of shardings or partition specs."""
    return EngineState(qwen3.KVCache(*_both(cache)), rows, rows, rows, rows, rows, rows)


def _both(x: Any) -> tuple[Any, Any]:
    return x, x


def _dispatches(queues: list[list[Read]], size: int) -> list[list[list[Read]]]:
    """The reads of each shard in batches of at most `size` different rows; chunks of one row keep their order."""
    queues, out = [list(q) for q in queues], []
    while any(queues):
        batch = []
        for shard, queue in enumerate(queues):
            first: dict[int, Read] = {}
            for read in queue:
                if len(first) < size:
                    first.setdefault(read.row, read)
            batch.append(list(first.values()))
            taken = {id(read) for read in batch[-1]}
            queues[shard] = [read for read in queue if id(read) not in taken]
        out.append(batch)
    return out


# ---- programs: but for the first, of the rows of one device ----------------------------------------------------------


def _init(config: ModelConfig, rows: int, context: int) -> EngineState:
    zeros_B = jnp.zeros((rows,), jnp.int32)
    cache = qwen3.init_cache(config, rows, context)
    return EngineState(cache, zeros_B, zeros_B, zeros_B, zeros_B, zeros_B, jnp.zeros((rows, 2), jnp.uint32))


def _prefill(model: qwen3.Qwen3, cache: qwen3.KVCache, reads_RX: jax.Array) -> qwen3.KVCache:
    rows_R, starts_R, counts_R, tokens_RT = reads_RX[:, 0], reads_RX[:, 1], reads_RX[:, 2], reads_RX[:, 3:]
    return qwen3.extend(model, cache, tokens_RT, starts_R, counts_R, rows_R)[1]


def _copy(cache: qwen3.KVCache, pairs_C2: jax.Array) -> qwen3.KVCache:
    def one(i: jax.Array, cache: qwen3.KVCache) -> qwen3.KVCache:  # one at a time: no second cache is made
        source, target = pairs_C2[i, 0], pairs_C2[i, 1]

        def move(x_LBKSH: jax.Array) -> jax.Array:
            row_L1KSH = jax.lax.dynamic_slice_in_dim(x_LBKSH, source, 1, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(x_LBKSH, row_L1KSH, target, axis=1)

        return qwen3.KVCache(move(cache.k_LBKSH), move(cache.v_LBKSH))

    return jax.lax.fori_loop(0, pairs_C2.shape[0], one, cache)


def _decode(
    model: qwen3.Qwen3,
    state: EngineState,
    controls_B7: jax.Array,
    temperature: jax.Array,
    *,
    steps: int,
    stop_ids: tuple[int, ...],
    top_p: float,
    top_k: int,
) -> tuple[EngineState, jax.Array]:
    """Returns the state and, int32 [B, 3 * steps + 2], tokens, two kinds of logprobs (their bits), count and stopped."""
    stops_X = jnp.asarray(stop_ids, jnp.int32)
    is_stop_V = (jnp.arange(model.config.vocab_size)[:, None] == stops_X[None]).any(axis=-1)[None]
    opened_B, controls_B6 = controls_B7[:, 0] > 0, controls_B7[:, 1:]
    new = (*controls_B6[:, :3].T, jnp.zeros_like(state.taken_B), controls_B6[:, 3])
    old = (state.lengths_B, state.pending_B, state.budgets_B, state.taken_B, state.minimum_B)
    lengths_B, pending_B, budgets_B, taken_B, minimum_B = (jnp.where(opened_B, n, o) for n, o in zip(new, old, strict=True))
    keys_B2 = jnp.where(opened_B[:, None], jax.lax.bitcast_convert_type(controls_B6[:, 4:], jnp.uint32), state.keys_B2)
    B = lengths_B.shape[0]

    def step(i: jax.Array, carry: tuple) -> tuple:
        cache, lengths_B, pending_B, budgets_B, taken_B, count_B, out_BN3 = carry
        active_B = budgets_B > 0
        hidden_BTD, cache = qwen3.extend(model, cache, pending_B[:, None], lengths_B, active_B.astype(jnp.int32))
        logits_BV = qwen3.logits(model, hidden_BTD[:, 0])
        allowed_BV = jnp.where((taken_B < minimum_B)[:, None] & is_stop_V, -jnp.inf, logits_BV)
        token_B, behavior_B = sample(allowed_BV, keys_B2, taken_B, temperature, top_p=top_p, top_k=top_k)
        sampled_B3 = jnp.stack([token_B, *(_bits(x) for x in (logprob_of(logits_BV, token_B), behavior_B))], axis=-1)
        moved_B = active_B.astype(jnp.int32)
        stopped_B = (token_B[:, None] == stops_X[None]).any(axis=-1)
        return (
            cache,
            lengths_B + moved_B,
            jnp.where(active_B, token_B, pending_B),
            jnp.where(active_B & ~stopped_B, budgets_B - 1, 0),
            taken_B + moved_B,
            count_B + moved_B,
            jax.lax.dynamic_update_index_in_dim(out_BN3, sampled_B3, i, axis=1),
        )

    # As many steps as some row may need, the same on all devices: programs that talk to each other keep in step.
    needed = jax.lax.pmax(jnp.minimum(budgets_B.max(), steps), meshes.ROWS)
    start = (state.cache, lengths_B, pending_B, budgets_B, taken_B, jnp.zeros_like(lengths_B))
    start = (*start, jnp.zeros((B, steps, 3), jnp.int32))
    cache, lengths_B, pending_B, budgets_B, taken_B, count_B, out_BN3 = jax.lax.fori_loop(0, needed, step, start)
    stopped_B = (count_B > 0) & (pending_B[:, None] == stops_X[None]).any(axis=-1)
    out_BX = jnp.concatenate(
        [*(out_BN3[:, :, k] for k in range(3)), count_B[:, None], stopped_B.astype(jnp.int32)[:, None]], axis=1
    )
    return EngineState(cache, lengths_B, pending_B, budgets_B, taken_B, minimum_B, keys_B2), out_BX


def _bits(x_B: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x_B.astype(jnp.float32), jnp.int32)
