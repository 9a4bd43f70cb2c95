"""Hybrid thinking trajectories (paper.md, section 1): reasoning for every assistant message of a recorded trajectory.

Analytical text is wrapped as reasoning, verbatim; in front of user-facing text and of bare calls the teacher writes it; the
final turn always gets written reasoning. Tool calls, results and errors stay byte-identical, which is checked each time.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cacherl_jax.config import TeacherConfig
from cacherl_jax.trajectories import checks
from cacherl_jax.trajectories.teacher import Answer, Teacher
from cacherl_jax.types import Message, Transcript

How = Literal["kept", "wrapped", "written", "empty"]
FOR_GOOD = ("refused", "failed")  # problems of a request whatever its seed


@dataclass(frozen=True)
class Thought:
    """An assistant message with its reasoning: kept as recorded, wrapped, written, or an empty block after up to `attempts`
    rejections. rejected: the reason of each reply that the checks did not take, in order."""

    message: Message
    how: How
    rejected: tuple[str, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class ThinkingReport:
    """What was done to a set of transcripts: assistant messages by what became of them, rejected replies by reason."""

    messages: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)

    def add(self, thought: Thought) -> None:
        self.messages[thought.how] += 1
        self.rejected.update(thought.rejected)

    def to_json(self) -> dict[str, Any]:
        by_how = {how: self.messages[how] for how in ("kept", "wrapped", "written", "empty")}
        return {"messages": self.messages.total(), **by_how, "rejected": dict(sorted(self.rejected.items()))}


async def add_thinking(
    transcript: Transcript, teacher: Teacher, config: TeacherConfig, on_message: Callable[[Thought], None]
) -> tuple[Transcript, list[dict[str, Any]]]:
    """`transcript` with reasoning in every assistant message, and a row of provenance for each. Messages do not depend on
    each other, and the teacher is asked about all of them at once; `on_message` takes each as it is done."""
    messages = transcript.messages

    async def think(i: int) -> Thought:
        thought = await think_message(messages, i, teacher, config)
        on_message(thought)
        return thought

    places = [i for i, message in enumerate(messages) if message.role == "assistant"]
    thoughts = dict(zip(places, await asyncio.gather(*map(think, places)), strict=True))
    out = (thoughts[i].message if i in thoughts else message for i, message in enumerate(messages))
    thought = dataclasses.replace(transcript, messages=tuple(out))
    checks.check_unchanged(transcript, thought)
    return thought, [_provenance(transcript.id, i, thoughts[i], teacher) for i in places]


def _provenance(transcript: str, i: int, thought: Thought, teacher: Teacher) -> dict[str, Any]:
    row: dict[str, Any] = {"transcript": transcript, "message": i, "how": thought.how}
    if thought.how == "kept":
        return row
    row |= {"teacher": teacher.name, "prompt": teacher.prompt}
    return row | {
        "prompt_tokens": thought.prompt_tokens,
        "completion_tokens": thought.completion_tokens,
        "rejected": list(thought.rejected),
    }


async def think_message(messages: Sequence[Message], i: int, teacher: Teacher, config: TeacherConfig) -> Thought:
    """The assistant message `messages[i]` with its reasoning. The teacher is given the messages before it alone.

    Reasoning that `checks.problem` rejects is asked for again, `config.attempts` times in all, what the endpoint refuses or
    fails on not; then the block is empty. A message whose text cannot be classified counts as addressed to the user: its text
    stays where it is.
    """
    past, message = messages[:i], messages[i]
    if message.reasoning:
        return Thought(message, "kept")
    if checks.THINK_MARK.search(message.content):
        inside = checks.THINK_BLOCK.fullmatch(message.content)
        if not inside or checks.THINK_MARK.search(inside[1] + inside[2]):
            # Where its reasoning ends nobody can say, and no reasoning in front of it would mend the text to the user.
            return Thought(dataclasses.replace(message, reasoning=""), "empty", ("marked_text",))
        message = dataclasses.replace(message, reasoning=inside[1].strip() or None, content=inside[2])
        if message.reasoning:
            return Thought(message, "kept")
        messages = [*past, message, *messages[i + 1 :]]  # an empty block, as models that do not think write it
    answers: list[Answer] = []
    rejected: list[str] = []

    def done(how: How, **changes: str) -> Thought:
        tokens = (sum(a.prompt_tokens for a in answers), sum(a.completion_tokens for a in answers))
        return Thought(dataclasses.replace(message, **changes), how, tuple(rejected), *tokens)

    if classifies(messages, i):
        for attempt in range(config.attempts if teacher.draws else 1):
            answers.append(await teacher.classify(past, message, attempt))
            if not answers[-1].problem:
                break
            rejected.append(answers[-1].problem)
            if rejected[-1] in FOR_GOOD:
                break
        if answers[-1].value == "analytical":
            if checks.MARKS.search(message.content):
                rejected.append("marks")  # would break the block; the text stays where it is
            else:
                return done("wrapped", reasoning=message.content, content="")
    for attempt in range(config.attempts if teacher.draws else 1):
        answers.append(await teacher.write(past, message, attempt))
        problem = answers[-1].problem or checks.problem(answers[-1].value, messages, i, config)
        if not problem:
            return done("written", reasoning=answers[-1].value)
        rejected.append(problem)
        if problem in FOR_GOOD:
            break
    return done("empty", reasoning="")


def classifies(messages: Sequence[Message], i: int) -> bool:
    """Whether the text of `messages[i]` may be the agent's own: it acts on before the user speaks again. Text that ends its
    turn is for the user, however it sounds: as reasoning it would leave the turn empty."""
    message = messages[i]
    goes_on = bool(message.tool_calls) or (i + 1 < len(messages) and messages[i + 1].role == "assistant")
    return goes_on and bool(message.content.strip())
