"""The model, its adapter, where it lies and what its step keeps in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pydantic

from cacherl_jax.config.basics import Count, Positive, PositiveRate, Rate, require


@dataclass(frozen=True)
class YarnConfig:
    """YaRN (arXiv 2309.00071): RoPE for contexts `factor` times as long as those of pretraining. Names as in config.json."""

    factor: Annotated[float, pydantic.Field(ge=1, allow_inf_nan=False)] = 1.0  # 1: off, and nothing else here is read
    original_max_position_embeddings: Positive = 32_768  # the longest context of pretraining, in tokens
    beta_fast: PositiveRate = 32.0  # pairs that turn more often within it keep their frequency
    beta_slow: PositiveRate = 1.0  # pairs that turn less often are stretched by the whole factor
    attention_factor: PositiveRate | None = None  # of sines and cosines; None: computed from the factor and the mscales
    mscale: Rate = 0.0  # both or none
    mscale_all_dim: Rate = 0.0
    truncate: bool = True  # the ramp between the two begins and ends at a whole pair

    def __post_init__(self) -> None:
        require(
            self.beta_fast >= self.beta_slow,
            f"model.yarn.beta_fast={self.beta_fast} is below model.yarn.beta_slow={self.beta_slow}",
        )
        require(
            bool(self.mscale) == bool(self.mscale_all_dim),
            f"model.yarn.mscale={self.mscale} and model.yarn.mscale_all_dim={self.mscale_all_dim}: one alone is never read",
        )


@dataclass(frozen=True)
class ModelConfig:
    """Qwen3, dense. Field names follow the Hugging Face config where one exists."""

    vocab_size: Count = 0  # 0: taken from the tokenizer
    hidden_size: Positive = 128
    num_layers: Positive = 4
    num_heads: Positive = 4
    num_kv_heads: Positive = 2
    head_dim: Positive = 32
    intermediate_size: Positive = 384
    rope_theta: PositiveRate = 10_000.0
    yarn: YarnConfig = YarnConfig()
    rms_norm_eps: PositiveRate = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: PositiveRate = 0.02  # of matrices
    embedding_range: PositiveRate = 0.2  # of the embedding; 0.02 learns ten times slower at this size
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        require(
            self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}",
        )
        require(self.head_dim % 2 == 0, f"model.head_dim={self.head_dim} is odd; RoPE rotates pairs")


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter, trained in the weights' place: W + alpha / rank * A B (Hu et al., arXiv 2106.09685)."""

    rank: Count = 0  # 0: all weights are trained
    alpha: PositiveRate = 32.0
    matrices: tuple[Literal["query", "key", "value", "output", "gate", "up", "down"], ...] = (
        "query", "key", "value", "output", "gate", "up", "down",
    )  # fmt: skip

    def __post_init__(self) -> None:
        require(
            not self.rank or bool(self.matrices), f"lora.matrices is empty; with lora.rank={self.rank} nothing would be trained"
        )


@dataclass(frozen=True)
class MeshConfig:
    """Devices by axis; the product must equal the number of devices in use.

    Rows are split over data and fsdp, the tokens of a row over seq, heads and vocabulary over tp, parameters over fsdp and
    seq together. `slices` of a multi-slice TPU, joined by the data-center network, divide the data axis.
    """

    data: Positive = 1
    fsdp: Positive = 1
    seq: Positive = 1
    tp: Positive = 1
    slices: Positive = 1

    def __post_init__(self) -> None:
        require(self.data % self.slices == 0, f"mesh.data={self.data} is not a multiple of mesh.slices={self.slices}")


@dataclass(frozen=True)
class MemoryConfig:
    """What the training step keeps, and what it computes again."""

    compute: Literal["weights", "bfloat16"] = "weights"  # dtype of matrix products: that of the weights, or bfloat16
    remat: Literal["none", "dots", "full"] = "none"  # a layer's backward pass finds everything, matrix products, its input only
    logit_chunk: Positive = 4096  # tokens of a device whose logits exist at one time
