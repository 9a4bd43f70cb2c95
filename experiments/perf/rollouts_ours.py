"""Our side: the engine alone, and the runner with cached tools. Started by rollouts.py."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import rollouts_task as task
from safetensors.numpy import load_file

from cacherl_jax.cache.lookup import CachedTools, record_transcript
from cacherl_jax.cache.store import MemoryStore
from cacherl_jax.config import CacheConfig, ModelConfig, RolloutConfig
from cacherl_jax.model import qwen3
from cacherl_jax.model.hf import from_hf
from cacherl_jax.rollout import runner
from cacherl_jax.rollout.engine import Engine, Opening, Read
from cacherl_jax.text import chat
from cacherl_jax.text.tokenizer import Tokenizer
from cacherl_jax.types import Message, Task, ToolCall, ToolSpec, Transcript

MODEL = ModelConfig(
    vocab_size=task.VOCAB,
    hidden_size=task.HIDDEN,
    num_layers=task.LAYERS,
    num_heads=task.HEADS,
    num_kv_heads=task.KV_HEADS,
    head_dim=task.HEAD_DIM,
    intermediate_size=task.FFN,
    rope_theta=task.ROPE_THETA,
    rms_norm_eps=task.EPS,
    tie_word_embeddings=False,
)
ROLLOUT = RolloutConfig(
    rows=task.ROWS,
    context=task.CONTEXT,
    decode_steps=8,
    max_turns=task.TURNS,
    max_turn_tokens=task.RESPONSE,
    max_sampled_tokens=task.RESPONSE,
    max_tool_tokens=task.INJECTED,
)
SPEC = ToolSpec(task.TOOL, task.DESCRIPTION, task.PARAMETERS)


def decoding(engine: Engine, model: qwen3.Qwen3, tok: Tokenizer):
    prompts = {row: tok.encode(task.words(task.PROMPT, 1000 + 100 * row)) for row in range(task.ROWS)}

    def decode(new: int, temperature: float) -> list[list[int]]:
        reads = [Read(row, 0, ids[:-1]) for row, ids in prompts.items()]
        state = engine.append(model, engine.init(), engine.plan(reads, []))
        turns = {row: Opening(len(ids) - 1, ids[-1], new, 0, np.array([row, 0], np.uint32)) for row, ids in prompts.items()}
        sampled: list[list[int]] = [[] for _ in prompts]
        while len(sampled[0]) < new:
            state, out = engine.decode(model, state, turns, temperature)
            read, turns = engine.read(out), {}
            for row, ids in enumerate(sampled):
                ids += read.tokens_BN[row, : read.counts_B[row]].tolist()
        return sampled

    return decode


def playing(engine: Engine, model: qwen3.Qwen3, tok: Tokenizer):
    def opening(question: str) -> int:
        messages = [Message("system", "Answer with the tools."), Message("user", question)]
        return sum(len(ids) for _, ids, _ in [*chat.opening(tok, messages, [SPEC]), *chat.generation_prompt(tok)])

    def injected(content: str) -> int:
        pieces = [*chat.after_turn(tok), *chat.tool_results(tok, [content]), *chat.generation_prompt(tok)]
        return sum(len(ids) for _, ids, _ in pieces)

    messages = (Message("system", "Answer with the tools."), Message("user", task.padded(task.OPENING, opening)))
    asked = Task("t", "family", "train", (task.TOOL,), messages, ((),))
    call = ToolCall(task.TOOL, task.ARGUMENTS, "1")
    made = (
        Message("assistant", tool_calls=(call,)),
        Message("tool", task.padded(task.INJECTED, injected), tool_call_id="1"),
    )
    store = MemoryStore()
    record_transcript(store, Transcript("r", "t", "expert", (task.TOOL,), (*messages, *made)), {task.TOOL: SPEC}, "state")
    tools = CachedTools(store, {task.TOOL: SPEC}, CacheConfig(), seed=0)

    def group(seed: int) -> list[np.ndarray]:
        episodes = [(asked, sample) for sample in range(task.ROWS)]
        played = runner.run(engine, model, tok, {task.TOOL: SPEC}, episodes, tools, ROLLOUT, seed)
        for t in played:
            assert t.turns == task.TURNS and len(t.calls) == task.TURNS and t.worst_tier == "exact", (t.turns, t.stop)
            assert len(t.tokens_T) == task.OPENING + task.TURNS * task.TURN + (task.TURNS - 1) * task.INJECTED
        return [t.tokens_T[t.sampled_T] for t in played]

    return group


def main(folder: Path) -> None:
    tally = task.count_compilations()
    tok = Tokenizer.load(folder)
    model = qwen3.Qwen3(MODEL, jax.tree.map(jax.numpy.asarray, from_hf(MODEL, load_file(folder / "model.safetensors"))))
    engine = Engine(MODEL, ROLLOUT, [tok.im_end])
    model = engine.place(model)
    programs = {"decode": decoding(engine, model, tok), "group": playing(engine, model, tok)}
    task.serve(programs, tally, f"cacherl_jax, jax {jax.__version__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
