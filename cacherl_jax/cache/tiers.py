"""How near a stored call is to the one asked: the ranking behind the fuzzy and best-effort tiers.

A call's tokens are its typed key=value pairs. Similarity is Jaccard's over these, softened inside free text: two pairs of
the same key and type that hold text of several words count by their rapidfuzz token-sort ratio instead of 0 or 1:

    soft(a, b) = m / (|a| + |b| - m),   m = sum over keys of both of  1 if equal,
                                                                      ratio if both are free text,  0 otherwise

Without free text this is plain Jaccard, the paper's second tier. `similarity` is the definition; `ToolIndex` finds the
nearest of a tool's entries by the same definition without visiting each of them in Python.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from rapidfuzz import fuzz, process

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


def similarity(a: Tokens, b: Tokens, soft: bool = True) -> float:
    """Soft Jaccard in [0, 1], plain Jaccard where `soft` is false; 1 for two calls without arguments."""
    if not a and not b:
        return 1.0
    # Ratios are added in the order of paths: a sum in another order may differ in its last bit, and break a tie.
    shared = sorted(a.keys() & b.keys())
    matched = float(sum(a[path] == b[path] for path in shared))
    for path in shared if soft else ():
        if a[path] != b[path] and _is_free_text(*a[path]) and _is_free_text(*b[path]):
            matched += fuzz.ratio(_sorted_words(a[path][1]), _sorted_words(b[path][1])) / 100.0
    return matched / (len(a) + len(b) - matched)


def _is_free_text(kind: str, text: str) -> bool:
    return kind == "str" and " " in text.strip()


def _sorted_words(text: str) -> str:
    return " ".join(sorted(text.split()))


class ToolIndex:
    """The entries of one tool, built once, asked often.

    Entries of equal arguments form a group g of G. Postings list the groups that hold a token, so exact matches are counted
    by one bincount. Ratios of free text are computed only for groups that could still win, longest possible match first.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        # In the order that breaks ties, so that the first of the best is the answer.
        self._entries = sorted(entries, key=lambda e: (-e.count, e.hash))
        groups: dict[str, int] = {}
        self._first: list[int] = []  # by group: index of its best entry
        of_writes: dict[str, dict[int, int]] = {}  # writes -> group -> index of its best entry after these writes
        postings: dict[tuple[str, tuple[str, str]], list[int]] = {}
        sizes: list[int] = []
        for index, entry in enumerate(self._entries):
            group = groups.setdefault(entry.arguments, len(groups))
            if group == len(self._first):
                self._first.append(index)
                found = tokens(entry.arguments)
                sizes.append(len(found))
                for token in found.items():
                    postings.setdefault(token, []).append(group)
            of_writes.setdefault(entry.writes, {}).setdefault(group, index)
        self._sizes_G = np.array(sizes, np.float64)
        self._of_writes = {w: (np.array([*best]), [*best.values()]) for w, best in of_writes.items()}
        self._postings = {token: np.array(holders, np.int32) for token, holders in postings.items()}
        texts: dict[str, dict[str, np.ndarray]] = {}
        for (path, value), holders in self._postings.items():
            if _is_free_text(*value):
                texts.setdefault(path, {})[value[1]] = holders
        self._free_text = {path: _FreeText(held, len(sizes)) for path, held in texts.items()}

    def nearest(self, asked: Tokens, writes: str, soft: bool = True) -> tuple[Entry | None, float]:
        """The entry most similar to the asked call and its similarity; (None, 0.0) where nothing is stored.

        Ties go to an entry recorded after the same writes as the asked call, then to the more frequent, then to the smaller
        hash: the answer depends on content alone.
        """
        if not self._entries:
            return None, 0.0
        score_G = self._scores(asked, soft)
        group = int(np.argmax(score_G))  # the first of the best
        best = float(score_G[group])
        index = self._first[group]
        if self._entries[index].writes != writes and writes in self._of_writes:
            groups, indices = self._of_writes[writes]
            as_good = np.flatnonzero(score_G[groups] == best)
            index = indices[as_good[0]] if len(as_good) else index
        return self._entries[index], best

    def _scores(self, asked: Tokens, soft: bool) -> np.ndarray:
        """Similarity of each group, exact for every group that reaches the maximum and too low for others."""
        total_G = self._sizes_G + len(asked)
        holders = [self._postings[token] for token in asked.items() if token in self._postings]
        matched_G = np.bincount(np.concatenate(holders), minlength=len(total_G)) if holders else np.zeros(len(total_G))
        matched_G = matched_G.astype(np.float64)
        score_G = _jaccard(matched_G, total_G)
        paths = [path for path in sorted(asked) if soft and path in self._free_text and _is_free_text(*asked[path])]
        if not paths:
            return score_G
        texts = [_AskedText(self._free_text[path], asked[path][1]) for path in paths]
        most_G = matched_G + sum(text.bounds() for text in texts)
        bound_G = _jaccard(most_G, total_G) + 1e-9  # bounds and scores are rounded differently
        open_G = np.flatnonzero((most_G > matched_G) & (bound_G >= score_G.max()))
        open_G = open_G[np.argsort(-bound_G[open_G], kind="stable")]
        start, size = 0, 64
        while start < len(open_G) and bound_G[open_G[start]] >= score_G.max():
            chunk = open_G[start : start + size]
            matched = matched_G[chunk]
            for text in texts:
                matched += text.ratios(chunk)
            score_G[chunk] = _jaccard(matched, total_G[chunk])
            start, size = start + size, size * 8
        return score_G


