"""The whole method on the embedded tool world, with a Qwen3 of 0.9M parameters trained from scratch.

Command:  cacherl demo --config configs/demo.py --out runs/demo     (make demo)
Cost:     at most 900 CPU-seconds and 4 GB on a laptop, no network
Expect:   see experiments/demo/README.md
"""

from cacherl_jax.config import Config


def get_config() -> Config:
    return Config(name="demo")
