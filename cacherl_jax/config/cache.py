"""How the cache keys and answers calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cacherl_jax.config.basics import REPLY_PARTS, Count, EndpointConfig, Rate, Share, parts, require


@dataclass(frozen=True)
class SimulatorConfig(EndpointConfig):
    """An endpoint that stands in for tools."""

    examples: Count = 3  # nearest stored calls shown


@dataclass(frozen=True)
class CacheConfig:
    """How a call is keyed and answered (rooms: cache/). Tiers in order: exact, adapted, fuzzy, best effort, miss."""

    key: Literal["raw", "canonical", "state"] = "state"  # state: canonical call + earlier writes it depends on
    adapted: bool = True  # serve a stored result for other arguments where certified rules say it holds
    similarity: Literal["jaccard", "soft"] = "soft"  # the paper's, or softened inside free text
    fuzzy_threshold: Rate = 0.5  # similarity of typed key=value tokens; above 1 turns the tier off
    fuzzy_gate: tuple[Literal["enum", "boolean", "integer", "number"], ...] = ()  # argument types whose values must agree
    best_effort: Literal["off", "nearest", "schema", "simulator"] = "nearest"
    on_miss: Literal["error", "nearest", "fail", "live"] = "error"
    errors: Literal["exact", "all", "never"] = "exact"  # by which tiers stored errors and empty results are served
    simulator: SimulatorConfig = SimulatorConfig()  # for best_effort="simulator"
    fidelity: Literal["fitted", "table"] = "fitted"  # the table below stands in where nothing is fitted
    fidelity_exact: Share = 1.0
    fidelity_adapted: Share = 0.95
    fidelity_fuzzy: Share = 0.3
    fidelity_best_effort: Share = 0.1
    fidelity_miss: Share = 0.0

    def __post_init__(self) -> None:
        if self.best_effort == "simulator":
            for name in ("base_url", "model"):
                require(
                    bool(getattr(self.simulator, name)),
                    f"cache.simulator.{name} is empty; cache.best_effort='simulator' asks an endpoint that it names",
                )


CACHE_PARTS = parts("cache", CacheConfig, simulator=(*REPLY_PARTS, "examples"))  # what decides answers

# The paper's three tiers and nothing else (paper.md, section 2).
PAPER_CACHE = CacheConfig(key="canonical", adapted=False, similarity="jaccard", errors="all", fidelity="table")
