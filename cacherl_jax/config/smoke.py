"""Any configuration in seconds: what a launch or a test can go through before it costs anything."""

from __future__ import annotations

from dataclasses import replace

from cacherl_jax.config.data import TokenizerConfig
from cacherl_jax.config.run import Config


def smoke(config: Config) -> Config:
    """`config` with a tiny model that learns nothing, few tasks and few steps; corpora, tools, cache, rewards and losses stay.

    Nearly all of its time is compilation, so everything has one shape: rows of a whole context, packed. Configurations that
    differ in their data share their programs.
    """
    return replace(
        config,
        data=replace(config.data, train_tasks=20, validation_tasks=2, test_tasks=6),
        tokenizer=TokenizerConfig(vocab_size=680),
        model=replace(config.model, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=48),
        sft=replace(config.sft, steps=4, checkpoint_every=2, packed_length=config.rollout.context),
        rollout=replace(config.rollout, rows=8, max_turn_tokens=24, max_sampled_tokens=60),
        grpo=replace(
            config.grpo, steps=2, prompts=2, group=3, checkpoint_every=1, validate_every=2, packed_length=config.rollout.context
        ),
        eval=replace(config.eval, bootstrap=100),
        iterate=replace(config.iterate, rounds=1, rejection=replace(config.iterate.rejection, tasks=10)),
    )
