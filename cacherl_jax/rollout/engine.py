"""Token ids in, token ids out: rows over a dense KV cache, extended by injected ids and by sampling.

Rows are compiled once and may be idle; budgets, temperatures and keys are data. A row's *pending* token is its last one,
not yet in the cache: injecting [a, b, c] reads pending, a, b and leaves c pending; decoding reads pending and samples the
next. Prefill runs `PREFILL_ROWS` rows at a time in power-of-two widths chosen by each row's own length: a row's bits do not
depend on its company.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cacherl_jax.config import ModelConfig, RolloutConfig
from cacherl_jax.model import qwen3
from cacherl_jax.rollout.sampling import sample

_Job = tuple[int, int, Sequence[int]]  # row, position of its first token, tokens to read

PREFILL_ROWS = 8
PREFILL_WIDTHS = (16, 64, 256)  # longer injections are read in chunks of the last


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EngineState:
    """cache of all rows; lengths_B tokens of it are valid; pending_B is each row's last token, not yet in the cache."""

    cache: qwen3.KVCache
    lengths_B: jax.Array
    pending_B: jax.Array


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a dispatch of N steps sampled: row b's tokens are tokens_NB[: counts_B[b], b]. stopped_B: the last is the stop."""

    tokens_NB: np.ndarray
    logprobs_NB: np.ndarray
    counts_B: np.ndarray
    stopped_B: np.ndarray


class Engine:
    """Compiled prefill and decode for one model shape and row count."""

    def __init__(self, model: ModelConfig, config: RolloutConfig, stop_id: int) -> None:
        self.rows, self.context = config.rows, config.context
        self._model, self._config = model, config
        # partial: jax.jit of one function shares its programs between engines, and compilations() counts this engine's.
        self._prefill = jax.jit(partial(_prefill), donate_argnums=1)
        self._decode = jax.jit(
            partial(_decode, steps=config.decode_steps, stop_id=stop_id, top_p=config.top_p, top_k=config.top_k),
            donate_argnums=1,
        )

    def init(self) -> EngineState:
        """All rows empty."""
        zeros_B = jnp.zeros((self.rows,), jnp.int32)
        return EngineState(qwen3.init_cache(self._model, self.rows, self.context), zeros_B, jnp.copy(zeros_B))

    def compilations(self) -> int:
        """Programs compiled so far."""
        return sum(program._cache_size() for program in (self._prefill, self._decode))  # pyright: ignore[reportAttributeAccessIssue]

    def append(
        self, model: qwen3.Qwen3, state: EngineState, ids_by_row: Mapping[int, Sequence[int]], fresh: frozenset[int]
    ) -> EngineState:
        """Injects ids into rows; rows in `fresh` forget what they held first. Raises ValueError for a row that overflows.

        The given state is donated.
        """
        lengths_B, pending_B = np.array(state.lengths_B), np.array(state.pending_B)
        cuts: list[dict[int, list[_Job]]] = []  # by chunk, then by width
        for row, ids in ids_by_row.items():
            read = [*([] if row in fresh else [int(pending_B[row])]), *ids[:-1]]
            start = 0 if row in fresh else int(lengths_B[row])
            if start + len(read) > self.context:
                raise ValueError(f"row {row}: {start} + {len(read)} tokens exceed the context of {self.context}")
            lengths_B[row], pending_B[row] = start + len(read), ids[-1]
            for chunk, at in enumerate(range(0, len(read), PREFILL_WIDTHS[-1])):
                part = read[at : at + PREFILL_WIDTHS[-1]]
                while len(cuts) <= chunk:
                    cuts.append({})
                width = next(w for w in PREFILL_WIDTHS if w >= len(part))
                cuts[chunk].setdefault(width, []).append((row, start + at, part))
        cache = state.cache
        for jobs in cuts:  # a row's chunks in order
            for width, rows in jobs.items():
                for at in range(0, len(rows), PREFILL_ROWS):
                    cache = self._prefill(model, cache, *self._padded(rows[at : at + PREFILL_ROWS], width))
        return EngineState(cache, jnp.asarray(lengths_B), jnp.asarray(pending_B))

    def _padded(self, jobs: list[_Job], width: int) -> tuple[np.ndarray, ...]:
        """(tokens_RT, starts_R, counts_R, rows_R) of PREFILL_ROWS rows; surplus ones point outside the cache, count 0."""
        tokens_RT = np.zeros((PREFILL_ROWS, width), np.int32)
        starts_R, counts_R = np.zeros((PREFILL_ROWS,), np.int32), np.zeros((PREFILL_ROWS,), np.int32)
        rows_R = np.full((PREFILL_ROWS,), self.rows, np.int32)
        for r, (row, start, ids) in enumerate(jobs):
            tokens_RT[r, : len(ids)], starts_R[r], counts_R[r], rows_R[r] = ids, start, len(ids), row
        return tokens_RT, starts_R, counts_R, rows_R

    def decode(
        self,
        model: qwen3.Qwen3,
        state: EngineState,
        *,
        budgets_B: np.ndarray,
        taken_B: np.ndarray,
        minimum_B: np.ndarray,
        keys_B2: np.ndarray,
        temperature: float,
    ) -> tuple[EngineState, Decoded]:
        """Samples up to `decode_steps` tokens in every row with a budget left. The given state is donated.

        budgets_B: tokens that the row's turn may still take (0: the row waits); taken_B: those it has taken, which also
        names the next draw; minimum_B: the stop token is not sampled before this many; keys_B2: uint32, one key a turn.
        """
        state, out = self._decode(
            model, state, budgets_B.astype(np.int32), taken_B.astype(np.int32), minimum_B.astype(np.int32), keys_B2,
            np.float32(temperature),
        )  # fmt: skip
        return state, Decoded(*(np.asarray(x) for x in out))


