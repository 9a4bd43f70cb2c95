"""Choosing tokens on the device."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from cacherl_jax.mesh import gathered

BLOCKS = 64  # of the vocabulary, whose masses are summed first; a multiple of the devices that share it


def turn_key(seed: int, task_id: str, sample: int, turn: int) -> np.ndarray:
    """Key data, uint32 [2], of one turn: a hash of what the turn is, so that it does not depend on row, order or company."""
    digest = hashlib.sha256(f"{seed}/{task_id}/{sample}/{turn}".encode()).digest()
    return np.frombuffer(digest[:8], np.uint32).copy()


def sample(
    logits_BV: jax.Array,
    keys_B2: jax.Array,
    steps_B: jax.Array,
    temperature: jax.Array,
    *,
    top_p: float,
    top_k: int,
) -> tuple[jax.Array, jax.Array]:
    """A token a row, int32 [B], and its logprob under the distribution that it was drawn from, float32 [B].

    Drawn from softmax(logits / temperature), kept to the top_k most likely and to the smallest set of mass top_p; the most
    likely token, with logprob 0, at temperature 0. keys_B2 are folded with steps_B, the position within the turn.
    """
    V = logits_BV.shape[-1]
    scaled_BV = logits_BV / jnp.maximum(temperature, 1e-6)
    if top_k and top_k < V:
        threshold_B = jax.lax.top_k(scaled_BV, top_k)[0][:, -1]
        scaled_BV = jnp.where(scaled_BV >= threshold_B[:, None], scaled_BV, -jnp.inf)
    if top_p < 1.0:
        sorted_BV = -jnp.sort(-scaled_BV, axis=-1)
        mass_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1)
        last_B = jnp.sum(mass_BV[:, :-1] < top_p, axis=-1)  # index of the token that completes the mass; at most the last
        threshold_B = jnp.take_along_axis(sorted_BV, last_B[:, None], axis=-1)
        scaled_BV = jnp.where(scaled_BV >= threshold_B, scaled_BV, -jnp.inf)

    def drawn() -> tuple[jax.Array, jax.Array]:
        return _inverse_cdf(scaled_BV, jax.vmap(_uniform)(keys_B2, steps_B))

    def likeliest() -> tuple[jax.Array, jax.Array]:
        return jnp.argmax(logits_BV, axis=-1), jnp.zeros(logits_BV.shape[:1], jnp.float32)

    token_B, logprob_B = jax.lax.cond(temperature > 0, drawn, likeliest)
    return token_B.astype(jnp.int32), logprob_B


def _uniform(key_2: jax.Array, step: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key_2), step))


def _inverse_cdf(logits_BV: jax.Array, uniform_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The token at which the running sum of softmax passes uniform_B, and its logprob.

    First among blocks of tokens, then within one: one random number a row instead of one a token, and sums that stay short.
    With the vocabulary split over devices, blocks stay whole, and only their sums and the chosen one travel. A token of
    probability zero is never taken.
    """
    B, V = logits_BV.shape
    most_B1 = logits_BV.max(axis=-1, keepdims=True)
    mass_BV = jnp.pad(jnp.exp(logits_BV - most_B1), ((0, 0), (0, -V % BLOCKS)))
    mass_BNM = mass_BV.reshape(B, BLOCKS, -1)
    ends_BN = jnp.cumsum(gathered(mass_BNM.sum(axis=-1)), axis=-1)
    total_B = ends_BN[:, -1]
    point_B = uniform_B * total_B
    block_B = _first_past(ends_BN, point_B)
    before_B = jnp.where(block_B > 0, _at(ends_BN, jnp.maximum(block_B - 1, 0)), 0.0)
    mass_BM = gathered(jnp.take_along_axis(mass_BNM, block_B[:, None, None], axis=1)[:, 0])
    inside_B = _first_past(jnp.cumsum(mass_BM, axis=-1), point_B - before_B)
    return block_B * mass_BM.shape[1] + inside_B, jnp.log(_at(mass_BM, inside_B) / total_B)


def _first_past(ends_BN: jax.Array, point_B: jax.Array) -> jax.Array:
    """The first index whose running sum exceeds the point; where rounding leaves none, the last that added something."""
    point_B = jnp.minimum(point_B, jnp.nextafter(ends_BN[:, -1], jnp.float32(0)))
    return jnp.sum(ends_BN <= point_B[:, None], axis=-1)


def _at(x_BN: jax.Array, index_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BN, index_B[:, None], axis=-1)[:, 0]


def logprob_of(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """log softmax(logits)[token], float32 [B]."""
    return _at(logits_BV, token_B) - jax.nn.logsumexp(logits_BV, axis=-1)
