"""The page of an iterated run: every version of the policy on one metric, and the data that each round learnt from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

WIDTH, HEIGHT, MARGIN = 720, 260, 44  # of the curve, in pixels
COLOURS = {"live": "#0072B2", "cached": "#E69F00"}


def write_page(result: Mapping[str, Any], path: Path) -> None:
    """`result` as rounds.json holds it, in one HTML page without outside references: a table and a curve of process accuracy
    by version, what rejection sampling accepted and why not, the tools before and after mixing, the stores' snapshots."""
    versions = result["versions"]
    sources = [source for source in COLOURS if source in versions[0]]
    template = resources.files("cacherl_jax.evaluate").joinpath("rounds.html").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        result=result,
        sources=sources,
        colours=COLOURS,
        curves={source: curve([version[source]["process"] for version in versions]) for source in sources},
        rejected=[r for r in result["rounds"] if r["rejection"]],
        mixed=[r for r in result["rounds"] if "calls" in r["data"]],
        size={"width": WIDTH, "height": HEIGHT, "margin": MARGIN},
    )
    path.write_text(page)


def curve(intervals: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Where the points of a curve lie in the picture: x, y, and the ends of each interval, low and high, from the top."""
    step = (WIDTH - 2 * MARGIN) / max(1, len(intervals) - 1)

    def y(value: float) -> float:
        return round(HEIGHT - MARGIN - value * (HEIGHT - 2 * MARGIN), 1)

    return [
        {"x": round(MARGIN + i * step, 1), "y": y(v["mean"]), "low": y(v["low"]), "high": y(v["high"])}
        for i, v in enumerate(intervals)
    ]
