"""Rounds (paper.md, section 4): SFT -> GRPO -> rejection sampling -> SFT on the recorded transcripts and all that was accepted
so far -> ... Every SFT starts from the run's first weights: what differs between rounds is the data, and no error of an
earlier policy is inherited but through what it was accepted for. After the last round one more SFT learns from all of it.

    record/, think/            once, as in a single run
    roundN/sft/, roundN/grpo/  as in a single run
    roundN/rejection/          samples.jsonl     every episode that was played, as trajectories
                               accepted.jsonl    those to learn from, token by token
                               transcripts.jsonl the same ones as text
    roundN/eval/               test tasks by the round's policies
    roundN/round.json          data, snapshots and metrics of the round
    rounds.json, rounds.html   all rounds

A round depends on no later one: the same command with more rounds goes on where it ended.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cacherl_jax import metrics, processes
from cacherl_jax.config import Config
from cacherl_jax.data.pipeline import Row
from cacherl_jax.evaluate import intervals, process_accuracy, rounds
from cacherl_jax.reward import answer
from cacherl_jax.reward.judge import open_judge
from cacherl_jax.rollout import runner, stream
from cacherl_jax.run_directory import RunDirectory
from cacherl_jax.stages import eval, grpo, record, sft, think
from cacherl_jax.stages.inputs import (
    GRPO,
    MERGED,
    REJECTION,
    SFT,
    STORES,
    load_policy,
    load_specs,
    load_tasks,
    load_tokenizer,
    load_trajectories,
    model_config,
    open_cache,
    open_engine,
)
from cacherl_jax.text import chat
from cacherl_jax.tools import registry
from cacherl_jax.trajectories import rejection
from cacherl_jax.trajectories.transcripts import write_transcripts
from cacherl_jax.trajectory import Trajectory
from cacherl_jax.types import Task, ToolSpec
from cacherl_jax.whole_files import write_json, write_lines

DRAWS = 1  # third of the numbers that seed a round's draws: steps of GRPO are seeded by two


def iterate(run: RunDirectory, progress: metrics.ProgressFactory) -> dict[str, Any]:
    """All rounds, the SFT after the last, and the page. Returns what rounds.json holds."""
    record.record(run, progress)
    think.think(run, progress)
    count, result = run.config.iterate.rounds, {}
    for number in range(count + 1):
        name, merged = f"round{number}", number > 0
        rows = partial(_merged_rows, run, number) if merged else lambda: sft.transcript_rows(run, sft.thought(run))
        sft.clone(run, f"{name}/sft", rows, progress, MERGED if merged else SFT)
        policies = {f"sft{number}": f"{name}/sft"}
        if number < count:
            grpo.reinforce(run, progress, stage=f"{name}/grpo", start=f"{name}/sft", parts=MERGED if merged else GRPO)
            _reject(run, number, progress)
            policies[f"grpo{number}"] = f"{name}/grpo"
        for policy, stage in policies.items():
            _evaluate(run, number, policy, stage, progress)
        result = _summarise(run, number)
    return result


# ---- rejection sampling ----------------------------------------------------------------------------------------------


def _reject(run: RunDirectory, number: int, progress: metrics.ProgressFactory) -> dict[str, Any]:
    """Plays training tasks with the round's last policy, from the training store, and keeps what is worth learning from."""
    stage, policy = f"round{number}/rejection", f"round{number}/grpo"
    run.require(policy)

    def body(folder: Path) -> dict[str, Any]:
        config, tok, specs = model_config(run), load_tokenizer(run), load_specs(run)
        rules = config.iterate.rejection
        key = np.random.SeedSequence((config.seed, number, DRAWS))
        tasks = _chosen(load_tasks(run, "train"), rules.tasks, np.random.default_rng(key))
        episodes = [(task, sample) for task in tasks for sample in range(rules.samples)]
        seed = int(key.generate_state(1)[0])
        engine = open_engine(config, tuple(tok.stop_ids))
        model = engine.place(load_policy(run, policy, config))
        sampling = dataclasses.replace(config.rollout, temperature=rules.temperature)
        part = f".{jax.process_index()}" if jax.process_count() > 1 else ""
        path = folder / f"samples{part}.jsonl"
        finished = stream.read_stream(path)
        with (
            registry.forbid_live(),
            stream.TrajectoryStream(path) as streamed,
            progress(total=len(episodes), initial=len(finished), desc=f"rejection {number}") as bar,
        ):

            def on_done(trajectory: Trajectory) -> None:
                streamed(trajectory)
                bar.update(1)

            played = runner.run(
                engine, model, tok, specs, episodes, open_cache(run, "train", specs), sampling, seed,
                finished=finished.values(), on_done=on_done,
            )  # fmt: skip
        of_id = {task.id: task for task in tasks}
        pairs = [(of_id[t.task_id], t) for t in played]
        calls, score, judged = _scores(pairs, specs, config, folder / "verdicts.sqlite")
        accepted, counts = rejection.select(pairs, calls=calls, answer=score, rules=rules)
        texts = [rejection.as_transcript(tok, of_id[t.task_id], t, policy.replace("/", "-")) for t in accepted]
        if processes.is_first():
            write_lines(folder / "accepted.jsonl", (t.to_json() for t in accepted))
            write_transcripts(folder / "transcripts.jsonl", texts)
        rendered = (chat.transcript_tokens(tok, text, specs, config.rollout.max_tool_tokens)[0] for text in texts)
        return {
            "tasks": len(tasks),
            "tasks_accepted": len({t.task_id for t in accepted}),
            "episodes": len(episodes),
            "counts": counts,
            "judged": judged,
            "rendered_alike": sum(np.array_equal(ids, t.tokens_T) for ids, t in zip(rendered, accepted, strict=True)),
        }

    return run.run(stage, MERGED if number else REJECTION, body)


