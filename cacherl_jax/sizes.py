"""The dense Qwen3 family: each release's config.json as a ModelConfig, for plans and for random weights of a real size.

Source: Hugging Face, Qwen/Qwen3-SIZE and Qwen/Qwen3-4B-Thinking-2507 (the same for Instruct-2507).
"""

from __future__ import annotations

from dataclasses import replace

from cacherl_jax.config import ModelConfig

QWEN3_0_6B = ModelConfig(
    vocab_size=151_936,
    hidden_size=1024,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=3072,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    initializer_range=0.02,
    embedding_range=0.02,
)
QWEN3_1_7B = replace(QWEN3_0_6B, hidden_size=2048, intermediate_size=6144)
QWEN3_4B = replace(QWEN3_0_6B, hidden_size=2560, num_layers=36, num_heads=32, intermediate_size=9728)
QWEN3_4B_2507 = replace(QWEN3_4B, rope_theta=5e6)  # Thinking and Instruct
QWEN3_8B = replace(QWEN3_4B, hidden_size=4096, intermediate_size=12_288, tie_word_embeddings=False)
QWEN3_14B = replace(QWEN3_8B, hidden_size=5120, num_layers=40, num_heads=40, intermediate_size=17_408)
QWEN3_32B = replace(QWEN3_14B, num_layers=64, num_heads=64, intermediate_size=25_600)
