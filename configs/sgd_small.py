"""The same job on real recorded conversations: Schema-Guided Dialogue, six services, a Qwen3 of 1M parameters from scratch.

Command:  cacherl demo --config configs/sgd_small.py --set data.path=sgd --out runs/sgd_small
Cost:     at most 3,600 CPU-seconds, 4 GB
Expect:   see experiments/sgd_small/

`sgd` is a folder with the upstream repository's train/ and dev/ (https://github.com/google-research-datasets/
dstc8-schema-guided-dialogue, CC BY-SA 4.0), compressed or not.
"""

from cacherl_jax.config import (
    CacheConfig,
    Config,
    DataConfig,
    GrpoConfig,
    OptimizerConfig,
    RolloutConfig,
    SftConfig,
    TokenizerConfig,
)

# Services of short dialogues and short results, so that a small model has a chance.
SEEN = ("Banks_1", "Media_1", "Music_1", "Music_2", "RideSharing_1", "RideSharing_2")
UNSEEN = ("Alarm_1", "Banks_2", "Media_2")


def get_config() -> Config:
    return Config(
        name="sgd_small",
        data=DataConfig(
            source="sgd",
            path="sgd",
            services=SEEN,
            unseen_services=UNSEEN,
            train_tasks=100_000,  # all of them
            validation_tasks=100,
            test_tasks=100_000,
        ),
        cache=CacheConfig(adapted=False, fidelity="table"),  # exact, fuzzy and best effort, weighted by the fixed table
        tokenizer=TokenizerConfig(vocab_size=1600),
        sft=SftConfig(steps=3000, optimizer=OptimizerConfig(learning_rate=5e-3, adam_learning_rate=2e-3)),
        rollout=RolloutConfig(context=1024, max_turns=24, max_turn_tokens=96, max_sampled_tokens=600, max_tool_tokens=96),
        grpo=GrpoConfig(
            steps=20,
            prompts=8,
            group=8,
            kl_coef=0.05,
            optimizer=OptimizerConfig(name="adamw", learning_rate=5e-4, warmup_steps=2, schedule="linear"),
            validate_every=5,
        ),
    )