def _scores(
    pairs: Sequence[tuple[Task, Trajectory]], specs: Mapping[str, ToolSpec], config: Config, verdicts: Path
) -> tuple[rejection.Score | None, rejection.Score, dict[str, Any]]:
    """How calls and answers are scored: by the references and the rule of `reward.answer`; or by the judge alone, which is
    asked about all episodes that nothing else speaks against. Its requests and failures; what it failed on scores 0."""
    judge = open_judge(config.reward, verdicts)
    if judge is None:
        rule = answer.rule(config.reward.answer, config.reward.tolerance)
        right = partial(_right, specs=specs)
        return right, lambda task, t: answer.graded(task, t, rule), {}
    rules = config.iterate.rejection
    asked = [pair for pair in pairs if rejection.verdict(*pair, None, lambda task, t: 1.0, rules) == rejection.ACCEPTED]
    found = judge.grade(asked)
    of_episode = {(t.task_id, t.sample): reward or 0.0 for (_, t), reward in zip(asked, found.rewards, strict=True)}
    return None, lambda task, t: of_episode[task.id, t.sample], {"asked": found.asked, "failures": dict(found.failures)}


def _right(task: Task, trajectory: Trajectory, *, specs: Mapping[str, ToolSpec]) -> float:
    return process_accuracy.process_accuracy(task, trajectory.calls_made, specs)


def _chosen(tasks: Sequence[Task], count: int, rng: np.random.Generator) -> list[Task]:
    """`count` of the tasks, others each round, in their own order; 0 is all."""
    if not count or count >= len(tasks):
        return list(tasks)
    return [tasks[i] for i in sorted(rng.permutation(len(tasks))[:count])]


