"""95 % intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval and the number of observations."""

    mean: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def wilson(successes: float, n: int) -> Interval:
    """Wilson's score interval of a proportion (E. B. Wilson, 1927). Without observations: [0, 1]."""
    if n == 0:
        return Interval(0.0, 0.0, 1.0, 0)
    p = successes / n
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n)) / (1 + Z95**2 / n)
    return Interval(p, max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p)), n)  # rounding may leave p outside


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, draws: int = 10_000) -> Interval:
    """Percentile bootstrap of a mean over tasks; for shares that are not 0 or 1."""
    values_N = np.asarray(values, np.float64)
    if not len(values_N):
        return Interval(0.0, 0.0, 1.0, 0)
    rng = np.random.default_rng(seed)
    # In blocks: draws x N indices of a large evaluation would not fit.
    means = [values_N[rng.integers(0, len(values_N), (100, len(values_N)))].mean(axis=1) for _ in range(-(-draws // 100))]
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return Interval(float(values_N.mean()), float(low), float(high), len(values_N))


def paired_difference(after: Sequence[float], before: Sequence[float], *, seed: int, draws: int) -> Interval:
    """The mean of after - before on the same tasks, bootstrapped over tasks. Raises ValueError for unequal lengths."""
    if len(after) != len(before):
        raise ValueError(f"paired values differ in number: {len(after)} and {len(before)}")
    return bootstrap_mean(np.subtract(after, before).tolist(), seed=seed, draws=draws)


def hierarchical(values: Sequence[Sequence[float] | np.ndarray], *, seed: int = 0, draws: int = 10_000) -> Interval:
    """The mean over runs of each run's mean over tasks, bootstrapped over both: runs (seeds) are drawn with replacement, then
    each drawn run's tasks. Every run weighs the same, whatever its number of tasks; `n` counts the tasks of all. With few runs
    it is narrower than what more would show: three can be drawn in ten ways only.

    Source: Davison and Hinkley, "Bootstrap Methods and their Application" (1997), section 3.8. Raises ValueError for an
    empty run.
    """
    runs = [np.asarray(v, np.float64) for v in values]
    if not runs or any(not len(run) for run in runs):
        raise ValueError(f"runs of {[len(run) for run in runs]} values; each needs at least one")
    rng = np.random.default_rng(seed)
    chosen_DS = rng.integers(0, len(runs), (draws, len(runs)))
    means_DS = np.zeros(chosen_DS.shape)
    for s, run in enumerate(runs):
        at = chosen_DS == s
        # A resampled task mean of a run is drawn anew each time that the run is.
        means_DS[at] = np.concatenate(
            [run[rng.integers(0, len(run), (n, len(run)))].mean(axis=1) for n in _blocks(int(at.sum()), 100)] or [np.zeros(0)]
        )
    low, high = np.percentile(means_DS.mean(axis=1), (2.5, 97.5))
    return Interval(float(np.mean([run.mean() for run in runs])), float(low), float(high), sum(len(run) for run in runs))


def _blocks(count: int, size: int) -> list[int]:
    """Sizes of blocks of at most `size` that make up `count`."""
    return [size] * (count // size) + ([count % size] if count % size else [])


def hierarchical_difference(
    after: Sequence[Sequence[float]], before: Sequence[Sequence[float]], *, seed: int, draws: int
) -> Interval:
    """`hierarchical` of after - before, each a list of runs on the same tasks as its partner. Raises ValueError where runs or
    their tasks do not pair."""
    if len(after) != len(before) or not after:
        raise ValueError(f"expected pairs of runs, got {len(after)} and {len(before)}")
    for a, b in zip(after, before, strict=True):
        if len(a) != len(b) or not len(a):
            raise ValueError(f"paired values differ in number or are none: {len(a)} and {len(b)}")
    return hierarchical([np.subtract(a, b) for a, b in zip(after, before, strict=True)], seed=seed, draws=draws)
