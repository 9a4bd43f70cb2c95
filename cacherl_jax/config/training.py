"""The optimizer, and SFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cacherl_jax.config.basics import Count, Positive, PositiveRate, Rate, Share, require
from cacherl_jax.config.model import LoraConfig


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "adafactor", "muon"] = "muon"  # muon: matrices by Muon, embeddings and scales by Adam
    moments: Literal["float32", "bfloat16"] = "float32"  # adamw's first and second
    learning_rate: Rate = 0.02
    adam_learning_rate: Rate = 3e-3  # muon's companion for non-matrices
    warmup_steps: Count = 20
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    weight_decay: Rate = 0.0
    clip_norm: PositiveRate = 1.0
    b1: Share = 0.9
    b2: Share = 0.95

    def __post_init__(self) -> None:
        require(
            self.name == "adamw" or self.moments == "float32",
            f"optimizer.moments={self.moments!r} is for adamw; optimizer.name is {self.name!r}",
        )


@dataclass(frozen=True)
class SftConfig:
    steps: Positive = 1000
    tokens_per_batch: Positive = 1024  # rows times padded length; rows are bucketed by length
    accumulate: Positive = 1  # batches an update
    packed_length: Count = 0  # episodes are packed into rows of this many tokens; 0: one episode a row, bucketed by length
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint_every: Positive = 200
