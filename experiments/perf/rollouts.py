"""CPU time of rollouts: ours, Tunix and torch in turn, each a process in an environment of its own.

Command:  python experiments/perf/rollouts.py --tunix PYTHON_OF_TUNIX --torch PYTHON_OF_TORCH      (README.md makes the two)

All sides load one checkpoint and one tokenizer, made here. Its weights are random but for one thing: each token's most likely
successor is fixed, so that every side samples the same ids, greedily or at temperature 1, and a rollout is a script: words, a
tool call, <|im_end|>. The forward pass costs what it costs with any weights. Each program runs twice to warm up, then once a
round on each side, in changing order; a figure is the CPU time of the whole process, a ratio is taken within a round. Prints
medians with the least and the most over rounds, writes rollouts.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import rollouts_task as task
from safetensors.numpy import save_file

from cacherl_jax.text import chat
from cacherl_jax.text.tokenizer import Tokenizer, train_tokenizer

HERE = Path(__file__).parent
WORDS = 2000
SCALE = 60.0  # logit of a token's successor; the others' stay below 20

ORDERS: dict[str, dict[str, Any]] = {
    "greedy": {"program": "decode", "new": task.NEW, "temperature": 0.0},
    "greedy, short": {"program": "decode", "new": task.FEW, "temperature": 0.0},
    "sampled": {"program": "decode", "new": task.NEW, "temperature": 1.0},
    "sampled, short": {"program": "decode", "new": task.FEW, "temperature": 1.0},
    "group": {"program": "group", "seed": 0},
}


def make_checkpoint(folder: Path) -> None:
    """tokenizer.json, config.json and model.safetensors in the form of Hugging Face."""
    texts = [chat.TOOLS_HEAD, chat.TOOLS_TAIL, "user\nassistant\nsystem\nTool returned result: Answer with the tools."]
    tool = {"type": "function", "function": {"name": task.TOOL, "description": task.DESCRIPTION, "parameters": task.PARAMETERS}}
    texts += [json.dumps(tool, indent=indent) for indent in (None, 2)]
    vocabulary = [f" w{i:04d}" for i in range(WORDS)]
    tok = train_tokenizer(texts, [*vocabulary, task.CALL], task.VOCAB)
    tok.save(folder)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": task.VOCAB,
        "hidden_size": task.HIDDEN,
        "num_hidden_layers": task.LAYERS,
        "num_attention_heads": task.HEADS,
        "num_key_value_heads": task.KV_HEADS,
        "head_dim": task.HEAD_DIM,
        "intermediate_size": task.FFN,
        "rope_theta": task.ROPE_THETA,
        "rms_norm_eps": task.EPS,
        "tie_word_embeddings": False,
        "max_position_embeddings": task.CONTEXT,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)

    def matrix(out: int, into: int) -> np.ndarray:
        return (0.02 * rng.standard_normal((out, into))).astype(np.float32)

    def ones(size: int) -> np.ndarray:
        return np.ones(size, np.float32)

    embed_VD = rng.standard_normal((task.VOCAB, task.HIDDEN)).astype(np.float32)
    unembed_VD = np.empty_like(embed_VD)
    unembed_VD[successors(tok)] = embed_VD * (SCALE / task.HIDDEN)
    tensors = {"model.embed_tokens.weight": embed_VD, "lm_head.weight": unembed_VD, "model.norm.weight": ones(task.HIDDEN)}
    for i in range(task.LAYERS):
        tensors |= {
            f"model.layers.{i}.{name}.weight": tensor
            for name, tensor in {
                "input_layernorm": ones(task.HIDDEN),
                "post_attention_layernorm": ones(task.HIDDEN),
                "self_attn.q_proj": matrix(task.HEADS * task.HEAD_DIM, task.HIDDEN),
                "self_attn.k_proj": matrix(task.KV_HEADS * task.HEAD_DIM, task.HIDDEN),
                "self_attn.v_proj": matrix(task.KV_HEADS * task.HEAD_DIM, task.HIDDEN),
                "self_attn.o_proj": matrix(task.HIDDEN, task.HEADS * task.HEAD_DIM),
                "self_attn.q_norm": ones(task.HEAD_DIM),
                "self_attn.k_norm": ones(task.HEAD_DIM),
                "mlp.gate_proj": matrix(task.FFN, task.HIDDEN),
                "mlp.up_proj": matrix(task.FFN, task.HIDDEN),
                "mlp.down_proj": matrix(task.HIDDEN, task.FFN),
            }.items()
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def successors(tok: Tokenizer) -> np.ndarray:
    """The token after each token, a permutation: the end of a generation prompt opens a turn, other words follow each other."""
    turn = ["\n", *(f" w{i:04d}" for i in range(task.TURN - 2)), task.CALL, "<|im_end|>"]
    others = [f" w{i:04d}" for i in range(task.TURN - 2, WORDS)]
    cycles = [[tok.encode(text)[0] for text in texts] for texts in (turn, others)]
    named = {i for cycle in cycles for i in cycle}
    cycles.append([i for i in range(task.VOCAB) if i not in named])
    after_V = np.empty(task.VOCAB, np.int64)
    for cycle in cycles:
        after_V[cycle] = [*cycle[1:], cycle[0]]
    return after_V


class Side:
    """A process that runs programs when told to."""

    def __init__(self, name: str, python: str, folder: Path, of: str = "rollouts") -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python, str(HERE / f"{of}_{name}.py"), str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        self.versions = self._read()["versions"]

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the side {self.name} ended with status {self.process.wait()}; its error stands above")
        return json.loads(line)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 4), "least": round(min(values), 4), "most": round(max(values), 4)}


def over(above: list[float], below: list[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(above, below, strict=True)])


def measure(sides: list[Side], rounds: int) -> tuple[dict[str, Any], dict[str, dict[str, list[float]]]]:
    """(what the first run of each program cost, CPU seconds by program, side and round).

    Raises RuntimeError when two sides sample other ids, or a warm program compiles.
    """
    able = {order: [s for s in sides if order != "group" or s.name != "torch"] for order in ORDERS}
    first: dict[str, Any] = {order: {s.name: s.run(dict(ORDERS[order])) for s in able[order]} for order in ORDERS}
    for order in ORDERS:  # Tunix compiles a small program in its second call
        for side in able[order]:
            side.run(dict(ORDERS[order]))
    taken: dict[str, dict[str, list[float]]] = {order: {s.name: [] for s in able[order]} for order in ORDERS}
    taken["new budget"] = {s.name: [] for s in sides}
    rng = random.Random(0)
    for turn in range(rounds):
        orders = ORDERS | {"new budget": ORDERS["greedy"] | {"new": task.NEW - 1 - turn}}
        for name, order in orders.items():
            answers = {}
            for side in rng.sample(able.get(name, sides), len(able.get(name, sides))):
                answers[side.name] = side.run(dict(order))
                taken[name][side.name].append(answers[side.name]["cpu"])
                if name != "new budget" and answers[side.name].get("compilations"):
                    raise RuntimeError(f"{side.name} compiled again in {name!r}: {answers[side.name]}")
            first.setdefault(name, {}).update({k: a for k, a in answers.items() if k not in first.get(name, {})})
            check_equal(name, answers)
    return first, taken


def check_equal(name: str, answers: dict[str, Any]) -> None:
    """Tunix leaves <|im_end|> out of what it returns, so of groups only the number of tokens is compared."""
    if name == "group":
        turns = task.ROWS * task.TURNS
        counts = {side: a["tokens"] + (turns if side == "tunix" else 0) for side, a in answers.items()}
        if set(counts.values()) != {turns * task.TURN}:
            raise RuntimeError(f"a group is {turns * task.TURN} sampled tokens; sampled were {counts}")
    elif len({a["hash"] for a in answers.values()}) > 1:
        raise RuntimeError(f"the sides sampled different ids in {name!r}: {answers}")


def summary(taken: dict[str, dict[str, list[float]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(CPU milliseconds by name and side, ratios of ours to the others).

    A token of decode is what the long call takes beyond the short one, so that it holds no prefill; prefill is the rest.
    """
    figures: dict[str, dict[str, list[float]]] = {}
    for how in ("greedy", "sampled"):
        call, short = taken[how], taken[f"{how}, short"]
        token = {
            s: [(a - b) * 1e3 / (task.ROWS * (task.NEW - task.FEW)) for a, b in zip(call[s], short[s], strict=True)] for s in call
        }
        figures[f"decode {how}, a token"] = token
        figures[f"decode {how}, the call"] = {s: [v * 1e3 for v in call[s]] for s in call}
        if how == "greedy":
            figures["prefill"] = {
                s: [v * 1e3 - task.ROWS * task.FEW * t for v, t in zip(short[s], token[s], strict=True)] for s in call
            }
    figures["a new token budget, the call"] = {s: [v * 1e3 for v in values] for s, values in taken["new budget"].items()}
    figures["a group of rollouts"] = {s: [v * 1e3 for v in values] for s, values in taken["group"].items()}
    ratios = {
        f"{name}: ours / {other}": over(by_side["ours"], by_side[other])
        for name, by_side in figures.items()
        for other in by_side
        if other != "ours"
    }
    return {name: {s: spread(v) for s, v in by_side.items()} for name, by_side in figures.items()}, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description="The CPU time of rollouts beside Tunix and torch.")
    parser.add_argument("--tunix", required=True, help="python of an environment with google-tunix")
    parser.add_argument("--torch", required=True, help="python of an environment with torch and transformers")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make_checkpoint(Path(name))
        pythons = {"ours": sys.executable, "tunix": args.tunix, "torch": args.torch}
        sides = [Side(side, python, Path(name)) for side, python in pythons.items()]
        try:
            first, taken = measure(sides, args.rounds)
        finally:
            for side in sides:
                side.process.terminate()
    figures, ratios = summary(taken)
    result = {
        "versions": {s.name: s.versions for s in sides},
        "rounds": args.rounds,
        "cpu_milliseconds": figures,
        "ratios": ratios,
        "first_run": {name: {side: _first(a) for side, a in by_side.items()} for name, by_side in first.items()},
    }
    print_tables(figures, ratios, result["first_run"])
    (HERE / "rollouts.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _first(answer: dict[str, Any]) -> dict[str, float]:
    return {k: round(v, 3) for k, v in answer.items() if k in ("cpu", "compilations", "compile_seconds")}


def print_tables(figures: dict[str, Any], ratios: dict[str, Any], first: dict[str, Any]) -> None:
    """The tables of README.md."""

    def cell(f: dict[str, float] | None, digits: int) -> str:
        return f"{f['median']:.{digits}f} ({f['least']:.{digits}f} to {f['most']:.{digits}f})" if f else ""

    print("\n| CPU ms | ours | Tunix | torch |\n|---|---|---|---|")
    for name, by_side in figures.items():
        digits = 2 if "token" in name and "call" not in name else 0
        print(f"| {name} | " + " | ".join(cell(by_side.get(s), digits) for s in ("ours", "tunix", "torch")) + " |")
    print("\n| ours / | Tunix | torch |\n|---|---|---|")
    for name in figures:
        print(f"| {name} | " + " | ".join(cell(ratios.get(f"{name}: ours / {s}"), 2) for s in ("tunix", "torch")) + " |")
    print("\n| first run: CPU s, programs compiled | ours | Tunix | torch |\n|---|---|---|---|")
    for name, by_side in first.items():
        cells = [
            f"{by_side[s]['cpu']:.1f}, {by_side[s].get('compilations', 0)}" if s in by_side else ""
            for s in ("ours", "tunix", "torch")
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
