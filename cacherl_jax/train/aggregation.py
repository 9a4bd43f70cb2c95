"""How the terms of tokens become one loss: the weight of each episode's tokens, and what the weighted sum is divided by.

Weights are given to rows before they are put into batches, so that neither packing nor the split into batches changes the
loss: it is sum_t u_t x_t / divisor over all tokens t that carry loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from cacherl_jax.config import Config
from cacherl_jax.data.pipeline import Row

Weighted = tuple[list[Row], float | None]  # rows with weights, and the divisor; None: the sum of the weights


def loss_tokens(row: Row) -> int:
    """How many tokens of the row carry loss; nothing predicts its first."""
    return int(row.mask_T[1:].sum())


def token_mean(rows: Sequence[Row], config: Config) -> Weighted:
    """The mean over all tokens of the update: DAPO, arXiv 2503.14476. Long episodes weigh more."""
    return list(rows), None


def sequence_mean(rows: Sequence[Row], config: Config) -> Weighted:
    """The mean over episodes of the mean over an episode's tokens: GRPO, arXiv 2402.03300. In a long episode a token weighs
    less. The weights are scaled to a mean of 1 over the tokens."""
    counts = [loss_tokens(row) for row in rows]
    mean = sum(counts) / max(1, sum(count > 0 for count in counts))
    return [replace(row, loss_weight=mean / max(1, count)) for row, count in zip(rows, counts, strict=True)], None


def token_budget(rows: Sequence[Row], config: Config) -> Weighted:
    """The sum over tokens, divided by as many as the update's episodes may sample at most, a constant: Dr. GRPO, arXiv
    2503.20783. A token's weight depends on no other episode."""
    episodes = config.grpo.prompts * config.grpo.group / config.grpo.minibatches
    return list(rows), episodes * config.rollout.max_sampled_tokens


AGGREGATIONS: Mapping[str, Callable[[Sequence[Row], Config], Weighted]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "token_budget": token_budget,
}
