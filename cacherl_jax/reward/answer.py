"""How good the final answer is, by rule, against the task's facts: texts that a right answer holds."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cacherl_jax.trajectory import StopReason, Trajectory
from cacherl_jax.types import Task

# An answer may use this many words for each fact before more of them stop helping: listing everything is no answer.
WORDS_PER_FACT = 30

Rule = Callable[[Sequence[str], str], float]  # (facts, at least one; answer) -> [0, 1]

_WORD = re.compile(r"[^\W_]+(?:[.\-:/'][^\W_]+)*", re.UNICODE)


def words(text: str) -> list[str]:
    """Lower-case words and numbers; "17" is no part of "417", and 1,250.0 reads as 1250."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.lower())
    return [re.sub(r"^(\d+)\.0+$", r"\1", word) for word in _WORD.findall(text)]


def contains(answer: str, fact: str) -> bool:
    """Whether the words of `fact` stand in `answer` as a run of whole words."""
    held, wanted = words(answer), words(fact)
    return bool(wanted) and any(held[i : i + len(wanted)] == wanted for i in range(len(held) - len(wanted) + 1))


def answered(trajectory: Trajectory) -> bool:
    """Whether there is an answer to grade: the episode ended with one, and no reasoning leaked into it (paper.md, section 3)."""
    return trajectory.stop is StopReason.ANSWER and not trajectory.reasoning_leaked and bool(trajectory.answer.strip())


def answer_reward(task: Task, trajectory: Trajectory) -> float:
    """The share of the task's facts in the answer, in [0, 1], the rule that metrics use whatever training is paid by."""
    return graded(task, trajectory, facts_held)


def graded(task: Task, trajectory: Trajectory, rule: Rule) -> float:
    """`rule` of the answer; 0 without an answer to grade; 1 for any answer where the task has no facts."""
    if not answered(trajectory):
        return 0.0
    return rule(task.facts, trajectory.answer) if task.facts else 1.0


# ---- rules ------------------------------------------------------------------------------------------------------------


def facts_held(facts: Sequence[str], answer: str) -> float:
    """The share of facts that stand in the answer as whole words, scaled down for more than WORDS_PER_FACT words a fact."""
    return sum(contains(answer, fact) for fact in facts) / len(facts) * _brevity(facts, answer)


def exact(facts: Sequence[str], answer: str) -> float:
    """1 where the answer is the facts in their order and nothing else, but for case, punctuation and articles."""
    return float(_bare(answer) == _bare(" ".join(facts)))


def f1(facts: Sequence[str], answer: str) -> float:
    """Harmonic mean of precision and recall of the answer's words against those of all facts, counted as often as they occur
    (SQuAD's F1, arXiv 1606.05250)."""
    held, wanted = _bare(answer), _bare(" ".join(facts))
    common = sum((Counter(held) & Counter(wanted)).values())
    return 2 * common / (len(held) + len(wanted)) if common else 0.0


def numeric(facts: Sequence[str], answer: str, tolerance: float) -> float:
    """The share of facts whose number stands in the answer within a relative `tolerance`, scaled as `facts_held`. A fact
    without a number is looked for as words. Units must agree where both sides state one."""
    found = numbers(answer)

    def held(fact: str) -> bool:
        wanted = numbers(fact)
        if not wanted:
            return contains(answer, fact)
        return all(any(_near(f, w, tolerance) for f in found) for w in wanted)

    return sum(map(held, facts)) / len(facts) * _brevity(facts, answer)


def _brevity(facts: Sequence[str], answer: str) -> float:
    return min(1.0, WORDS_PER_FACT * len(facts) / max(1, len(words(answer))))


def _bare(text: str) -> list[str]:
    return [word for word in words(text) if word not in ("a", "an", "the")]


# ---- numbers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """A value as written, its scale word applied; `unit` by its usual sign, "" where none of those known stands at it."""

    value: float
    unit: str


_SCALES = {"k": 1e3, "thousand": 1e3, "million": 1e6, "billion": 1e9, "bn": 1e9}
_UNITS = {
    "€": "€", "eur": "€", "euro": "€", "euros": "€", "$": "$", "usd": "$", "dollar": "$", "dollars": "$", "£": "£", "gbp": "£",
    "pound": "£", "pounds": "£", "%": "%", "percent": "%", "km": "km", "kilometer": "km", "kilometers": "km", "mile": "mile",
    "miles": "mile", "kg": "kg", "kilogram": "kg", "kilograms": "kg", "hour": "hour", "hours": "hour", "minute": "minute",
    "minutes": "minute", "day": "day", "days": "day",
}  # fmt: skip
# Thousands are parted by a comma, an apostrophe, or a (thin, no-break) space; the decimal sign is a point. A number that is
# part of a word, an id, a date, a time or a range ("o417", "2026-03-14", "12:30", "1.2.3") is none.
_NUMBER = re.compile(
    r"(?<![\w.,:/])(?<!\w-)(?P<sign>[-−+]?)(?P<before>[€$£])?\s?"
    r"(?P<number>(?:\d{1,3}(?:[,'\u2019 \u00a0\u2009\u202f]\d{3})+|\d+)(?:\.\d+)?(?:e[+-]?\d+)?)(?!\d|[,:/.]\d|-\w)"
    r"(?P<space>\s?)(?P<after>[^\W\d_]+|[€$£%])?(?:\s(?P<then>[^\W\d_]+|[€$£%]))?",
    re.IGNORECASE,
)


def numbers(text: str) -> list[Number]:
    """The numbers of a text in order: "$1,250.50" is 1250.5 $, "1.2 million euros" 1.2e6 €, "o417" none."""
    found = []
    for match in _NUMBER.finditer(text):
        after, then = (match["after"] or "").lower(), (match["then"] or "").lower()
        if after and not match["space"] and after not in _UNITS and after not in _SCALES:
            continue  # "3rd", "7b"
        value = float(re.sub(r"[^\d.e+-]", "", match["number"].lower())) * _SCALES.get(after, 1.0)
        unit = match["before"] or (then if after in _SCALES else after)
        if math.isfinite(value):
            found.append(Number(-value if match["sign"] in ("-", "−") else value, _UNITS.get(unit, "")))
    return found


def _near(found: Number, wanted: Number, tolerance: float) -> bool:
    agree = not (found.unit and wanted.unit) or found.unit == wanted.unit
    return agree and abs(found.value - wanted.value) <= tolerance * abs(wanted.value) * (1 + 1e-9)


def rule(name: str, tolerance: float) -> Rule:
    """The rule that `reward.answer` names. Raises KeyError for "judge", which is none."""
    rules: Mapping[str, Rule] = {
        "facts": facts_held,
        "exact": exact,
        "f1": f1,
        "numeric": lambda facts, answer: numeric(facts, answer, tolerance),
    }
    return rules[name]
