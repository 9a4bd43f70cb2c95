"""The whole method on the embedded tool world, with a Qwen3 of 0.9M parameters trained from scratch.

Command:  cacherl demo --config configs/demo.py --out runs/demo     (make demo)
Cost:     about 680 CPU-seconds and 1.5 GB on a laptop, no network
Expect:   process accuracy on 400 unseen tasks about 0.65 after SFT and 0.85 after GRPO; see experiments/demo/
"""

from cacherl_jax.config import CacheConfig, Config, DataConfig, GrpoConfig, OptimizerConfig, SftConfig, TokenizerConfig


def get_config() -> Config:
    return Config(
        name="demo",
        data=DataConfig(train_tasks=2500, demonstrators=("expert", "stopper", "stopper", "stopper", "wanderer")),
        cache=CacheConfig(adapted=False, fidelity="table"),  # exact, fuzzy and best effort, weighted by the fixed table
        tokenizer=TokenizerConfig(vocab_size=1100),
        sft=SftConfig(steps=900, optimizer=OptimizerConfig(learning_rate=4.5e-3, adam_learning_rate=3e-3)),
        grpo=GrpoConfig(
            steps=20,
            prompts=16,
            group=8,
            kl_coef=0.1,
            optimizer=OptimizerConfig(name="adamw", learning_rate=5e-4, warmup_steps=2, schedule="linear"),
        ),
    )
