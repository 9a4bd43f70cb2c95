"""What a stage leaves when it trained an adapter in the weights' place, and that adapter in PEFT's layout.

    STAGE/adapter/<step>/   checkpoints of the adapter and its optimizer, while it is trained
    STAGE/adapter.json      its configuration, the model that it belongs to, and some rows of tokens that it was trained on
    STAGE/checkpoints/      the merged model, written when training is done: the next stage reads it like any other

The base is a folder (a converted model or a stage), or random weights named by their seed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cacherl_jax import checkpoint, processes
from cacherl_jax import mesh as meshes
from cacherl_jax.config import Config, ConfigError, LoraConfig, ModelConfig
from cacherl_jax.model import lora, qwen3
from cacherl_jax.train import step as steps

DESCRIPTION = "adapter.json"
ROWS, ROW_TOKENS = 8, 512  # of training tokens kept, to measure what merging changes


def checkpoints(stage: Path, config: LoraConfig) -> Path:
    """Where the checkpoints of what is trained go."""
    return stage / ("adapter" if config.rank else "checkpoints")


def abstract_adapter(model: ModelConfig, config: LoraConfig, mesh: Mesh) -> lora.Adapter:
    """The adapter's shapes and places on `mesh`, to restore into."""
    shapes = jax.eval_shape(lambda: lora.init(model, config, jax.random.key(0)))
    where = lora.shardings(model, config, mesh)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, where)


def finish(
    stage: Path, base: Path | int, model: qwen3.Qwen3, step: int, rows: Sequence[np.ndarray], *, donate: bool = False
) -> qwen3.Qwen3:
    """Merges `model`, the base (a folder, or the seed of random weights) with the adapter after `step` updates; writes the
    result as the stage's model, and the description. Returns it. `donate`: see lora.merge."""
    adapter = model.adapter
    if processes.is_first():
        description = {
            "lora": dataclasses.asdict(adapter.config),
            "model": dataclasses.asdict(model.config),
            "base": base if isinstance(base, int) else str(base.resolve()),
            "rows": [row[:ROW_TOKENS].tolist() for row in rows[:ROWS]],
        }
        (stage / DESCRIPTION).write_text(json.dumps(description) + "\n")
    merged = lora.merge(model, donate=donate)
    with checkpoint.Checkpoints(stage / "checkpoints") as saved:
        saved.save(step, steps.TrainState(merged, (), jnp.int32(step)))
    return merged


def export(stage: Path, target: Path, mesh: Mesh, dtype: str | None) -> dict[str, Any]:
    """Writes adapter_config.json and adapter_model.safetensors for PEFT into `target`, and merge.json: what merging changes
    for a base whose weights are in `dtype` (by default as they are), measured on the stage's rows.

    Returns what merge.json says. Raises ConfigError when the stage has not trained an adapter to its end.
    """
    if not (stage / DESCRIPTION).is_file():
        raise ConfigError(f"{stage} holds no trained adapter: there is no {DESCRIPTION}")
    described = json.loads((stage / DESCRIPTION).read_text())
    config = Config.from_json({"model": described["model"], "sft": {"lora": described["lora"]}})
    model = dataclasses.replace(config.model, dtype=dtype or config.model.dtype)
    like: Any = abstract_adapter(model, config.sft.lora, mesh)
    adapter: Any = checkpoint.restore_model(stage / "adapter", like)
    if isinstance(described["base"], int):
        name, base = f"random weights of seed {described['base']}", qwen3.init(model, jax.random.key(described["base"]), mesh)
    else:
        name = described["base"]
        if not (Path(name) / "checkpoints").is_dir():
            raise ConfigError(f"{stage / DESCRIPTION}: the adapter's base, {name}, is no longer there")
        base = checkpoint.restore_model(Path(name) / "checkpoints", checkpoint.abstract_model(model, mesh))

    from safetensors.numpy import save_file  # comes with transformers, a core dependency

    save_file(lora.peft_tensors(adapter), target / "adapter_model.safetensors", metadata={"format": "pt"})
    (target / "adapter_config.json").write_text(json.dumps(lora.peft_config(adapter, name), indent=2) + "\n")
    measured = {"base": name, "dtype": model.dtype} | merging_kl(lora.attach(base, adapter), described["rows"], mesh)
    (target / "merge.json").write_text(json.dumps(measured, indent=2) + "\n")
    return measured


def merging_kl(model: qwen3.Qwen3, rows: Sequence[Sequence[int]], mesh: Mesh) -> dict[str, Any]:
    """KL(base and adapter apart, merged) of the next token, in nats: mean and largest over the tokens of `rows`, by the
    devices of `mesh`, where the model lies.

    Both are computed in float32: they differ by the rounding of merged weights alone. The base's matrices are given away:
    the two models are never held at once.
    """
    width = max(map(len, rows))
    rows = [*rows, *[[]] * (-len(rows) % meshes.row_ways(mesh))]
    tokens_BT = jnp.array([[*row, *[0] * (width - len(row))] for row in rows], jnp.int32)
    kept_BT = np.array([[True] * len(row) + [False] * (width - len(row)) for row in rows])

    forward = jax.jit(partial(qwen3.forward, execution=qwen3.Execution(mesh)))

    def hidden(model: qwen3.Qwen3) -> np.ndarray:
        exact = qwen3.from_dict(dataclasses.replace(model.config, dtype="float32"), qwen3.to_dict(model))
        exact = exact if model.adapter is None else lora.attach(exact, model.adapter)
        return np.asarray(forward(exact, tokens_BT, jnp.array(kept_BT, jnp.int32)))[kept_BT]

    apart_ND = hidden(model)
    merged = lora.merge(model, donate=True)
    pairs = zip(*(np.array_split(x_ND, -(-len(x_ND) // 128)) for x_ND in (apart_ND, hidden(merged))), strict=True)
    kl_N = np.concatenate([np.asarray(_kl(merged, apart_ND, merged_ND)) for apart_ND, merged_ND in pairs])
    return {"kl_mean": float(kl_N.mean()), "kl_max": float(kl_N.max()), "tokens": len(kl_N)}


@jax.jit
def _kl(model: qwen3.Qwen3, p_ND: jax.Array, q_ND: jax.Array) -> jax.Array:
    p_NV, q_NV = (jax.nn.log_softmax(qwen3.logits(model, x_ND)) for x_ND in (p_ND, q_ND))
    d_NV = q_NV - p_NV
    # The sum of p (-d), and of q - p, which is 0: no term is negative, and rounding of the large ones does not hide the small.
    return (jnp.exp(p_NV) * (jnp.expm1(d_NV) - d_NV)).sum(axis=-1)
