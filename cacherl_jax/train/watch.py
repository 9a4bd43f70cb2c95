"""How long the policy thinks and talks, and warnings when it stops exploring or its thinking drifts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cacherl_jax.config import WatchConfig
from cacherl_jax.text.tokenizer import Tokenizer
from cacherl_jax.trajectory import Source, Trajectory


def closing_ids(tok: Tokenizer) -> np.ndarray:
    """The ids whose text closes a thinking block: </think>, and tokens that a tokenizer has for it with its surroundings."""
    return np.array([i for i in range(tok.vocab_size) if "</think>" in tok.decode([i])], np.int32)


def lengths(trajectories: Sequence[Trajectory], closing: np.ndarray) -> dict[str, float]:
    """Tokens sampled and tokens thought, means over turns and over episodes; "cut_thoughts": the share of turns that ended
    inside their thinking block, all of which counts as thought."""
    sampled, thought, cut = [], [], []
    for t in trajectories:
        for segment in t.segments:
            if segment.source is Source.SAMPLED:
                closes_T = np.isin(t.tokens_T[segment.start : segment.stop], closing)
                sampled.append(len(closes_T))
                cut.append(not closes_T.any())
                thought.append(len(closes_T) if cut[-1] else int(closes_T.argmax()))
    turns, episodes = max(1, len(sampled)), max(1, len(trajectories))
    return {
        "sampled_per_turn": sum(sampled) / turns,
        "sampled_per_episode": sum(sampled) / episodes,
        "think_per_turn": sum(thought) / turns,
        "think_per_episode": sum(thought) / episodes,
        "cut_thoughts": sum(cut) / turns,
    }


def warnings(earlier: Sequence[Mapping[str, Any]], row: Mapping[str, Any], config: WatchConfig) -> list[str]:
    """What a person should look at in `row`, a step's metrics, against the run's first `config.steps` steps among those
    `earlier`. Nothing before there are so many."""

    def compared(value: Callable[[Mapping[str, Any]], float | None]) -> tuple[float, float] | None:
        """The first steps' mean, and this step's value."""
        first = [x for x in map(value, earlier) if x is not None][: config.steps]
        now = value(row)
        return (float(np.mean(first)), now) if now is not None and len(first) == config.steps else None

    found = []
    entropy = compared(lambda r: r.get("entropy"))
    if entropy is not None and entropy[1] < config.entropy * entropy[0]:
        found.append(f"entropy {entropy[1]:.3g} is below {config.entropy:g} of the first steps' {entropy[0]:.3g}")
    think = compared(lambda r: r.get("lengths", {}).get("think_per_turn"))
    if think is not None and not think[0] / config.think <= think[1] <= think[0] * config.think:
        found.append(f"thinking takes {think[1]:.3g} tokens a turn, {think[0]:.3g} in the first steps")
    return found
