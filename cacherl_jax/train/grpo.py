"""GRPO from the cache. One step: sample a group of episodes a task, tools answered by the cache, and further groups where
some teach nothing (groups.py); score answer and process and weigh the answer by how faithfully the cache answered
(scoring.py); center the scores in each group (advantages.py); push sampled tokens by their episode's advantage, clipped,
weighted where the trainer finds them less or more likely than they were when drawn, with a KL penalty to the SFT model
(policy_loss.py, aggregation.py). Live tools are unreachable throughout, but in the control, which trains with nothing else.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cacherl_jax import adapter_folder, checkpoint, interrupts, mesh, metrics, processes
from cacherl_jax.config import Config
from cacherl_jax.data.packing import packed
from cacherl_jax.data.pipeline import Packs, Row, bucket_lengths, bucketed, taken_apart
from cacherl_jax.model import attention, lora, qwen3
from cacherl_jax.reward import monitor
from cacherl_jax.reward.judge import Judge
from cacherl_jax.rollout import runner, stream
from cacherl_jax.rollout.engine import Engine
from cacherl_jax.text.tokenizer import Tokenizer
from cacherl_jax.tools import registry
from cacherl_jax.train import advantages, aggregation, agreement, groups, scoring, stops, watch
from cacherl_jax.train import step as steps
from cacherl_jax.train.optimizer import make_optimizer
from cacherl_jax.trajectory import Trajectory
from cacherl_jax.types import Batch, Task, ToolProvider, ToolSpec

Placed = Sequence[tuple[Batch, Packs]]  # batches on the mesh, with the places of the rows that they were made of


def train(
    config: Config,
    reference: qwen3.Qwen3,
    tok: Tokenizer,
    tasks: Sequence[Task],
    specs: Mapping[str, ToolSpec],
    provider: ToolProvider,
    directory: Path,
    *,
    base: Path,
    validate: Callable[[Engine, qwen3.Qwen3], float],
    progress: Callable[..., metrics.Progress],
    judge: Judge | None = None,
) -> tuple[qwen3.Qwen3, int]:
    """Trains from `reference` for `config.grpo.steps` steps, or goes on from the newest checkpoint in `directory`.
    `validate` gives process accuracy on the validation tasks (from the cache); the checkpoint where it was highest is kept
    beside the newest. `judge` grades answers where `config.reward.answer` asks for one. Ctrl-C and SIGTERM save before they
    end the run. Of several processes each plays its share of the episodes; scores and updates are those of all. Returns the
    model and the number of live tool calls made: 0, or the run ended in LiveToolError, unless `grpo.tools` is "live"; then
    those of all its rollouts, in whatever attempt and process they were played.

    With `config.grpo.lora` an adapter of `reference` is trained: the reference is the policy without it, of which there is
    no second copy. The engine plays with merged weights, and the merged model is what the stage leaves. `base` is the
    folder that `reference` came from.
    """
    grpo = config.grpo
    tx = make_optimizer(grpo.optimizer, grpo.steps * grpo.minibatches)
    devices = mesh.make_mesh(config.mesh)
    frozen = reference if grpo.lora.rank else None
    weights: Any = checkpoint.abstract_model(reference.config, devices)
    if frozen is not None:
        weights = adapter_folder.abstract_adapter(reference.config, grpo.lora, devices)
    like = checkpoint.abstract_state(weights, tx, devices)
    update = steps.make_update(tx, like)
    buckets = bucket_lengths(config.rollout.context)
    engine = Engine.of_run(config, tok.stop_ids)
    execution = qwen3.Execution(devices, config.memory)
    lengths = (grpo.packed_length,) if grpo.packed_length else buckets
    attention.refuse_lengths(lengths, devices, execution.dtype(reference.config))
    gradients_of = partial(steps.grpo_gradients, grpo=grpo, execution=execution)
    weigh = aggregation.AGGREGATIONS[grpo.aggregation]
    closing = watch.closing_ids(tok)

    def first() -> Any:
        if frozen is None:
            return qwen3.copy(reference)
        return lora.init(reference.config, grpo.lora, jax.random.fold_in(jax.random.key(config.seed), 1), devices)

    def model_of(state: steps.TrainState) -> qwen3.Qwen3:
        return state.model if frozen is None else lora.attach(frozen, state.model)

    def placed(state: steps.TrainState) -> qwen3.Qwen3:
        """The policy as the engine holds it."""
        return engine.place(state.model if frozen is None else lora.merge(model_of(state)))

    def batches_of(rows: Sequence[Row]) -> Placed:
        ways = mesh.row_ways(devices)
        if grpo.packed_length:
            batches = packed(rows, grpo.packed_length, grpo.tokens_per_batch, ways)
        else:
            batches = bucketed(rows, buckets, grpo.tokens_per_batch, ways)
        return [(mesh.place(batch, devices), packs) for batch, packs in batches]

    def play(step: int, position: int, policy: qwen3.Qwen3, *, resumed: bool) -> groups.Played:
        """The groups of a step by `policy`, as the engine holds it; `resumed`: some episodes may have been played already."""
        # A task comes again in a later epoch: the step number keeps its samples apart.
        seed = int(np.random.SeedSequence((config.seed, step)).generate_state(1)[0])
        path = _streamed(directory, step)
        if not resumed:
            path.unlink(missing_ok=True)

        def run(episodes: Sequence[tuple[Task, int]]) -> list[Trajectory]:
            with stream.TrajectoryStream(path) as streamed:
                finished = stream.read_stream(path).values()
                return runner.run(
                    engine, policy, tok, specs, episodes, provider, config.rollout, seed, finished=finished, on_done=streamed
                )

        return groups.play_groups(
            tasks,
            position,
            config.seed,
            grpo,
            run,
            lambda chosen, played: scoring.score_groups(chosen, played, specs, config, judge),
        )

    def score(model: qwen3.Qwen3, rows: Sequence[Row]) -> list[np.ndarray]:
        batches, logprobs = batches_of(rows), []
        for batch, _ in batches:
            processes.check()
            logprobs.append(steps.score(model, batch, execution=execution))
        return _by_row(rows, batches, logprobs)

    def learn(state: steps.TrainState, rows: Sequence[Row]) -> tuple[steps.TrainState, dict[str, float], list[np.ndarray]]:
        """The updates of a step: the new state, metrics (the mean over updates), each row's logprobs by the first policy."""
        parts: list[dict[str, float]] = []
        trainer: list[np.ndarray] = []
        for part in np.array_split(np.arange(len(rows)), grpo.minibatches):
            if not len(part):  # fewer rows than updates
                continue
            chosen, divisor = weigh([rows[i] for i in part], config)
            batches = batches_of(chosen)
            gradients, values, logprobs = steps.accumulate(
                gradients_of, state.model, frozen, [batch for batch, _ in batches], divisor
            )
            state, norm = update(state, gradients)
            del gradients  # or they would lie beside the next update's
            parts.append({k: float(v) for k, v in values.items()} | {"grad_norm": float(norm)})
            olds = [row.old_logprobs_T for row in chosen]
            trainer += [x for x in olds if x is not None] or _by_row(chosen, batches, logprobs)
        return state, {k: float(np.mean([p[k] for p in parts])) for k in (parts or [{}])[0]}, trainer

    live_before = registry.live_call_count()
    folder = adapter_folder.checkpoints(directory, grpo.lora)
    guard = contextlib.nullcontext() if grpo.tools == "live" else registry.forbid_live()
    with interrupts.held(), guard, checkpoint.Checkpoints(folder, best=1) as saved:
        done, state = saved.restore(like) or (0, checkpoint.new_state(first(), tx, devices))
        position = done * grpo.prompts if (at := saved.position()) is None else at  # in the order of tasks
        began = done  # episodes that an earlier attempt streamed at a later step were played by other weights
        log = metrics.MetricsWriter(directory / "metrics.jsonl", resume_step=done, writes=processes.is_first())
        validated = {row["step"]: row["validation"] for row in log.kept if "validation" in row}
        earlier = [row for row in log.kept if "groups" in row]
        seen = monitor.from_rows(earlier)
        try:
            with log, progress(total=grpo.steps, initial=done, desc="grpo") as bar:
                while True:
                    processes.check()
                    if (done % grpo.validate_every == 0 or done == grpo.steps) and done not in validated:
                        validated[done] = validate(engine, placed(state))
                        log.write({"stage": "grpo", "step": done, "validation": validated[done]})
                    if done % grpo.checkpoint_every == 0 or done == grpo.steps:
                        saved.save(done, state, validated.get(done), position)
                    if done >= grpo.steps:
                        break
                    clock = metrics.Clock()
                    policy = jax.block_until_ready(placed(state))
                    clock.lap("weights")
                    played = play(done, position, policy, resumed=done == began)
                    del policy  # it may share buffers with the state, which the update donates
                    scored = played.scored
                    if processes.is_first():
                        scoring.write_rollouts(directory / "rollouts" / f"{done:05d}.jsonl", scored)
                    clock.lap("rollout")
                    trained, rows = _rows(played)
                    rows = [replace(row, ref_logprobs_T=x) for row, x in zip(rows, score(reference, rows), strict=True)]
                    if grpo.minibatches > 1:  # with one, the update's own pass is by the policy that sampled
                        rows = [replace(row, old_logprobs_T=x) for row, x in zip(rows, score(model_of(state), rows), strict=True)]
                    processes.check()  # from here to the next, the model, the number of steps and the metrics change
                    state, values, trainer = learn(state, rows)
                    _streamed(directory, done).unlink()
                    done, position = done + 1, position + played.tasks
                    gap = agreement.gaps([t.logprobs_T for t in trained], trainer, [row.mask_T for row in rows])
                    clock.lap("train")
                    row = {"stage": "grpo", "step": done} | scoring.rollout_metrics(scored) | values | played.metrics()
                    row |= advantages.scale(scored.advantage_N[played.trained_N], grpo.kl_coef)
                    row |= stops.counts(scored.trajectories, grpo.stops)
                    row |= {"lengths": watch.lengths(scored.trajectories, closing), "sampler_gap": gap, "seconds": clock.seconds}
                    row |= {"watch": watch.warnings(earlier, row, grpo.watch)}
                    monitored, seen, news = scoring.watch(scored, config, seen)
                    row |= monitored
                    for warning in news if processes.is_first() else ():
                        bar.write(f"step {done}: {warning}", file=sys.stderr)
                    log.write(row)
                    earlier.append(row)
                    bar.set_postfix(_shown(row))
                    bar.update(1)
        except interrupts.Interrupted:
            saved.save(done, state, validated.get(done), position)
            raise
    live_calls = registry.live_call_count() - live_before
    if grpo.tools == "live":
        live_calls = scoring.live_calls_of(directory / "rollouts" / f"{step:05d}.jsonl" for step in range(done))
    model = model_of(state)
    if frozen is not None:
        lines = (directory / "rollouts" / f"{done - 1:05d}.jsonl").read_text().splitlines()[: adapter_folder.ROWS]
        rows_T = [Trajectory.from_json(json.loads(line)).tokens_T for line in lines]
        model = adapter_folder.finish(directory, base, model, done, rows_T)
    return model, live_calls


