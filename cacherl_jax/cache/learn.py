"""Learning the rules of the adapted tier from recordings.

Dialogues are put in the order of a hash of their names. The first third proposes rules, the others certify them:
each dialogue, in order, is asked of the recordings of the dialogues before it, and has one vote on each rule that answers
any of its calls: right if all those answers equal what was recorded. So no pair of dialogues votes twice, and given the
dialogues before it a vote for a rule of true precision p is right with probability p: the number of right votes under the
hypothesis p <= `precision` is at most binomial. One-sided exact tests, and Benjamini and Hochberg (1995) over all proposed
rules at rate `fdr`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cacherl_jax.cache.adapt import (
    AGREEMENT,
    POSSIBLE,
    Arguments,
    Change,
    Kinds,
    Rule,
    Source,
    adapt,
    agreed,
    candidates,
    given_arguments,
    grouped,
    length,
    rest,
    texts_by_field,
)
from cacherl_jax.cache.entries import Recording
from cacherl_jax.cache.results import is_negative, meaning_of, parsed
from cacherl_jax.types import Kind, ToolResult, ToolSpec

PRECISION = 0.9  # what a rule's precision is tested against
FDR = 0.1  # share of certified rules that may fall short of it
PROPOSING = 1 / 3  # share of dialogues that propose
MIN_PROPOSING = 3  # votes of a proposed rule
MAX_PROPOSING = 100  # dialogues asked for one set of arguments while proposing
HOPELESS_AFTER = 8  # votes, most of them wrong, after which a rule is no longer tried while proposing
IDLE_AFTER = 24  # tries with hardly a right answer, likewise
MAX_NAMES = 16  # a tool with more argument names is tested on single differences alone


@dataclass(frozen=True, eq=False)
class Target:
    """A recorded call that is asked of the others."""

    arguments: Arguments
    writes: str
    said: str
    rank: int


def learn(
    recordings: Iterable[Recording],
    specs: Mapping[str, ToolSpec],
    *,
    precision: float = PRECISION,
    fdr: float = FDR,
    negatives: bool = False,
) -> list[Rule]:
    """The certified rules, in order of tool and arguments; whatever the order of the recordings."""
    of_tool: dict[str, list[Recording]] = defaultdict(list)
    for recording in recordings:
        if recording.kind is not Kind.SIMULATED and recording.episode:
            of_tool[recording.tool].append(recording)
    episodes = sorted({r.episode for rows in of_tool.values() for r in rows}, key=_hash)
    ranks = {episode: rank for rank, episode in enumerate(episodes)}
    first_certifying = math.ceil(len(episodes) * PROPOSING)
    tested: list[Rule] = []
    for tool in sorted(of_tool):
        tested += _tested(tool, of_tool[tool], specs.get(tool), ranks, first_certifying, precision, negatives)
    return certified(tested, fdr)


def certified(tested: Sequence[Rule], fdr: float) -> list[Rule]:
    """Benjamini and Hochberg's step-up procedure."""
    by_p = sorted(tested, key=lambda r: r.p)
    passed = max((i for i, rule in enumerate(by_p, 1) if rule.p <= fdr * i / len(by_p)), default=0)
    return sorted(by_p[:passed], key=lambda r: (r.tool, r.changes))


def binomial_tail(right: int, votes: int, p: float) -> float:
    """P(X >= right) for X binomial(votes, p)."""
    if right <= 0:
        return 1.0
    log_choose = [math.lgamma(votes + 1) - math.lgamma(k + 1) - math.lgamma(votes - k + 1) for k in range(right, votes + 1)]
    terms = (c + k * math.log(p) + (votes - k) * math.log1p(-p) for k, c in zip(range(right, votes + 1), log_choose, strict=True))
    return min(1.0, math.fsum(map(math.exp, terms)))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _tested(
    tool: str,
    recordings: Sequence[Recording],
    spec: ToolSpec | None,
    ranks: Mapping[str, int],
    first_certifying: int,
    precision: float,
    negatives: bool,
) -> Iterator[Rule]:
    """The rules proposed for a tool, with the certifying votes."""
    targets, sources, longest = _of_tool(recordings, spec, ranks, negatives)
    names = sorted({name for t in targets for name in t.arguments})
    pairs = itertools.combinations(names, 2) if len(names) <= MAX_NAMES else ()
    for differing in [*((n,) for n in names), *pairs]:
        groups = grouped(sources, differing)
        possible = {
            tuple(zip(differing, kinds, actions, strict=True))
            for kinds in itertools.product(POSSIBLE, repeat=len(differing))
            for actions in itertools.product(*(POSSIBLE[kind] for kind in kinds))
        }
        proposing = _votes(targets, groups, differing, longest, possible, first_certifying, certify=False)
        proposed = {c for c, v in proposing.items() if len(v) >= MIN_PROPOSING and sum(v.values()) >= precision * len(v)}
        if not proposed:
            continue
        votes = _votes(targets, groups, differing, longest, proposed, first_certifying, certify=True)
        for changes in sorted(proposed):
            right, n = sum(votes[changes].values()), len(votes[changes])
            yield Rule(tool, changes, right, n, binomial_tail(right, n, precision))


