"""How near a stored call is to the one asked: the ranking behind the fuzzy and best-effort tiers.

A call's tokens are its typed key=value pairs. Similarity is Jaccard's over these, softened inside free text: two pairs of
the same key and type that hold text of several words count by their rapidfuzz token-sort ratio instead of 0 or 1:

    soft(a, b) = m / (|a| + |b| - m),   m = sum over keys of both of  1 if equal,
                                                                      ratio if both are free text,  0 otherwise

Without free text this is plain Jaccard. Source: paper.md, section 2, tier 2.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rapidfuzz import fuzz

from cacherl_jax.cache.store import Entry

Tokens = Mapping[str, tuple[str, str]]  # key path -> (type, text)


def tokens(arguments: str) -> dict[str, tuple[str, str]]:
    """The typed key=value tokens of canonical arguments; nested keys by path."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return {"": ("text", arguments)}
    out: dict[str, tuple[str, str]] = {}
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, dict) and (node or not path):
            stack += [(f"{path}.{k}" if path else k, v) for k, v in node.items()]
        elif isinstance(node, list) and node:
            stack += [(f"{path}[{i}]", v) for i, v in enumerate(node)]
        else:
            out[path] = (type(node).__name__, node if isinstance(node, str) else json.dumps(node))
    return out


def similarity(a: Tokens, b: Tokens) -> float:
    """Soft Jaccard in [0, 1]; 1 for two calls without arguments."""
    if not a and not b:
        return 1.0
    matched = 0.0
    for key in a.keys() & b.keys():
        (kind_a, text_a), (kind_b, text_b) = a[key], b[key]
        if kind_a != kind_b:
            continue
        if text_a == text_b:
            matched += 1.0
        elif kind_a == "str" and " " in text_a.strip() and " " in text_b.strip():
            matched += fuzz.token_sort_ratio(text_a, text_b) / 100.0
    return matched / (len(a) + len(b) - matched)


def nearest(asked: Tokens, writes: str, stored: Sequence[tuple[Tokens, Entry]]) -> tuple[Entry | None, float]:
    """The most similar stored entry and its similarity; (None, 0.0) where nothing is stored.

    Ties go to an entry recorded after the same writes as the asked call, then to the more frequent, then to the smaller
    hash: the answer depends on content alone.
    """
    best: Entry | None = None
    best_rank: tuple[Any, ...] = ()
    for candidate, entry in stored:
        score = similarity(asked, candidate)
        rank = (score, entry.writes == writes, entry.count)
        if best is None or rank > best_rank or (rank == best_rank and entry.hash < best.hash):
            best, best_rank = entry, rank
    return best, best_rank[0] if best else 0.0


def tokenized(entries: Iterable[Entry]) -> list[tuple[Tokens, Entry]]:
    return [(tokens(entry.arguments), entry) for entry in entries]
