"""SFT and GRPO of adapters of Qwen3-4B on one v6e chip.

Command:  cacherl demo --config configs/qwen3_4b_lora_v6e_1.py --set weights=weights/qwen3-4b --out runs/qwen3_4b_lora_v6e_1
Plan:     cacherl plan --config configs/qwen3_4b_lora_v6e_1.py --topology v6e:1x1 --step grpo
Cost:     one v6e chip, 500 steps of SFT and 100 of GRPO
Expect:   see experiments/plan/ for memory and bounds on time; no such run has been made yet
"""

from cacherl_jax import presets, sizes
from cacherl_jax.config import Config, MeshConfig


def get_config() -> Config:
    run = presets.full(
        "qwen3_4b_lora_v6e_1", sizes.QWEN3_4B_2507, MeshConfig(), length=8192, sft_rows=1, grpo_rows=1, rollout_rows=8
    )
    return presets.lora(run, rank=16, alpha=32.0)