class _FreeText:
    """The free texts stored at one path: T distinct ones, and which group holds which."""

    def __init__(self, holders: Mapping[str, np.ndarray], groups: int) -> None:
        self.number = {text: i for i, text in enumerate(holders)}
        self.sorted_words = [_sorted_words(text) for text in holders]
        self.length_T = np.array([len(text) for text in self.sorted_words], np.float64)
        self.groups = groups
        self._held_by = np.concatenate([*holders.values()])
        self._holds = np.repeat(np.arange(len(holders), dtype=np.int32), [len(h) for h in holders.values()])

    def column(self) -> np.ndarray:
        """By group, the number of its text; T where it has none."""
        text_G = np.full(self.groups, len(self.sorted_words), np.int32)
        text_G[self._held_by] = self._holds
        return text_G


class _AskedText:
    """One asked text against those stored at its path. Ratios are computed when a group needs them, and once."""

    def __init__(self, stored: _FreeText, text: str) -> None:
        self._stored, self._words, self._text_G = stored, _sorted_words(text), stored.column()
        # The last place is for groups without a text. The asked text itself was counted among the exact matches.
        self._same = [len(stored.sorted_words), *([stored.number[text]] if text in stored.number else ())]
        self._ratio_T = np.full(len(stored.sorted_words) + 1, np.nan)
        self._ratio_T[self._same] = 0.0

    def bounds(self) -> np.ndarray:
        """By group, the ratio that the lengths alone allow."""
        length = len(self._words)
        bound_T = np.append(2 * np.minimum(self._stored.length_T, length) / (self._stored.length_T + length), 0.0)
        bound_T[self._same] = 0.0
        return bound_T[self._text_G]

    def ratios(self, groups: np.ndarray) -> np.ndarray:
        """The ratio of each of `groups`, in [0, 1]."""
        texts = self._text_G[groups]
        needed = np.unique(texts[np.isnan(self._ratio_T[texts])])
        if len(needed):
            choices = [self._stored.sorted_words[i] for i in needed.tolist()]
            found = process.cdist([self._words], choices, scorer=fuzz.ratio, dtype=np.float64)
            self._ratio_T[needed] = found[0] / 100.0
        return self._ratio_T[texts]


def _jaccard(matched: np.ndarray, total: np.ndarray) -> np.ndarray:
    union = total - matched
    return np.divide(matched, union, out=np.ones_like(matched), where=union > 0)
