"""Choosing tokens on the device."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np


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
        last_B = jnp.sum(mass_BV < top_p, axis=-1)  # index of the token that completes the mass
        threshold_B = jnp.take_along_axis(sorted_BV, last_B[:, None], axis=-1)
        scaled_BV = jnp.where(scaled_BV >= threshold_B, scaled_BV, -jnp.inf)

    def noise(key_2: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.wrap_key_data(key_2), step), (V,))

    def drawn() -> tuple[jax.Array, jax.Array]:
        token_B = jnp.argmax(scaled_BV + jax.vmap(noise)(keys_B2, steps_B), axis=-1)
        return token_B, logprob_of(scaled_BV, token_B)

    def likeliest() -> tuple[jax.Array, jax.Array]:
        return jnp.argmax(logits_BV, axis=-1), jnp.zeros(logits_BV.shape[:1], jnp.float32)

    token_B, logprob_B = jax.lax.cond(temperature > 0, drawn, likeliest)
    return token_B.astype(jnp.int32), logprob_B


def logprob_of(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """log softmax(logits)[token], float32 [B]."""
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
