"""The side of transformers and torch, one thread: `generate` as its users call it. Started by rollouts.py."""

from __future__ import annotations

import sys
from pathlib import Path

import rollouts_task as task
import torch
import transformers


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    tok = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    model = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts_BT = torch.tensor([tok.encode(task.words(task.PROMPT, 1000 + 100 * row)) for row in range(task.ROWS)])
    assert prompts_BT.shape == (task.ROWS, task.PROMPT)

    def decode(new: int, temperature: float) -> list[list[int]]:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
        with torch.inference_mode():
            out = model.generate(
                prompts_BT,
                attention_mask=torch.ones_like(prompts_BT),
                max_new_tokens=new,
                eos_token_id=tok.convert_tokens_to_ids("<|im_end|>"),
                pad_token_id=tok.convert_tokens_to_ids("<|endoftext|>"),
                **how,
            )
        return out[:, task.PROMPT :].tolist()

    task.serve({"decode": decode}, {}, f"torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