def _of_tool(
    recordings: Sequence[Recording], spec: ToolSpec | None, ranks: Mapping[str, int], negatives: bool
) -> tuple[list[Target], list[Source], int]:
    """A tool's calls in order of dialogues, its distinct stored results in order of hash, and its longest list."""
    targets: list[Target] = []
    sources: dict[tuple[bytes, str], Source] = {}
    known: dict[ToolResult, tuple[Any, str, bool]] = {}
    longest = 0
    for r in sorted(recordings, key=lambda r: (ranks[r.episode], r.key)):
        if r.result not in known:
            known[r.result] = (
                parsed(r.result.content),
                meaning_of(parsed(r.result.content), r.result.error),
                is_negative(r.result),
            )
        value, said, negative = known[r.result]
        longest = max(longest, length(value))
        arguments, rank = given_arguments(r.arguments, spec), ranks[r.episode]
        if arguments is None:
            continue
        targets.append(Target(arguments, r.writes, said, rank))
        if (negatives or not negative) and (r.key, said) not in sources:
            order = _hash(f"{r.key.hex()} {said}").hex()
            fields = texts_by_field(value)
            sources[r.key, said] = Source(arguments, r.writes, value, fields, said, r.result.error, order, rank)
    return targets, sorted(sources.values(), key=lambda s: s.order), longest


def _votes(
    targets: Iterable[Target],
    groups: Mapping[tuple, Sequence[Source]],
    names: tuple[str, ...],
    longest: int,
    rules: set[tuple[Change, ...]],
    first_certifying: int,
    *,
    certify: bool,
) -> dict[tuple[Change, ...], dict[int, bool]]:
    """Of each rule, the votes by dialogue. Certifying dialogues ask those before them, proposing ones all other proposing."""
    votes: dict[tuple[Change, ...], dict[int, bool]] = defaultdict(dict)
    by_kinds: dict[Kinds, list[tuple[Change, ...]]] = defaultdict(list)
    for changes in sorted(rules):
        by_kinds[tuple(kind for _, kind, _ in changes)].append(changes)
    tries: Counter[tuple[Change, ...]] = Counter()
    dialogues: set[int] = set()
    for target in targets:
        if (target.rank >= first_certifying) != certify or (len(dialogues) >= MAX_PROPOSING and not certify):
            continue
        group = groups.get(rest(target.arguments, target.writes, names))
        if group is None:
            continue
        limit = target.rank if certify else first_certifying
        sources = (s for s in group if s.rank < limit and s.rank != target.rank)
        for kinds, chosen in candidates(sources, target.arguments, names, by_kinds).items():
            for changes in by_kinds[kinds] if chosen else ():
                tries[changes] += 1
                said = _agreed(chosen, target.arguments, changes, longest)
                of_rule = votes[changes]
                if said is not None:
                    dialogues.add(target.rank)
                    of_rule[target.rank] = of_rule.get(target.rank, True) and said == target.said
                right = sum(of_rule.values())
                hopeless = len(of_rule) >= HOPELESS_AFTER and right < 0.5 * len(of_rule)
                if not certify and (hopeless or (tries[changes] >= IDLE_AFTER and right < 0.1 * tries[changes])):
                    by_kinds[kinds] = [c for c in by_kinds[kinds] if c != changes]
        if not certify:
            by_kinds = {kinds: left for kinds, left in by_kinds.items() if left}
            if not by_kinds:
                break
    return votes


def _agreed(sources: Sequence[Source], asked: Arguments, changes: tuple[Change, ...], longest: int) -> str | None:
    """What the sources say with enough agreement; None where none can be adapted, or they disagree."""
    said: Counter[str] = Counter()
    for source in sources:
        value = adapt(source, asked, changes, longest)
        if value is not None:
            said[source.said if value is source.value else meaning_of(value, source.error)] += 1
            if said.total() - max(said.values()) > (1 - AGREEMENT) * len(sources):
                return None  # whatever the others say
    return agreed(said)
