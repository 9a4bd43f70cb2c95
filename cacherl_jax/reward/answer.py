"""How good the final answer is, by rule: the share of the task's facts that it holds."""

from __future__ import annotations

import re

from cacherl_jax.trajectory import StopReason, Trajectory
from cacherl_jax.types import Task

# An answer may use this many words for each fact before more of them stop helping: listing everything is no answer.
WORDS_PER_FACT = 30

_WORD = re.compile(r"[^\W_]+(?:[.\-:/'][^\W_]+)*", re.UNICODE)


def words(text: str) -> list[str]:
    """Lower-case words and numbers; "17" is no part of "417", and 1,250.0 reads as 1250."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.lower())
    return [re.sub(r"^(\d+)\.0+$", r"\1", word) for word in _WORD.findall(text)]


def contains(answer: str, fact: str) -> bool:
    """Whether the words of `fact` stand in `answer` as a run of whole words."""
    held, wanted = words(answer), words(fact)
    return bool(wanted) and any(held[i : i + len(wanted)] == wanted for i in range(len(held) - len(wanted) + 1))


def answer_reward(task: Task, trajectory: Trajectory) -> float:
    """Share of the facts in the answer, in [0, 1]; without facts, 1 for any answer. 0 where the episode did not end with an
    answer, or reasoning leaked into it (paper.md, section 3). Long lists are scaled down by their length."""
    if trajectory.stop is not StopReason.ANSWER or trajectory.reasoning_leaked or not trajectory.answer.strip():
        return 0.0
    if not task.facts:
        return 1.0
    share = sum(contains(trajectory.answer, fact) for fact in task.facts) / len(task.facts)
    return share * min(1.0, WORDS_PER_FACT * len(task.facts) / max(1, len(words(trajectory.answer))))
