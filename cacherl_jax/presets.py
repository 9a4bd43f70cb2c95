"""What launch configurations of real models share; configs/ has one file a run on top of these."""

from __future__ import annotations

from dataclasses import replace

from cacherl_jax.config import (
    Config,
    GrpoConfig,
    LoraConfig,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    SftConfig,
)

ADAMW = OptimizerConfig(name="adamw", learning_rate=1e-5, warmup_steps=20, schedule="cosine", b2=0.95)


def full(
    name: str, model: ModelConfig, mesh: MeshConfig, *, length: int, sft_rows: int, grpo_rows: int, rollout_rows: int
) -> Config:
    """All weights trained: SFT, then GRPO, in packed rows of `length` tokens, so many to a batch; `rollout_rows` rows of an
    engine whose heads all devices share. Weights and moments in float32, products in bfloat16, layers computed again."""
    return Config(
        name=name,
        model=model,
        mesh=mesh,
        memory=MemoryConfig(compute="bfloat16", remat="full", logit_chunk=512),  # float32 logits of 4,096 tokens are 2.3 GiB
        sft=SftConfig(steps=500, tokens_per_batch=sft_rows * length, packed_length=length, optimizer=ADAMW),
        grpo=GrpoConfig(
            steps=100,
            prompts=16,
            group=16,
            kl_coef=1e-3,
            tokens_per_batch=grpo_rows * length,
            packed_length=length,
            optimizer=replace(ADAMW, learning_rate=1e-6, warmup_steps=5, schedule="constant"),
        ),
        rollout=RolloutConfig(
            rows=rollout_rows,
            tp=0 if model.num_kv_heads % _devices(mesh) else _devices(mesh),
            context=length,
            decode_steps=16,
            max_turns=12,
            max_turn_tokens=length // 4,
            max_sampled_tokens=length // 2,
            max_tool_tokens=1024,
        ),
    )


def lora(config: Config, rank: int, alpha: float) -> Config:
    """The same with adapters trained beside a frozen bfloat16 base, at ten times the learning rates."""
    adapter = LoraConfig(rank=rank, alpha=alpha)
    sft = replace(config.sft, lora=adapter, optimizer=_faster(config.sft.optimizer))
    grpo = replace(config.grpo, lora=adapter, optimizer=_faster(config.grpo.optimizer))
    return replace(config, model=replace(config.model, dtype="bfloat16"), sft=sft, grpo=grpo)


def bfloat16_moments(config: Config) -> Config:
    """The same with half as much optimizer state."""
    sft = replace(config.sft, optimizer=replace(config.sft.optimizer, moments="bfloat16"))
    grpo = replace(config.grpo, optimizer=replace(config.grpo.optimizer, moments="bfloat16"))
    return replace(config, sft=sft, grpo=grpo)


def _faster(optimizer: OptimizerConfig) -> OptimizerConfig:
    return replace(optimizer, learning_rate=10 * optimizer.learning_rate)


def _devices(mesh: MeshConfig) -> int:
    return mesh.data * mesh.fsdp * mesh.seq * mesh.tp
