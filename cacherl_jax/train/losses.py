"""Losses over token logprobs, and the logprobs themselves without ever holding logits of a whole batch.

Only tokens that the policy sampled carry loss; everything here takes that mask. No model is imported: hidden states and
the unembedding matrix come as arrays.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Metrics = dict[str, jax.Array]


def token_logprobs(
    hidden_BTD: jax.Array, unembed_VD: jax.Array, tokens_BT: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Logprob in nats of each token given those before it, and the entropy of that prediction; both [B, T] float32.

    Entry t belongs to token t and is computed from hidden state t-1; entry 0 of each row is 0. Logits exist for `chunk`
    positions at a time and are computed again in the backward pass, so that [B, T, V] is never built.
    """
    B, T, D = hidden_BTD.shape
    hidden_ND = hidden_BTD[:, :-1].reshape(-1, D)
    targets_N = tokens_BT[:, 1:].reshape(-1)
    N = hidden_ND.shape[0]

    @jax.checkpoint
    def of_chunk(hidden_CD: jax.Array, targets_C: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_CV = jnp.einsum("CD,VD->CV", hidden_CD, unembed_VD, preferred_element_type=jnp.float32)
        normalizer_C = jax.nn.logsumexp(logits_CV, axis=-1)
        chosen_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
        mean_C = (jnp.exp(logits_CV - normalizer_C[:, None]) * logits_CV).sum(axis=-1)
        return chosen_C - normalizer_C, jax.lax.stop_gradient(normalizer_C - mean_C)

    if chunk >= N:
        logprobs_N, entropy_N = of_chunk(hidden_ND, targets_N)
    else:
        pad = -N % chunk
        hidden_MCD = jnp.pad(hidden_ND, ((0, pad), (0, 0))).reshape(-1, chunk, D)
        targets_MC = jnp.pad(targets_N, (0, pad)).reshape(-1, chunk)
        logprobs_MC, entropy_MC = jax.lax.map(lambda x: of_chunk(*x), (hidden_MCD, targets_MC))
        logprobs_N, entropy_N = logprobs_MC.reshape(-1)[:N], entropy_MC.reshape(-1)[:N]

    def aligned(x_N: jax.Array) -> jax.Array:
        return jnp.pad(x_N.reshape(B, T - 1), ((0, 0), (1, 0)))

    return aligned(logprobs_N), aligned(entropy_N)


def masked_mean(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean over tokens where the mask is 1; 0 where there is none. Masked-out values reach neither value nor gradient."""
    kept_BT = jnp.where(mask_BT > 0, x_BT, 0.0)
    return (kept_BT * mask_BT).sum() / jnp.maximum(mask_BT.sum(), 1.0)


def predicted(mask_BT: jax.Array) -> jax.Array:
    """The mask without a row's first token, which nothing predicts."""
    return mask_BT.at[:, 0].set(0.0)


def sft_loss(logprobs_BT: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, Metrics]:
    """Mean negative logprob over masked tokens, nats per token."""
    return -masked_mean(logprobs_BT, predicted(mask_BT)), {}


def grpo_loss(
    logprobs_BT: jax.Array,
    behavior_logprobs_BT: jax.Array,
    ref_logprobs_BT: jax.Array,
    mask_BT: jax.Array,
    advantages_BT: jax.Array,
    old_logprobs_BT: jax.Array | None = None,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    importance_cap: float,
) -> tuple[jax.Array, Metrics]:
    """The clipped policy-gradient loss of GRPO plus a KL penalty, averaged over masked tokens of the whole batch.

    With ratio r = exp(logprob - old) and advantage A of the token's episode:  -w min(r A, clip(r, 1 - low, 1 + high) A)
    + kl_coef * k3,  k3 = exp(ref - logprob) - (ref - logprob) - 1  (Schulman's non-negative estimator of KL(policy, ref)).
    Source: DeepSeekMath, arXiv 2402.03300, equations 3 and 4; token-level mean over the batch.

    old is the trainer's logprob before the step's first update; None stands for the present one. behavior is the logprob
    under the distribution that the token was drawn from, and w = min(exp(old - behavior), importance_cap), a constant, makes
    the mean over drawn tokens one over the old policy's. Source: Yao et al. 2025, "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training", truncated importance sampling. w is 1 where sampler and trainer agree and nothing
    bends the draw. The policy here is always the untempered one, which is what is kept and evaluated: with a temperature, w
    undoes it, up to the cap (others scale the trainer's logits instead, and train the tempered policy, which no scaling
    gives under top-p or top-k). Tokens that those cut off are never drawn, and no weight brings them back.
    """
    mask_BT = predicted(mask_BT)
    old_BT = jax.lax.stop_gradient(logprobs_BT) if old_logprobs_BT is None else old_logprobs_BT
    # Outside the mask the logprobs mean nothing; equal ones keep exp() finite there.
    ratio_BT = jnp.exp(jnp.where(mask_BT > 0, logprobs_BT - old_BT, 0.0))
    importance_BT = jnp.exp(jnp.where(mask_BT > 0, old_BT - behavior_logprobs_BT, 0.0))
    weight_BT = jnp.minimum(importance_BT, importance_cap)  # no gradient: old and behavior are constants
    clipped_BT = jnp.clip(ratio_BT, 1.0 - clip_low, 1.0 + clip_high)
    policy_BT = -weight_BT * jnp.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    gap_BT = jnp.where(mask_BT > 0, ref_logprobs_BT - logprobs_BT, 0.0)
    kl_BT = jnp.exp(gap_BT) - gap_BT - 1.0
    policy, kl = masked_mean(policy_BT, mask_BT), masked_mean(kl_BT, mask_BT)
    metrics = {
        "policy_loss": policy,
        "kl": kl,
        "clipped": masked_mean((ratio_BT != clipped_BT).astype(jnp.float32), mask_BT),
        "importance": masked_mean(weight_BT, mask_BT),
        "truncated": masked_mean((importance_BT > importance_cap).astype(jnp.float32), mask_BT),
    }
    return policy + kl_coef * kl, metrics
