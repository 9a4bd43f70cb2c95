"""SFT and GRPO of all weights of Qwen3-4B on a v5p-8: four chips, one host.

Command:  cacherl demo --config configs/qwen3_4b_v5p_8.py --set weights=weights/qwen3-4b --out runs/qwen3_4b_v5p_8
Plan:     cacherl plan --config configs/qwen3_4b_v5p_8.py --topology v5p:2x2x1 --step grpo
Cost:     four v5p chips, 500 steps of SFT and 100 of GRPO
Expect:   see experiments/plan/ for memory and bounds on time; no such run has been made yet
"""

from cacherl_jax import presets, sizes
from cacherl_jax.config import Config, MeshConfig


def get_config() -> Config:
    return presets.full(
        "qwen3_4b_v5p_8", sizes.QWEN3_4B_2507, MeshConfig(fsdp=4), length=8192, sft_rows=16, grpo_rows=16, rollout_rows=128
    )
