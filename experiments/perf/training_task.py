"""What the sides of training.py have in common: models, batches, the optimizer. NumPy alone, for any environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Qwen3, float32.
MODELS = {
    "d256": {"vocab": 8192, "layers": 4, "hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn": 768, "tied": False},
    "d128": {"vocab": 1088, "layers": 4, "hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 384, "tied": True},
}
ROPE_THETA, EPS = 1e6, 1e-6
LEARNING_RATE, B1, B2, ADAM_EPS, CLIP = 1e-4, 0.9, 0.95, 1e-8, 1.0


@dataclass(frozen=True)
class Work:
    """A training step: AdamW on the loss of every token but each row's first."""

    model: str
    rows: int
    length: int

    def tokens_BT(self) -> np.ndarray:
        rng = np.random.default_rng((self.rows, self.length))
        return rng.integers(0, MODELS[self.model]["vocab"], (self.rows, self.length)).astype(np.int32)


WORKS = {"8 x 512, d 256": Work("d256", 8, 512), "8 x 112, d 128": Work("d128", 8, 112), "16 x 224, d 128": Work("d128", 16, 224)}


def folder_of(work: Work, root: Path) -> Path:
    return root / work.model


def described(losses: list[float]) -> dict[str, list[float]]:
    return {"losses": [float(loss) for loss in losses]}
