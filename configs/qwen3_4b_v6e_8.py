"""SFT and GRPO of all weights of Qwen3-4B on eight v6e chips, one host.

Command:  cacherl demo --config configs/qwen3_4b_v6e_8.py --set weights=weights/qwen3-4b --out runs/qwen3_4b_v6e_8
Plan:     cacherl plan --config configs/qwen3_4b_v6e_8.py --topology v6e:2x4 --step grpo
Cost:     eight v6e chips, 500 steps of SFT and 100 of GRPO
Expect:   see experiments/plan/ for memory and bounds on time; no such run has been made yet
"""

from cacherl_jax import presets, sizes
from cacherl_jax.config import Config, MeshConfig


def get_config() -> Config:
    return presets.full(
        "qwen3_4b_v6e_8", sizes.QWEN3_4B_2507, MeshConfig(fsdp=8), length=8192, sft_rows=16, grpo_rows=16, rollout_rows=96
    )
