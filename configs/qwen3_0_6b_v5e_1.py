"""SFT and GRPO of all weights of Qwen3-0.6B on the one v5e chip of a Colab notebook.

Command:  cacherl demo --config configs/qwen3_0_6b_v5e_1.py --set weights=weights/qwen3-0.6b --out runs/qwen3_0_6b_v5e_1
Plan:     cacherl plan --config configs/qwen3_0_6b_v5e_1.py --topology v5e:1x1 --step grpo
Cost:     one v5e chip, 500 steps of SFT and 100 of GRPO
Expect:   see experiments/plan/ for memory and bounds on time; no such run has been made yet
"""

from cacherl_jax import presets, sizes
from cacherl_jax.config import Config, MeshConfig


def get_config() -> Config:
    return presets.bfloat16_moments(
        presets.full("qwen3_0_6b_v5e_1", sizes.QWEN3_0_6B, MeshConfig(), length=4096, sft_rows=1, grpo_rows=1, rollout_rows=8)
    )
