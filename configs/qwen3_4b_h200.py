"""SFT and GRPO of all weights of Qwen3-4B on one H200.

Command:  cacherl demo --config configs/qwen3_4b_h200.py --set weights=weights/qwen3-4b --out runs/qwen3_4b_h200
Cost:     one H200, 500 steps of SFT and 100 of GRPO
Expect:   no such run has been made yet; memory on GPUs cannot be planned, see experiments/plan/
"""

from cacherl_jax import presets, sizes
from cacherl_jax.config import Config, MeshConfig


def get_config() -> Config:
    return presets.full("qwen3_4b_h200", sizes.QWEN3_4B_2507, MeshConfig(), length=8192, sft_rows=2, grpo_rows=2, rollout_rows=32)
