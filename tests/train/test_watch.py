"""What is watched: lengths of thoughts as a reader would count them, and warnings at the stated thresholds."""

import numpy as np
import pytest

from cacherl_jax.config import WatchConfig
from cacherl_jax.text.tokenizer import Tokenizer, train_tokenizer
from cacherl_jax.train import watch
from cacherl_jax.trajectory import Segment, Source, StopReason, Trajectory


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train_tokenizer(["a few words to learn from"], ["\n</think>\n\n"], 300)


def episode(tok, *turns):
    """Of sampled turns, each after an injected opening."""
    tokens, segments = [], []
    for turn in turns:
        for source, text in ((Source.TEMPLATE, "<think>\n"), (Source.SAMPLED, turn)):
            ids = tok.encode(text)
            segments.append(Segment(len(tokens), len(tokens) + len(ids), source))
            tokens += ids
    none = np.zeros(len(tokens), np.float32)
    return Trajectory(
        "t", 0, np.array(tokens, np.int32), none > 0, none, none, tuple(segments), (), "", StopReason.ANSWER, len(turns)
    )


def test_lengths_count_what_stands_before_the_thinking_block_closes(tok):
    closing = watch.closing_ids(tok)
    assert len(closing) == 2  # the marker, and the run that holds it
    thought, rest = (len(tok.encode(text)) for text in ("why", "done"))
    two, one = episode(tok, "why\n</think>\n\ndone", "</think>done"), episode(tok, "why")  # the last was cut
    counted = [thought + 1 + rest, 1 + rest, thought]
    assert watch.lengths([two, one], closing) == pytest.approx(
        {
            "sampled_per_turn": sum(counted) / 3,
            "sampled_per_episode": sum(counted) / 2,
            "think_per_turn": 2 * thought / 3,
            "think_per_episode": thought,
            "cut_thoughts": 1 / 3,
        }
    )
    assert not any(watch.lengths([], closing).values())


@pytest.mark.parametrize(
    ("entropy", "think", "words"),
    [(1.0, 20, []), (0.51, 39, []), (0.49, 20, ["entropy 0.49"]), (1.0, 41, ["41 tokens"]), (0.1, 9, ["entropy", "9 tokens"])],
)
def test_warnings_compare_with_the_runs_first_steps(entropy, think, words):
    def row(entropy, think):
        return {"entropy": entropy, "lengths": {"think_per_turn": think}}

    config = WatchConfig(steps=2, entropy=0.5, think=2.0)
    without_update = {"lengths": {"think_per_turn": 20}}
    first = [row(0.8, 10), row(1.2, 30)]
    found = watch.warnings([*first, row(0.01, 1)], row(entropy, think), config)
    assert len(found) == len(words) and all(word in text for word, text in zip(words, found, strict=True))
    assert watch.warnings(first[:1], row(entropy, think), config) == []
    assert watch.warnings(first, without_update, config) == []
