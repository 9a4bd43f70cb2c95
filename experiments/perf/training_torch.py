"""The side of transformers and torch, one thread: the model's own loss, backward, clip, AdamW. Started by training.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import rollouts_task
import torch
import training_task as task
import transformers


def training(work: task.Work, root: Path) -> Any:
    model = transformers.Qwen3ForCausalLM.from_pretrained(task.folder_of(work, root), dtype=torch.float32).train()
    betas = (task.B1, task.B2)
    optimizer = torch.optim.AdamW(model.parameters(), task.LEARNING_RATE, betas, task.ADAM_EPS, weight_decay=0.0)
    tokens_BT = torch.tensor(work.tokens_BT(), dtype=torch.long)

    def train(count: int) -> list[float]:
        losses = []
        for _ in range(count):
            loss = model(input_ids=tokens_BT, attention_mask=torch.ones_like(tokens_BT), labels=tokens_BT, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), task.CLIP)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    return train


def main(root: Path) -> None:
    torch.set_num_threads(1)
    programs = {name: training(work, root) for name, work in task.WORKS.items()}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    rollouts_task.serve(programs, {}, versions, task.described)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
