"""Model FLOPs by formula: what the mathematics needs, whatever a program computes twice (remat) or pads.

A multiplication and an addition are two. Counted are the products with weights, causal attention over the tokens that a
token may read, and the vocabulary; norms, RoPE and softmax, under 1 %, are not. XLA's own count takes a scanned layer once.
"""

from __future__ import annotations

from cacherl_jax.config import LoraConfig, ModelConfig
from cacherl_jax.model.lora import WEIGHTS
from cacherl_jax.model.qwen3 import layer_table


def matrices(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """(inputs, outputs) of each matrix of a layer, by the names of LoraConfig.matrices."""
    layer = layer_table(c)
    return {short: layer[weight].shape for short, weight in WEIGHTS.items()}


def forward(c: ModelConfig, rows: int, length: int) -> dict[str, int]:
    """FLOPs of reading `rows` rows of `length` tokens: in the layers' matrices, attention, and the vocabulary."""
    tokens = rows * length
    return {
        "matrices": 2 * tokens * c.num_layers * sum(a * b for a, b in matrices(c).values()),
        "attention": c.num_layers * rows * pairs(length) * attention_of_a_pair(c),
        "vocabulary": 2 * tokens * c.hidden_size * c.vocab_size,
    }


def pairs(length: int, start: int = 0) -> int:
    """How many (query, key) pairs causal attention has for `length` tokens after `start` others."""
    return length * start + length * (length + 1) // 2


def attention_of_a_pair(c: ModelConfig) -> int:
    """Query times key, and weight times value, in one layer."""
    return 4 * c.num_heads * c.head_dim


def gradients(c: ModelConfig, rows: int, length: int, lora: LoraConfig | None = None) -> int:
    """Forward and backward: every product comes again for its input's gradient, and once more for its weight's if that is
    trained. Attention has two inputs. With an adapter, weights and vocabulary have no gradient but the adapter's have."""
    f = forward(c, rows, length)
    if lora is None or not lora.rank:
        return 3 * sum(f.values())
    adapter = sum(sum(shape) for name, shape in matrices(c).items() if name in lora.matrices)
    adapted = 2 * rows * length * c.num_layers * lora.rank * adapter
    return 2 * (f["matrices"] + f["vocabulary"]) + 3 * (f["attention"] + adapted)


def prefill(c: ModelConfig, rows: int, length: int, start: int) -> int:
    """Reading `length` tokens into each of `rows` cache rows that hold `start`; no logits are made."""
    return forward(c, rows, length)["matrices"] + c.num_layers * rows * pairs(length, start) * attention_of_a_pair(c)


def decode(c: ModelConfig, rows: int, context: int) -> int:
    """One token in each of `rows` rows, which read `context` tokens."""
    f = forward(c, rows, 1)
    return f["matrices"] + f["vocabulary"] + c.num_layers * rows * context * attention_of_a_pair(c)
