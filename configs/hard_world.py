"""The embedded tool world without its easy tasks: chains of three and four calls, writes read back, errors, choices.

Command:  cacherl demo --config configs/hard_world.py --out runs/hard_world
Cost:     about 1,000 CPU-seconds and 1.5 GB on a laptop, no network
Expect:   process accuracy about 0.49 after SFT, 0.71 after GRPO, 0.73 of the expert's clone; see experiments/live_control/
"""

from cacherl_jax.config import Config, DataConfig, GrpoConfig, MemoryConfig, OptimizerConfig, SftConfig, TokenizerConfig


def get_config() -> Config:
    return Config(
        name="hard_world",
        data=DataConfig(
            train_tasks=2000,
            validation_tasks=50,
            test_tasks=1000,
            demonstrators=("expert", "stopper", "stopper", "stopper", "wanderer"),
            families=("no_call", "chain3", "chain4", "write_then_read", "error_recovery", "choose"),
        ),
        tokenizer=TokenizerConfig(vocab_size=1100),
        memory=MemoryConfig(remat="dots"),  # writing every residual takes a CPU longer than computing some of them again
        sft=SftConfig(steps=900, optimizer=OptimizerConfig(learning_rate=4.5e-3, adam_learning_rate=3e-3)),
        grpo=GrpoConfig(
            steps=24,
            prompts=16,
            group=8,
            kl_coef=0.1,
            checkpoint_every=8,
            validate_every=24,
            optimizer=OptimizerConfig(name="adamw", learning_rate=5e-4, warmup_steps=2, schedule="linear"),
        ),
    )
