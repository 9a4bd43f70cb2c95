"""Byte-level BPE in two readings of text: a template's, which knows control tokens, and content, which cannot forge them.

Added tokens are of two kinds. Control tokens are Qwen3's markers (<|im_end|>, <think>, <tool_call>, ...). Runs are stretches
of fixed text (a tool's definition, a call's opening) as one token each; only tokenizers trained here have them: they halve
the length of a small model's sequences. In content (what users, tools and models say) control tokens are plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CONTROL = (
    END_OF_TEXT, IM_START, IM_END, "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # fmt: skip

# Qwen's split: contractions, words with one leading character, single digits, punctuation with following newlines, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tokenizers.Tokenizer` in its two readings. Make one with `load` or `train_tokenizer`."""

    _inner: tokenizers.Tokenizer

    @cached_property
    def _controls(self) -> re.Pattern[str]:
        """Any token that content must not forge: Qwen's markers, <|...|> ones and those like <think>."""
        added = [t.content for t in self._inner.get_added_tokens_decoder().values()]
        marks = sorted((t for t in added if re.fullmatch(r"<\|\w+\|>|</?\w+>", t)), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, marks)))

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """From a folder with tokenizer.json. Raises FileNotFoundError naming it, ValueError if a control token is absent."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; a tokenizer folder holds tokenizer.json")
        inner = tokenizers.Tokenizer.from_file(str(path))
        for control in CONTROL:
            if inner.token_to_id(control) is None:
                raise ValueError(f"{path} has no token {control!r}; Qwen3's chat format needs it")
        return cls(inner)

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._inner.save(str(directory / "tokenizer.json"))

    def encode(self, text: str) -> list[int]:
        """Ids of template text: control tokens and runs are recognised."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_content(self, text: str) -> list[int]:
        """Ids of free text: "<|im_end|>" in it becomes plain characters, never the token."""
        return self.encode_parts([(text, True)])

    def encode_parts(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of (text, is_content) parts as one stretch of text, so that tokens form across the parts as in a rendering
        of the whole. Where content spells a control token, the text is cut inside that spelling and the pieces are
        encoded apart: they decode to the same characters, and no control token arises."""
        pieces = [""]
        for text, is_content in parts:
            if is_content and not text.isascii():
                # Halves of surrogate pairs, which JSON can smuggle in, join where they belong together or become U+FFFD.
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            cuts = [match.start() + 1 for match in self._controls.finditer(text)] if is_content else []
            first, *rest = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            pieces[-1] += first
            pieces += rest
        return [i for piece in pieces for i in self.encode(piece)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._inner.decode(list(ids), skip_special_tokens=False)

    def id(self, token: str) -> int:
        """The id of one token. Raises KeyError if there is no such token."""
        found = self._inner.token_to_id(token)
        if found is None:
            raise KeyError(f"the tokenizer has no token {token!r}")
        return found

    @cached_property
    def im_end(self) -> int:
        return self.id(IM_END)

    @property
    def stop_ids(self) -> tuple[int, int]:
        """What ends a sampled turn: <|im_end|>, and <|endoftext|>, as in Qwen3's generation_config."""
        return self.im_end, self.id(END_OF_TEXT)

    @property
    def vocab_size(self) -> int:
        return self._inner.get_vocab_size(with_added_tokens=True)


def train_tokenizer(texts: Iterable[str], runs: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` tokens, added ones included, learnt from `texts`; the same texts give the same ids.

    Raises ValueError when the 256 bytes, the control tokens and the runs alone exceed `vocab_size`, or when a run holds
    <|im_end|>: it is the stop token, so that nothing sampled may be merged with it.
    """
    runs = list(dict.fromkeys(runs))
    if bad := [run for run in runs if IM_END in run]:
        raise ValueError(f"run {bad[0]!r} holds {IM_END}, which must stay a token of its own")
    learnt = vocab_size - len(CONTROL) - len(runs)
    if learnt < 256:
        raise ValueError(f"vocab_size={vocab_size} leaves {learnt} tokens beside {len(runs)} runs; bytes alone need 256")
    tok = tokenizers.Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    # Runs never reach BPE: what it learns is the rest.
    trainer = trainers.BpeTrainer(vocab_size=learnt, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tok.train_from_iterator((piece for text in texts for piece in _without(text, runs)), trainer)
    tok.add_special_tokens([AddedToken(control, normalized=False, special=True) for control in CONTROL])
    tok.add_tokens([AddedToken(run, normalized=False) for run in runs])
    return Tokenizer(tok)


def _without(text: str, runs: Sequence[str]) -> list[str]:
    pieces = [text]
    for run in sorted(runs, key=len, reverse=True):
        if run in text:
            pieces = [part for piece in pieces for part in piece.split(run) if part]
    return pieces
