"""The paper's training setting (arXiv 2606.14179): adapters of rank 128, prompts of 16K and responses of 32K tokens, 16 x 16.

Command:  cacherl demo --config configs/qwen3_4b_paper.py --set weights=weights/qwen3-4b --out runs/qwen3_4b_paper
Plan:     cacherl plan --config configs/qwen3_4b_paper.py --topology v6e:2x2 --step grpo --set mesh.fsdp=4
Cost:     four v6e chips with --set mesh.fsdp=4 (25.1 GiB of 31.25 a chip); one is too small by 0.2 GiB
Expect:   see experiments/plan/ for memory and bounds on time; no such run has been made yet

Its cache, its reward by the worst tier, divided by the group's deviation, and its KL and learning rate of GRPO. Answers are
graded by the tasks' facts; the paper's judge is reward.answer=judge with the endpoint in reward.judge. SFT trains adapters, too,
where the paper trains all weights.
"""

from dataclasses import replace

from cacherl_jax import presets, sizes
from cacherl_jax.config import PAPER_CACHE, Config, MeshConfig, RewardConfig


def get_config() -> Config:
    run = presets.full(
        "qwen3_4b_paper", sizes.QWEN3_4B_2507, MeshConfig(), length=48 * 1024, sft_rows=1, grpo_rows=1, rollout_rows=1
    )
    run = presets.lora(run, rank=128, alpha=128.0)
    optimizer = replace(run.grpo.optimizer, learning_rate=1e-6)
    return replace(
        run,
        cache=PAPER_CACHE,
        rollout=replace(run.rollout, max_sampled_tokens=32 * 1024, max_turn_tokens=16 * 1024, min_tokens=(150,)),
        reward=RewardConfig(tier="paper", process="paper"),
        grpo=replace(run.grpo, divide_by_std=True, kl_coef=0.15, optimizer=optimizer),
    )