def _prefill(
    model: qwen3.Qwen3,
    cache: qwen3.KVCache,
    tokens_RT: jax.Array,
    starts_R: jax.Array,
    counts_R: jax.Array,
    rows_R: jax.Array,
) -> qwen3.KVCache:
    return qwen3.extend(model, cache, tokens_RT, starts_R, counts_R, rows_R)[1]


def _decode(
    model: qwen3.Qwen3,
    state: EngineState,
    budgets_B: jax.Array,
    taken_B: jax.Array,
    minimum_B: jax.Array,
    keys_B2: jax.Array,
    temperature: jax.Array,
    *,
    steps: int,
    stop_id: int,
    top_p: float,
    top_k: int,
) -> tuple[EngineState, tuple[jax.Array, ...]]:
    V = model.config.vocab_size
    is_stop_V = jnp.arange(V)[None] == stop_id

    def step(carry: tuple, _: None) -> tuple[tuple, tuple[jax.Array, jax.Array]]:
        cache, lengths_B, pending_B, count_B, active_B = carry
        hidden_BTD, cache = qwen3.extend(model, cache, pending_B[:, None], lengths_B, active_B.astype(jnp.int32))
        logits_BV = qwen3.logits(model, hidden_BTD[:, 0])
        position_B = taken_B + count_B
        allowed_BV = jnp.where((position_B < minimum_B)[:, None] & is_stop_V, -jnp.inf, logits_BV)
        token_B = sample(allowed_BV, keys_B2, position_B, temperature, top_p=top_p, top_k=top_k)
        logprob_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token_B[:, None], axis=-1)[:, 0]
        moved_B = active_B.astype(jnp.int32)
        carry = (
            cache,
            lengths_B + moved_B,
            jnp.where(active_B, token_B, pending_B),
            count_B + moved_B,
            active_B & (token_B != stop_id) & (count_B + 1 < budgets_B),
        )
        return carry, (token_B, logprob_B)

    start = (state.cache, state.lengths_B, state.pending_B, jnp.zeros_like(budgets_B), budgets_B > 0)
    (cache, lengths_B, pending_B, count_B, _), (tokens_NB, logprobs_NB) = jax.lax.scan(step, start, None, length=steps)
    stopped_B = (count_B > 0) & (pending_B == stop_id)
    return EngineState(cache, lengths_B, pending_B), (tokens_NB, logprobs_NB, count_B, stopped_B)
