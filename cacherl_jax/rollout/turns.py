"""One turn a prompt, for prompts without tools: what a policy says when it is asked something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cacherl_jax.model import qwen3
from cacherl_jax.rollout.engine import Engine, Opening, Read


@dataclass(frozen=True)
class Prompt:
    """ids to read, tokens the turn may take at most, and the key of its draws (uint32 [2])."""

    ids: Sequence[int]
    budget: int
    key_2: np.ndarray


def sample_turns(engine: Engine, model: qwen3.Qwen3, prompts: Sequence[Prompt], temperature: float) -> list[list[int]]:
    """The sampled ids of each prompt's turn, its stop token included if it came. `model` as `engine.place` gives it.

    At most `engine.rows` prompts, and each must leave room for its budget in the context; raises ValueError otherwise. A
    turn does not depend on the others that are sampled with it.
    """
    if len(prompts) > engine.rows:
        raise ValueError(f"{len(prompts)} prompts for {engine.rows} rows")
    for prompt in prompts:
        if len(prompt.ids) + prompt.budget > engine.context:
            raise ValueError(f"{len(prompt.ids)} + {prompt.budget} tokens exceed the context of {engine.context}")
    plan = engine.plan([Read(row, 0, prompt.ids[:-1]) for row, prompt in enumerate(prompts)], [])
    state = engine.append(model, engine.init(), plan)
    openings = {row: Opening(len(p.ids) - 1, p.ids[-1], p.budget, 0, p.key_2) for row, p in enumerate(prompts)}
    turns: list[list[int]] = [[] for _ in prompts]
    running = set(openings)
    while running:
        state, out = engine.decode(model, state, openings, temperature)
        openings, decoded = {}, engine.read(out)
        for row in list(running):
            turns[row] += decoded.tokens_BN[row, : decoded.counts_B[row]].tolist()
            if decoded.stopped_B[row] or len(turns[row]) >= prompts[row].budget:
                running.remove(row)
    return turns
