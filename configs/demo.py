"""The whole method on the embedded tool world, with a Qwen3 of 0.9M parameters trained from scratch.

Command:  cacherl demo --config configs/demo.py --out runs/demo     (make demo)
Cost:     at most 900 CPU-seconds and 4 GB on a laptop, no network
Expect:   process accuracy on 400 unseen tasks about 0.6 after SFT and above 0.8 after GRPO; see experiments/demo/
"""

from cacherl_jax.config import Config, DataConfig, GrpoConfig, OptimizerConfig, SftConfig


def get_config() -> Config:
    return Config(
        name="demo",
        data=DataConfig(train_tasks=2500, demonstrators=("expert", "stopper", "stopper", "wanderer")),
        sft=SftConfig(steps=800, optimizer=OptimizerConfig(learning_rate=0.01, adam_learning_rate=2e-3)),
        grpo=GrpoConfig(steps=24),
    )