def _streamed(directory: Path, step: int) -> Path:
    """Where this process's episodes of a step go as they end; gone when the step has been learnt from."""
    part = f".{jax.process_index()}" if jax.process_count() > 1 else ""
    return directory / "rollouts" / f"{step:05d}.streamed{part}.jsonl"


def _rows(played: groups.Played) -> tuple[list[Trajectory], list[Row]]:
    """The episodes of the update, and their rows. One whose opening left no room for a turn has no token to train on."""
    columns = zip(played.scored.trajectories, played.scored.advantage_N, played.trained_N, strict=True)
    trained = [(t, float(a)) for t, a, chosen in columns if chosen and t.sampled_T.any()]
    rows = [Row(t.tokens_T, t.sampled_T, a, behavior_logprobs_T=t.behavior_logprobs_T) for t, a in trained]
    return [t for t, _ in trained], rows


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    """What the progress bar says of a step."""
    gap, kl = row["sampler_gap"], f"{row['kl']:.3f}" if "kl" in row else "no update"
    shown = {"acc": f"{row['accuracy']:.2f}", "kl": kl, "gap": f"{gap['mean']:.0e}", "gap_max": f"{gap['max']:.0e}"}
    return shown | ({"watch": "; ".join(row["watch"])} if row["watch"] else {})


def _by_row(rows: Sequence[Row], batches: Placed, logprobs: Sequence[Any]) -> list[np.ndarray]:
    """Logprobs of batches, taken apart into those of rows, without the padding."""
    return taken_apart(rows, [(processes.whole(x), packs) for x, (_, packs) in zip(logprobs, batches, strict=True)])
