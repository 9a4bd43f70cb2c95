"""The side of Tunix: its sampler through its rollout worker, and its agentic path. Started by rollouts.py.

The agentic path is put together as `AgenticRLLearner` does it: a `RolloutOrchestrator` of `TrajectoryCollectEngine`s with a
`ToolAgent` and a `ToolEnvironment` an episode, Qwen's chat parser, all episodes of the group at once, each turn a call of the
rollout worker with what is left of the response length. Left out are the cluster around the worker and the learner.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import rollouts_task as task
import transformers
from tunix.generate.tokenizer_adapter import TokenizerAdapter
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3.params import create_model_from_safe_tensors
from tunix.rl.agentic import utils
from tunix.rl.agentic.agents.tool_agent import ToolAgent
from tunix.rl.agentic.environments.tool_environment import ToolEnvironment
from tunix.rl.agentic.parser.chat_template_parser.parser import QwenChatTemplateParser
from tunix.rl.agentic.pipeline.rollout_orchestrator import RolloutOrchestrator
from tunix.rl.agentic.tools.base_tool import BaseTool, ToolOutput
from tunix.rl.rollout.base_rollout import CacheConfig, RolloutConfig, RolloutOutput
from tunix.rl.rollout.vanilla_rollout import VanillaRollout

MODEL = qwen3.ModelConfig(
    num_layers=task.LAYERS,
    vocab_size=task.VOCAB,
    embed_dim=task.HIDDEN,
    hidden_dim=task.FFN,
    num_heads=task.HEADS,
    head_dim=task.HEAD_DIM,
    num_kv_heads=task.KV_HEADS,
    rope_theta=int(task.ROPE_THETA),
    norm_eps=task.EPS,
    use_tied_embedding=False,
    dtype=jnp.float32,
)
SYSTEM = "Answer with the tools.\n\n"


def decoding(worker: VanillaRollout) -> Any:
    prompts = [task.words(task.PROMPT, 1000 + 100 * row) for row in range(task.ROWS)]

    def decode(new: int, temperature: float) -> list[Any]:
        config = RolloutConfig(
            max_tokens_to_generate=new,
            max_prompt_length=task.PROMPT,
            temperature=temperature,
            top_p=1.0 if temperature else None,
            kv_cache_size=task.CONTEXT,
            return_logprobs=True,
        )
        return worker.generate(prompts, config).tokens

    return decode


def agentic(worker: VanillaRollout, tok: TokenizerAdapter) -> Any:
    parser = QwenChatTemplateParser(tok)

    def injected(content: str) -> int:
        message = {"role": "tool", "tool_call_id": "", "content": f"Tool returned result: {content}"}
        return len(utils.tokenize_and_generate_masks([message], tok, parser, contains_generation_msg=True)[0])

    answer = task.padded(task.INJECTED, injected)

    class Lookup(BaseTool):
        __doc__ = task.DESCRIPTION

        def get_json_schema(self) -> dict[str, Any]:
            return {
                "type": "function",
                "function": {"name": self.name, "description": self.description, "parameters": task.PARAMETERS},
            }

        def apply(self, **_: Any) -> ToolOutput:
            return ToolOutput(name=self.name, output=answer)

    tools = {task.TOOL: Lookup}

    def opening(question: str) -> int:
        agent = ToolAgent(SYSTEM, "qwen", tools)
        agent.update_from_env({"question": question}, 0.0, False, {})
        return len(tok.encode(parser.parse(agent.chat_completions, add_generation_prompt=True, is_first_msg=True)))

    question = task.padded(task.OPENING, opening)
    config = RolloutConfig(
        max_tokens_to_generate=task.RESPONSE,
        max_prompt_length=task.OPENING,
        temperature=1.0,
        top_p=1.0,
        kv_cache_size=task.CONTEXT,
        return_logprobs=True,
    )

    def model_call(messages: Any, env: Any = None, max_generation_steps: int | None = None) -> RolloutOutput:
        prompt = parser.parse(messages, add_generation_prompt=True, is_first_msg=True)
        return worker.generate(prompt, dataclasses.replace(config, max_tokens_to_generate=max_generation_steps))

    async def collect() -> list[Any]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max_workers=task.ROWS + 1))
        orchestrator = RolloutOrchestrator(
            engine_kwargs={
                "model_call": model_call,
                "tokenizer": tok,
                "chat_parser": parser,
                "max_response_length": task.RESPONSE,
                "timeout": 1800.0,
            },
            max_concurrency=task.ROWS,
            rollout_sync_lock=utils.RolloutSyncLock(),
        )
        pairs = [
            (
                ToolAgent(SYSTEM, "qwen", tools),
                ToolEnvironment(
                    {"question": question}, tool_map=tools, reward_fn=lambda task, action: 0.0, max_steps=task.TURNS,
                    group_id=0, pair_index=row,
                ),
            )
            for row in range(task.ROWS)
        ]  # fmt: skip
        producers = asyncio.create_task(
            orchestrator.run_producers_from_stream(
                pairs, group_size=task.ROWS, group_key_fn=lambda i, env, traj: 0, collect_mode="Token"
            )
        )
        await asyncio.sleep(0)
        played = [item async for batch in orchestrator.yield_batches(task.ROWS) for item in batch]
        await producers
        return [item.traj for item in played]

    def group(seed: int) -> list[Any]:
        config.seed = seed
        return [t["conversation_tokens"][t["conversation_masks"] == 1] for t in asyncio.run(collect())]

    return group


def main(folder: Path) -> None:
    tally = task.count_compilations()
    tok = TokenizerAdapter(
        transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<|endoftext|>"
        )
    )
    model = create_model_from_safe_tensors(str(folder), MODEL)
    worker = VanillaRollout(model, tok, CacheConfig(task.CONTEXT, task.LAYERS, task.KV_HEADS, task.HEAD_DIM))
    programs = {"decode": decoding(worker), "group": agentic(worker, tok)}
    task.serve(programs, tally, f"Tunix {version('google-tunix')}, jax {jax.__version__}, flax {version('flax')}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
