"""Hugging Face's config.json of a dense Qwen3, read into a ModelConfig and written from one.

Every field is read, or must have the one value that this model implements, or decides nothing about the function. A field
that is none of these is refused: it may change what the weights mean.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from cacherl_jax.config import Config, ConfigError, ModelConfig, YarnConfig

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
ROPE_TYPES = ("default", "yarn")
YARN: dict[str, Any] = dataclasses.asdict(YarnConfig())  # the names are theirs
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
    theta, yarn = _rope(fields)
    model |= {"rope_theta": theta, "yarn": yarn, "dtype": dtype or _dtype(fields)}
    model["embedding_range"] = model["initializer_range"]
    try:
        return Config.from_json({"model": model}).model
    except ConfigError as error:
        theirs = next((t for t, ours in READ.items() if f"model.{ours} " in str(error)), None)
        if "model.yarn." in str(error):
            theirs = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
        raise ConfigError(f"field {theirs!r}: {error}" if theirs else str(error)) from error


def to_hf_config(config: ModelConfig, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json's fields: those of `base`, with what the model says in their place."""
    fields = copy.deepcopy(dict(base)) if base else copy.deepcopy(_PLAIN)
    fields |= {theirs: getattr(config, ours) for theirs, ours in READ.items()}
    if fields.get("layer_types") is not None:
        fields["layer_types"] = ["full_attention"] * config.num_layers
    _write_rope(fields, config)
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


def _rope(fields: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """RoPE's base, and YaRN's fields, from where transformers 5 (rope_parameters) or 4 (the top level, rope_scaling) has them."""
    thetas = {"rope_theta": fields["rope_theta"]} if fields.get("rope_theta") is not None else {}
    yarns = {}
    for name in ("rope_parameters", "rope_scaling"):
        inner = fields.get(name) or {}
        if not isinstance(inner, Mapping):
            raise ConfigError(f"{name} is {inner!r}, expected an object")
        thetas |= {f"{name}.rope_theta": inner["rope_theta"]} if inner.get("rope_theta") is not None else {}
        yarns |= {name: _yarn(inner, name, fields.get("max_position_embeddings"))} if inner else {}
    if not thetas:
        raise ConfigError("field 'rope_theta' is missing, at the top level and in rope_parameters")
    for found in (thetas, yarns):
        for name, value in found.items():
            first = next(iter(found))
            if value != found[first]:
                raise ConfigError(f"{first} is {found[first]!r} and {name} {value!r}; they must agree")
    return next(iter(thetas.values())), next(iter(yarns.values()), YARN)


def _yarn(inner: Mapping[str, Any], where: str, longest: int | None) -> dict[str, Any]:
    """All of YaRN's fields as rope_parameters or rope_scaling has them; with factor 1 where RoPE is plain."""
    kinds = {name: inner[name] for name in ("rope_type", "type") if name in inner}
    for name, kind in kinds.items():
        if kind not in ROPE_TYPES or kind != next(iter(kinds.values())):
            raise ConfigError(f"{where}.{name} is {kind!r}; one of {', '.join(map(repr, ROPE_TYPES))} is implemented")
    _require_values(inner, {"partial_rotary_factor": (1.0,)}, f"{where}.")
    given = {name: value for name, value in inner.items() if name not in {*kinds, "partial_rotary_factor", "rope_theta"}}
    known = YARN.keys() if "yarn" in kinds.values() else set()
    if unknown := sorted(given.keys() - known):
        raise ConfigError(f"{where}.{unknown[0]} is {given[unknown[0]]!r}; this scaling of RoPE is not implemented")
    if not known:
        return YARN
    given = {name: value for name, value in given.items() if value is not None or name == "truncate"}
    for name in ("beta_fast", "beta_slow"):
        if not given.get(name):
            given.pop(name, None)  # transformers takes 0 as absent
    if "factor" not in given:
        raise ConfigError(f"{where}.factor is missing; YaRN needs it")
    if longest is not None:
        given.setdefault("original_max_position_embeddings", longest)
    if "original_max_position_embeddings" not in given:
        raise ConfigError(f"{where}.original_max_position_embeddings is missing; YaRN needs it")
    if given["factor"] == 1:
        if given.get("attention_factor", 1) != 1:
            raise ConfigError(f"{where}.attention_factor is {given['attention_factor']!r} and factor 1; only 1 is implemented then")
        return YARN
    return YARN | given


def _write_rope(fields: dict[str, Any], config: ModelConfig) -> None:
    """Puts RoPE's base and YaRN where `fields` has them, or where both transformers 4 and 5 find them."""
    before = _rope(fields)[1] if any(fields.get(name) for name in ROPE) else YARN
    after = YARN if config.yarn.factor == 1 else dataclasses.asdict(config.yarn)
    holder = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    if before != after:
        off, context = after["factor"] == 1, "original_max_position_embeddings"
        kept = ("factor", context)
        inner = {name: value for name, value in after.items() if name in kept or value != YARN[name]}
        fields[holder] = {"rope_type": "default"} if off else {"rope_type": "yarn"} | inner
        # transformers warns when it does not fit the factor; vLLM takes the longest context from it.
        fields["max_position_embeddings"] = before[context] if off else int(after[context] * after["factor"])
    for name in ("rope_parameters", "rope_scaling"):
        if fields.get(name) and (name == "rope_parameters" or "rope_theta" in fields[name]):
            fields[name]["rope_theta"] = config.rope_theta
    if "rope_theta" in fields or holder == "rope_scaling":
        fields["rope_theta"] = config.rope_theta


def _dtype(fields: Mapping[str, Any]) -> str:
    named = next((fields[name] for name in DTYPES if fields.get(name) is not None), None)
    if named not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype is {named!r}; name the one to convert to with --dtype float32 or --dtype bfloat16")
    return named
