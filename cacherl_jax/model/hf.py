"""Names and layouts of Hugging Face's Qwen3ForCausalLM, in one table used both ways.

Their linear weights are [out, in]; ours are [in, heads, head] or [in, out]. Layers are separate there, stacked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cacherl_jax.config import ModelConfig
from cacherl_jax.model.qwen3 import layer_table

# ours -> theirs, within a layer. All matrices are transposed between the two.
LAYER_NAMES: dict[str, str] = {
    "attention_norm_D": "input_layernorm",
    "query_DNH": "self_attn.q_proj",
    "key_DKH": "self_attn.k_proj",
    "value_DKH": "self_attn.v_proj",
    "query_norm_H": "self_attn.q_norm",
    "key_norm_H": "self_attn.k_norm",
    "output_NHD": "self_attn.o_proj",
    "mlp_norm_D": "post_attention_layernorm",
    "gate_DF": "mlp.gate_proj",
    "up_DF": "mlp.up_proj",
    "down_FD": "mlp.down_proj",
}
TOP_NAMES: dict[str, str] = {
    "embed_VD": "model.embed_tokens.weight",
    "final_norm_D": "model.norm.weight",
    "unembed_VD": "lm_head.weight",
}


def from_hf(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Our nested dict from a state dict of numpy arrays. Raises KeyError naming a tensor that is missing."""
    tree: dict[str, Any] = {
        ours: tensors[theirs] for ours, theirs in TOP_NAMES.items() if ours != "unembed_VD" or not config.tie_word_embeddings
    }
    layers = {}
    for ours, weight in layer_table(config).items():
        stacked = [tensors[f"model.layers.{i}.{LAYER_NAMES[ours]}.weight"] for i in range(config.num_layers)]
        layers[ours] = np.stack([w.T.reshape(weight.shape) for w in stacked])
    return tree | {"layers": layers}


def to_hf(config: ModelConfig, tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state dict of numpy arrays from our nested dict."""
    tensors = {TOP_NAMES[ours]: np.asarray(value) for ours, value in tree.items() if ours != "layers"}
    for ours, stacked in tree["layers"].items():
        outputs = _outputs(ours, layer_table(config)[ours].shape)
        for i, w in enumerate(np.asarray(stacked)):
            theirs = w if w.ndim == 1 else w.reshape(-1, outputs).T
            tensors[f"model.layers.{i}.{LAYER_NAMES[ours]}.weight"] = np.ascontiguousarray(theirs)
    return tensors


def _outputs(name: str, shape: tuple[int, ...]) -> int:
    """Size of a matrix's output side: heads x head for projections into heads, else the last axis."""
    return shape[-1] * (shape[-2] if name in ("query_DNH", "key_DKH", "value_DKH") else 1)