def _merged_rows(run: RunDirectory, number: int) -> tuple[list[Row], dict[str, Any]]:
    """The recorded transcripts and what all rounds before `number` accepted, mixed; with the mix in figures."""
    transcripts = list(sft.thought(run))
    rows, facts = sft.transcript_rows(run, transcripts)
    for earlier in range(number):
        run.require(f"round{earlier}/rejection")
    files = [run.out / f"round{earlier}" / "rejection" / "accepted.jsonl" for earlier in range(number)]
    accepted = rejection.distinct(t for path in files for t in load_trajectories(path))
    recorded = sum(map(rejection.calls_of, transcripts), Counter())
    fitting = [t for t in accepted if len(t.tokens_T) <= sft.row_limit(run.config)]  # the others make room for no tool
    chosen = [fitting[i] for i in rejection.mix(recorded, [*map(rejection.calls_of, fitting)], run.config.iterate.mix)]
    after = sum(map(rejection.calls_of, chosen), recorded)
    facts |= {
        "too_long": facts["too_long"] + len(accepted) - len(fitting),
        "transcripts": len(transcripts),
        "accepted": len(accepted),
        "accepted_rows": len(chosen),
        "calls": {name: {"recorded": recorded[name], "mixed": after[name]} for name in sorted(after)},
        "entropy": {"recorded": rejection.entropy(recorded), "mixed": rejection.entropy(after)},
    }
    return [*rows, *(Row(t.tokens_T, t.sampled_T) for t in chosen)], facts


# ---- what came of it -------------------------------------------------------------------------------------------------


def _evaluate(run: RunDirectory, number: int, policy: str, stage: str, progress: metrics.ProgressFactory) -> None:
    """Test tasks by one policy, by a stage of its own: the policies of later rounds change nothing about it."""
    parts = (*(MERGED if number else GRPO), "eval")
    run.run(_evaluated(number, policy), parts, lambda folder: eval.play(run, folder, {policy: stage}, progress))


def _evaluated(number: int, policy: str) -> str:
    return f"round{number}/eval/{policy}"


def _summarise(run: RunDirectory, latest: int) -> dict[str, Any]:
    """round.json of each round up to the latest, rounds.json and the page, by the first process. Made anew at every call."""
    if not processes.is_first():
        return {}
    recorded, specs, tasks = run.require("record"), load_specs(run), load_tasks(run, "test")
    snapshots = {Path(STORES[split]).stem: recorded[split]["snapshot"] for split in STORES}
    versions: list[dict[str, Any]] = []
    by_round: list[dict[str, Any]] = []
    first: list[float] | None = None
    for number in range(latest + 1):
        last = number == run.config.iterate.rounds
        own: list[dict[str, Any]] = []
        for policy in (f"sft{number}",) if last else (f"sft{number}", f"grpo{number}"):
            stage = _evaluated(number, policy)
            results = run.require(stage)
            source = "live" if f"{policy}.live" in results else "cached"
            right = eval.correct(run.out / stage / f"{policy}.{source}.jsonl", tasks, specs)
            first = first or right
            gain = intervals.paired_difference(right, first, seed=run.config.seed, draws=run.config.eval.bootstrap)
            figures = {name.split(".")[1]: _figures(measured) for name, measured in results.items()}
            own.append({"version": policy, "evaluated": source, **figures, "gain_over_sft0": gain.to_json()})
        rejected = None if last else run.require(f"round{number}/rejection")
        data = run.require(f"round{number}/sft")
        by_round.append({"round": number, "snapshots": snapshots, "versions": own, "data": data, "rejection": rejected})
        write_json(run.out / f"round{number}" / "round.json", by_round[-1])
        versions += own
    spent = run.cpu_seconds()
    result = {
        "name": run.config.name,
        "seed": run.config.seed,
        "tasks": len(tasks),
        "evaluated": versions[0]["evaluated"],
        "snapshots": snapshots,
        "versions": versions,
        "rounds": by_round,
        "cpu_seconds": round(sum(spent.values()), 1),
        "cpu_seconds_by_stage": spent,
    }
    write_json(run.out / "rounds.json", result)
    rounds.write_page(result, run.out / "rounds.html")
    return result


def _figures(measured: dict[str, Any]) -> dict[str, Any]:
    return {name: measured[name] for name in ("process", "answer", "milestones", "calls_per_task")}
