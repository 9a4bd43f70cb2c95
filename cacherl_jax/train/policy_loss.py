"""GRPO's loss over token logprobs, composed of one function an option: ratio, importance weight, KL.

A mask here is `losses.predicted`: positive where the policy sampled the token, and then its weight in every mean
(aggregation.py says which), 0 elsewhere. What stands elsewhere reaches neither value nor gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from cacherl_jax.config import GrpoConfig
from cacherl_jax.train.losses import Metrics, masked_mean


def grpo_loss(
    logprobs_BT: jax.Array,
    behavior_logprobs_BT: jax.Array,
    ref_logprobs_BT: jax.Array,
    mask_BT: jax.Array,
    advantages_BT: jax.Array,
    segment_ids_BT: jax.Array,
    old_logprobs_BT: jax.Array | None = None,
    *,
    grpo: GrpoConfig,
) -> tuple[jax.Array, Metrics]:
    """The clipped policy-gradient loss of GRPO and a KL penalty, averaged under the mask.

    With ratio r of new to old policy and advantage A of the token's episode:  -w min(r A, clip(r, 1 - low, 1 + high) A)
    + kl_coef * k.  Source: DeepSeekMath, arXiv 2402.03300, equations 3 and 4; low and high apart: DAPO, arXiv 2503.14476.
    r, w and k are those of `RATIOS`, `IMPORTANCE` and `KL` that `grpo` names. With the estimator k1 the KL is part of the
    reward: kl_coef * k1 of the old policy, a constant, is taken off each token's A, and nothing is added.

    old is the trainer's logprob before the step's first update; None stands for the present one. behavior is the logprob
    under the distribution that the token was drawn from, and w, a constant, makes the mean over drawn tokens one over the old
    policy's: at most `importance_cap`, or with `beyond_cap` "mask" 0 outside [1 / cap, cap]. w is 1 where sampler and trainer
    agree and nothing bends the draw. The policy here is always the untempered one, which is what is kept and evaluated: with a
    temperature, w undoes it, up to the cap (others scale the trainer's logits instead, and train the tempered policy, which no
    scaling gives under top-p or top-k). Tokens that those cut off are never drawn, and no weight brings them back.
    """
    old_BT = jax.lax.stop_gradient(logprobs_BT) if old_logprobs_BT is None else old_logprobs_BT
    # Outside the mask the logprobs mean nothing; equal ones keep exp() finite there.
    ratio_BT = RATIOS[grpo.ratio](jnp.where(mask_BT > 0, logprobs_BT - old_BT, 0.0), mask_BT, segment_ids_BT)
    drawn_BT = jnp.where(mask_BT > 0, old_BT - behavior_logprobs_BT, 0.0)  # no gradient: both are constants
    importance_BT = IMPORTANCE[grpo.importance](drawn_BT, segment_ids_BT)
    weight_BT = bounded(importance_BT, grpo)
    if grpo.kl == "k1_in_reward":
        held_BT = jnp.where(mask_BT > 0, ref_logprobs_BT - old_BT, 0.0)
        advantages_BT = advantages_BT + grpo.kl_coef * held_BT
    clipped_BT = jnp.clip(ratio_BT, 1.0 - grpo.clip_low, 1.0 + grpo.clip_high)
    policy_BT = -weight_BT * jnp.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    kl_BT = KL[grpo.kl](jnp.where(mask_BT > 0, ref_logprobs_BT - logprobs_BT, 0.0))
    policy, kl = masked_mean(policy_BT, mask_BT), masked_mean(kl_BT, mask_BT)
    outside_BT = importance_BT > grpo.importance_cap
    if grpo.beyond_cap == "mask":
        outside_BT |= importance_BT < 1.0 / grpo.importance_cap
    metrics = {
        "policy_loss": policy,
        "kl": kl,
        "clipped": masked_mean((ratio_BT != clipped_BT).astype(jnp.float32), mask_BT),
        "importance": masked_mean(weight_BT, mask_BT),
        "truncated": masked_mean(outside_BT.astype(jnp.float32), mask_BT),
    }
    return (policy if grpo.kl == "k1_in_reward" else policy + grpo.kl_coef * kl), metrics


# ---- ratio of the new policy to the old ------------------------------------------------------------------------------


def token_ratio(log_ratio_BT: jax.Array, mask_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Each token's own: PPO, GRPO."""
    return jnp.exp(log_ratio_BT)


def sequence_ratio(log_ratio_BT: jax.Array, mask_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """The geometric mean over the sampled tokens of the token's episode, so that clipping takes whole episodes: GSPO, arXiv
    2507.18071, equations 5 and 7, whose loss it is with `grpo.aggregation` "sequence_mean". It stays much nearer to 1 than a
    token's, and its clips are smaller: 3e-4 and 4e-4 there."""
    counts_BT = over_segments((mask_BT > 0).astype(jnp.float32), segment_ids_BT)
    return jnp.exp(over_segments(log_ratio_BT, segment_ids_BT) / jnp.maximum(counts_BT, 1.0))


RATIOS: Mapping[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "token": token_ratio,
    "sequence": sequence_ratio,
}


# ---- probability under the old policy over that of the draw ----------------------------------------------------------


def token_importance(drawn_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Each token's own. Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"."""
    return jnp.exp(drawn_BT)


def sequence_importance(drawn_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """The product over the episode: unbiased for the episode as a whole, and farther from 1 the longer it is. Source: Liu et
    al. 2025, "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch"."""
    return jnp.exp(over_segments(drawn_BT, segment_ids_BT))


def no_importance(drawn_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    return jnp.ones_like(drawn_BT)


IMPORTANCE: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "token": token_importance,
    "sequence": sequence_importance,
    "none": no_importance,
}


def bounded(importance_BT: jax.Array, grpo: GrpoConfig) -> jax.Array:
    """The weight: cut at the cap, or, to drop what sampler and trainer disagree on, 0 outside [1 / cap, cap] (IcePop: Ling
    team 2025, "Every Step Evolves", arXiv 2510.18855)."""
    if grpo.importance == "none":
        return importance_BT
    if grpo.beyond_cap == "truncate":
        return jnp.minimum(importance_BT, grpo.importance_cap)
    inside_BT = (importance_BT >= 1.0 / grpo.importance_cap) & (importance_BT <= grpo.importance_cap)
    return jnp.where(inside_BT, importance_BT, 0.0)


# ---- estimators of KL(policy, ref) from log(ref / policy) of a drawn token -------------------------------------------
# Source: Schulman 2020, "Approximating KL Divergence". As a term of the loss k2 has the gradient of the KL; k3, never
# negative and of little variance as a value, has that of KL(ref, policy); k1 has a gradient of mean zero, and so belongs into
# the reward.

KL: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "k1_in_reward": lambda gap_BT: -gap_BT,
    "k2": lambda gap_BT: 0.5 * jnp.square(gap_BT),
    "k3": lambda gap_BT: jnp.exp(gap_BT) - gap_BT - 1.0,
}


def over_segments(x_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """At each token the sum over its segment's tokens."""

    def of_row(x_T: jax.Array, segment_ids_T: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(x_T, segment_ids_T, num_segments=len(x_T) + 1)[segment_ids_T]

    return jax.vmap(of_row)(x_BT, segment_ids_BT)
