"""Many transcripts through a teacher: bounded work at a time, in the order of the input, interruptible, paid once.

    FOLDER/transcripts.jsonl   with reasoning, in the order of the input
    FOLDER/provenance.jsonl    a row an assistant message: transcript, message, how, teacher, prompt, tokens, rejected
    FOLDER/replies.sqlite      what a language model replied, by request: what makes a run go on where it was

The first two appear whole, when all is done. A copy of the last one in another folder pays for the same requests there.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacherl_jax import interrupts
from cacherl_jax.config import TeacherConfig
from cacherl_jax.metrics import Progress, ProgressFactory
from cacherl_jax.trajectories.endpoint import Endpoint
from cacherl_jax.trajectories.paid import Halt, PaidModel, Purse, Replies, TeacherStopped, estimate
from cacherl_jax.trajectories.prompts import Request
from cacherl_jax.trajectories.teacher import LanguageTeacher, Model, ScriptedTeacher, Teacher
from cacherl_jax.trajectories.thinking import ThinkingReport, Thought, add_thinking, classifies
from cacherl_jax.types import ToolSpec, Transcript
from cacherl_jax.whole_files import whole_lines

OPEN_MESSAGES = 4  # a request on its way: those that are prepared, wait for their turn or for another try
OPEN_TRANSCRIPTS = 256  # that are done or being done before the first of them is
LOOK = 0.2  # seconds between looks for Ctrl-C


@dataclass(frozen=True)
class Job:
    """What is to be done. model, name: a model of ours and what it is, for teacher.kind="policy"."""

    transcripts: Sequence[Transcript]
    specs: Mapping[str, ToolSpec]
    config: TeacherConfig
    seed: int
    model: Model | None = None
    name: str = ""


def run(folder: Path, job: Job, progress: ProgressFactory) -> dict[str, Any]:
    """Returns counts and spending. Raises TeacherStopped where the budget or the endpoint ends the run, and
    KeyboardInterrupt; then every reply that was on its way has been stored, and the same call goes on from there."""
    with interrupts.held():
        try:
            return asyncio.run(_run(folder, job, progress))
        except TeacherStopped:
            interrupts.check()  # it was this that stopped it
            raise


def dry_run(folder: Path, job: Job) -> dict[str, Any]:
    """Messages, and what they will cost at most, as far as replies in `folder` have not paid for them. Asks nothing."""
    path = folder / "replies.sqlite"
    replies = Replies(path) if path.is_file() else None
    try:
        return _estimate(job, replies, Purse(job.config, replies.spent() if replies else (0, 0, 0)))
    finally:
        if replies:
            replies.close()


def _estimate(job: Job, replies: Replies | None, purse: Purse) -> dict[str, Any]:
    result: dict[str, Any] = {"transcripts": len(job.transcripts), "messages": sum(map(_turns, job.transcripts))}
    if job.config.kind == "scripted":
        return result
    teacher = LanguageTeacher(None, _name(job), job.specs, job.config, job.seed)
    return result | estimate(_requests(job.transcripts, teacher), replies, purse)


def _turns(transcript: Transcript) -> int:
    return sum(message.role == "assistant" for message in transcript.messages)


def _name(job: Job) -> str:
    return job.name or job.config.model


def _requests(transcripts: Sequence[Transcript], teacher: LanguageTeacher) -> Iterator[Request]:
    for transcript in transcripts:
        for i, message in enumerate(transcript.messages):
            if message.role == "assistant" and not message.reasoning:
                yield from teacher.requests(transcript.messages[:i], message, classifies=classifies(transcript.messages, i))


async def _run(folder: Path, job: Job, progress: ProgressFactory) -> dict[str, Any]:
    if job.config.kind == "scripted":
        return {"teacher": "scripted"} | (await _think_all(folder, job, ScriptedTeacher(job.specs), progress)).to_json()
    halt, replies = Halt(), Replies(folder / "replies.sqlite")
    endpoint = None
    try:
        model = job.model
        if model is None:
            model = endpoint = Endpoint(job.config, job.config.concurrency, halt)
        purse = Purse(job.config, replies.spent())
        paid = PaidModel(model, replies, purse, halt, job.config.concurrency)
        teacher = LanguageTeacher(paid, _name(job), job.specs, job.config, job.seed)
        costs = _estimate(job, replies, purse)
        try:
            report = await _think_all(folder, job, teacher, progress, purse, costs)
        finally:
            halt.set()
            await paid.landed()
    finally:
        if endpoint:
            await endpoint.close()
        replies.close()
    return {
        "teacher": teacher.name,
        "prompt": teacher.prompt,
        **report.to_json(),
        "requests": paid.asked,
        "from_store": paid.stored,
        "tries": endpoint.tries if endpoint else paid.asked,
        "prompt_tokens": purse.prompt_tokens,
        "completion_tokens": purse.completion_tokens,
        "money": round(purse.money, 6),
    }


async def _think_all(
    folder: Path,
    job: Job,
    teacher: Teacher,
    progress: ProgressFactory,
    purse: Purse | None = None,
    costs: Mapping[str, Any] | None = None,
) -> ThinkingReport:
    """All transcripts, written in their order; so many messages at a time that the teacher never waits for work."""
    report, woken, waiting = ThinkingReport(), asyncio.Event(), iter(job.transcripts)
    tasks: deque[asyncio.Task[Any]] = deque()
    failures: list[BaseException] = []
    begun = done = 0

    def on_message(thought: Thought) -> None:
        nonlocal done
        report.add(thought)
        done += 1
        _show(bar, purse)
        woken.set()

    def on_transcript(task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()):
            failures.append(error)
        woken.set()

    bar = progress(total=sum(map(_turns, job.transcripts)), desc="think")
    outputs = (whole_lines(folder / name) for name in ("transcripts.jsonl", "provenance.jsonl"))
    with bar, next(outputs) as write_transcript, next(outputs) as write_row:
        if costs and not bar.disable:
            bar.write("think: " + ", ".join(f"{name} {value}" for name, value in costs.items()), file=sys.stderr)
        try:
            while True:
                while begun - done < OPEN_MESSAGES * job.config.concurrency and len(tasks) < OPEN_TRANSCRIPTS:
                    if (transcript := next(waiting, None)) is None:
                        break
                    begun += _turns(transcript)
                    tasks.append(asyncio.ensure_future(add_thinking(transcript, teacher, job.config, on_message)))
                    tasks[-1].add_done_callback(on_transcript)
                if not tasks:
                    return report
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(woken.wait(), LOOK)
                woken.clear()
                if failures:
                    raise failures[0]
                if interrupts.pending():
                    raise TeacherStopped("stopped by a signal")
                while tasks and tasks[0].done():
                    thought, rows = tasks.popleft().result()
                    write_transcript(thought.to_json())
                    for row in rows:
                        write_row(row)
        finally:
            for task in tasks:
                task.cancel()


def _show(bar: Progress, purse: Purse | None) -> None:
    if purse is not None and not bar.disable:
        tokens = purse.prompt_tokens + purse.completion_tokens
        bar.set_postfix_str(f"{tokens} tokens, {purse.money:.4g} spent", refresh=False)
    bar.update(1)
