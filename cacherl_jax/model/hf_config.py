"""Hugging Face's config.json of a dense Qwen3, read into a ModelConfig and written from one.

Every field is read, or must have the one value that this model implements, or decides nothing about the function. A field
that is none of these is refused: it may change what the weights mean.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from cacherl_jax.config import Config, ConfigError, ModelConfig

# theirs -> ours.
READ: dict[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}
# transformers writes all of them; these two are what it takes where they are absent.
DEFAULTS: dict[str, Any] = {"tie_word_embeddings": False, "initializer_range": 0.02}

# Fields with the values that are implemented. Absent is as good.
FIXED: dict[str, tuple[Any, ...]] = {
    "architectures": (["Qwen3ForCausalLM"], None),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0,),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "pruned_heads": ({}, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
}
# Fields that decide nothing about the function: notes, token ids, and the window that use_sliding_window turns off.
UNREAD = {
    "_name_or_path", "transformers_version", "use_cache", "return_dict", "output_hidden_states", "output_attentions",
    "max_position_embeddings", "max_window_layers", "sliding_window", "bos_token_id", "eos_token_id", "pad_token_id",
    "sep_token_id", "decoder_start_token_id", "id2label", "label2id", "problem_type", "task_specific_params", "tokenizer_class",
    "prefix", "finetuning_task", "is_decoder",
}  # fmt: skip
ROPE = {"rope_theta", "rope_parameters", "rope_scaling"}
PLAIN_ROPE: dict[str, tuple[Any, ...]] = {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1.0,)}
DTYPES = ("dtype", "torch_dtype")  # transformers 5's name and the one before


def from_hf_config(fields: Mapping[str, Any], dtype: str | None = None) -> ModelConfig:
    """The model's configuration; weights in `dtype`, or in the one that config.json names.

    Raises ConfigError naming the field that is missing, unknown or has a value that is not implemented.
    """
    if fields.get("model_type") != "qwen3":
        raise ConfigError(f"model_type is {fields.get('model_type')!r}; only dense Qwen3 ('qwen3') can be read")
    _require_values(fields, FIXED, "")
    known = READ.keys() | FIXED.keys() | UNREAD | ROPE | {*DTYPES, "model_type", "layer_types"}
    if unknown := sorted(fields.keys() - known):
        raise ConfigError(f"field {unknown[0]!r} is not known; if it changes nothing about the model, delete it and try again")
    if absent := sorted(READ.keys() - fields.keys() - DEFAULTS.keys()):
        raise ConfigError(f"field {absent[0]!r} is missing")
    for i, kind in enumerate(fields.get("layer_types") or ()):
        if kind != "full_attention":
            raise ConfigError(f"layer_types of layer {i} is {kind!r}; only 'full_attention' is implemented")
    model = {ours: fields.get(theirs, DEFAULTS.get(theirs)) for theirs, ours in READ.items()}
    model |= {"rope_theta": _rope_theta(fields), "dtype": dtype or _dtype(fields)}
    model["embedding_range"] = model["initializer_range"]
    try:
        return Config.from_json({"model": model}).model
    except ConfigError as error:
        theirs = next((t for t, ours in READ.items() if f"model.{ours} " in str(error)), None)
        raise ConfigError(f"field {theirs!r}: {error}" if theirs else str(error)) from error


def to_hf_config(config: ModelConfig, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json's fields: those of `base`, with what the model says in their place."""
    fields = copy.deepcopy(dict(base)) if base else copy.deepcopy(_PLAIN)
    fields |= {theirs: getattr(config, ours) for theirs, ours in READ.items()}
    if fields.get("layer_types") is not None:
        fields["layer_types"] = ["full_attention"] * config.num_layers
    if fields.get("rope_parameters") is not None:
        fields["rope_parameters"]["rope_theta"] = config.rope_theta
    if "rope_theta" in fields or fields.get("rope_parameters") is None:
        fields["rope_theta"] = config.rope_theta
    named = [name for name in DTYPES if name in fields] or ["dtype"]
    return fields | dict.fromkeys(named, config.dtype)


# Of a model that came from nowhere. The longest context is Qwen3's own; nothing here depends on it.
_PLAIN: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "use_cache": True,
    "bos_token_id": None,
}


def _require_values(fields: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], prefix: str) -> None:
    for name, values in allowed.items():
        if name in fields and fields[name] not in values:
            raise ConfigError(f"{prefix}{name} is {fields[name]!r}; only {values[0]!r} is implemented")


def _rope_theta(fields: Mapping[str, Any]) -> float:
    """RoPE's base, from the top level or from transformers 5's rope_parameters."""
    found = [fields["rope_theta"]] if fields.get("rope_theta") is not None else []
    for name in ("rope_parameters", "rope_scaling"):
        inner = fields.get(name) or {}
        if not isinstance(inner, Mapping):
            raise ConfigError(f"{name} is {inner!r}, expected an object")
        _require_values(inner, PLAIN_ROPE, f"{name}.")  # YaRN and its kind end here
        if unknown := sorted(inner.keys() - PLAIN_ROPE.keys() - {"rope_theta"}):
            raise ConfigError(f"{name}.{unknown[0]} is {inner[unknown[0]]!r}; no scaling of RoPE is implemented")
        found += [inner["rope_theta"]] if "rope_theta" in inner else []
    if not found:
        raise ConfigError("field 'rope_theta' is missing, at the top level and in rope_parameters")
    if found[0] != found[-1]:
        raise ConfigError(f"rope_theta is {found[0]!r} and in rope_parameters {found[-1]!r}; they must agree")
    return found[0]


def _dtype(fields: Mapping[str, Any]) -> str:
    named = next((fields[name] for name in DTYPES if fields.get(name) is not None), None)
    if named not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype is {named!r}; name the one to convert to with --dtype float32 or --dtype bfloat16")
    return named
