"""Which episodes are learnt from, and how they are mixed with what was recorded. Episodes come from the real loop."""

import dataclasses
import random
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from cacherl_jax.config import Config, MixConfig, RejectionConfig, RolloutConfig, with_overrides
from cacherl_jax.rollout.agent_loop import CallTools, Episode, Inject
from cacherl_jax.stages import iterate
from cacherl_jax.text import chat
from cacherl_jax.text.tokenizer import train_tokenizer
from cacherl_jax.trajectories import rejection
from cacherl_jax.types import Kind, Message, Observation, Task, Tier, ToolCall, ToolResult, ToolSpec

SPECS = {name: ToolSpec(name, "", {"type": "object", "properties": {"q": {}}}) for name in ("find", "list")}
TOK = train_tokenizer(["Find it. I look. Found it here at last, 17."] * 3, chat.template_runs([*SPECS.values()]), 420)
TASK = Task("t", "f", "train", ("find", "list"), (Message("user", "Find it."),), ((ToolCall.of("find", q=1),),), ("17",))
LOOP = RolloutConfig(context=2048, max_turns=5, max_turn_tokens=1000, max_sampled_tokens=1500, max_tool_tokens=12)
FIND, LIST = ("I look.\n</think>\n\n" + chat.CALL_OPEN + f'{n}", "arguments": {{"q": 1}}' + chat.CALL_CLOSE for n in SPECS)
ANSWER = "\n</think>\n\nFound it: 17."


def play(*turns, task=TASK, sample=0, fidelity=1.0, result="17", encode=TOK.encode):
    """The episode of a policy that says `turns`, every call answered by `result`."""
    episode = Episode(TOK, SPECS, task, sample, LOOP, chat.opening(TOK, task.messages, [*SPECS.values()]))
    step = episode.start()
    for text in turns:
        assert isinstance(step, Inject)
        ids = encode(text + "<|im_end|>")
        step = episode.on_turn(ids, [-1.0] * len(ids), [-1.0] * len(ids))
        if isinstance(step, CallTools):
            served = (Observation(c, ToolResult(result), Tier.EXACT, Kind.RECORDED, fidelity=fidelity) for _, c in step.calls)
            step = episode.on_answers([*served])
    return episode.trajectory()


def right(task, trajectory):
    return float(list(trajectory.calls) == list(task.references[0]))


def facts(task, trajectory):
    return float(all(fact in trajectory.answer for fact in task.facts))


@pytest.mark.parametrize(
    ("said", "trajectory"),
    [
        ("accepted", play(FIND, ANSWER)),
        ("accepted", play(FIND, ANSWER, fidelity=0.5)),
        ("no_answer", play(FIND, FIND, FIND, FIND, FIND)),
        ("no_answer", play(FIND, "\n</think>\n\n")),
        ("reasoning_leaked", play(FIND, "\n</think>\n\nFound </think> it: 17.")),
        ("malformed", play("I look.\n</think>\n\n<tool_call>\nfind\n</tool_call>", FIND, ANSWER)),
        ("malformed", play("I look", FIND, ANSWER)),
        ("unfaithful", play(FIND, ANSWER, fidelity=0.49)),
        ("wrong_calls", play(LIST, ANSWER)),
        ("wrong_calls", play(FIND, FIND, ANSWER)),
        ("wrong_answer", play(FIND, "\n</think>\n\nFound it: 71.")),
    ],
)
def test_an_episode_is_accepted_or_the_first_reason_against_it_is_named(said, trajectory):
    assert rejection.verdict(TASK, trajectory, right, facts, RejectionConfig()) == said


def test_a_judge_decides_alone_and_is_asked_only_where_nothing_else_speaks_against_an_episode():
    asked = []

    def judge(task, trajectory):
        asked.append(trajectory.answer)
        return 0.8 if "17" in trajectory.answer else 0.6

    rules = RejectionConfig(least_answer=0.8)
    episodes = [play(LIST, ANSWER), play(LIST, "\n</think>\n\nNo."), play(FIND, ANSWER, fidelity=0.1), play(*[FIND] * 5)]
    assert [rejection.verdict(TASK, t, None, judge, rules) for t in episodes] == [
        "accepted", "wrong_answer", "unfaithful", "no_answer",
    ]  # fmt: skip
    assert asked == ["Found it: 17.", "No."]


def test_a_task_keeps_its_cheapest_episodes_of_different_tools_each_once():
    long, short = "\n</think>\n\nFound it here at last, here at last: 17.", ANSWER
    other = dataclasses.replace(TASK, id="u")
    played = [
        play(FIND, FIND, short), play(FIND, long, sample=1), play(FIND, short, sample=2), play(FIND, short, sample=3),
        play(LIST, LIST, LIST, short, sample=4), play(FIND, "\n</think>\n\n71", sample=5),
    ]  # fmt: skip
    episodes = [*((TASK, t) for t in played), (other, play(FIND, short, task=other))]

    def kept(keep):
        accepted, counts = rejection.select(episodes, calls=None, answer=facts, rules=RejectionConfig(samples=6, keep=keep))
        assert sum(counts.values()) == len(episodes) and counts["accepted"] == len(accepted)
        return [(t.task_id, t.sample) for t in accepted], counts

    assert kept(1)[0] == [("t", 2), ("u", 0)]  # one call, few tokens
    order, counts = kept(3)
    assert order == [("t", 2), ("t", 0), ("t", 4), ("u", 0)]  # then other sequences of tools, before longer words
    assert (counts["duplicate"], counts["surplus"], counts["wrong_answer"]) == (1, 1, 1)
    assert kept(6)[0] == [("t", 2), ("t", 0), ("t", 4), ("t", 1), ("u", 0)]
    again = rejection.distinct([*played[2:4], play(FIND, short, task=other), played[0]])
    assert [(t.task_id, t.sample) for t in again] == [("t", 2), ("u", 0), ("t", 0)]


def test_an_accepted_episode_reads_as_a_recorded_one_and_is_rendered_to_its_own_ids():
    asked = dataclasses.replace(
        TASK, messages=(Message("system", "Be brief."), *TASK.messages), followups=("And list it.", "Again.")
    )
    both = FIND + "\n" + LIST.removeprefix("I look.\n</think>\n\n")
    trajectory = play(FIND, "\n</think>\n\nNot yet.", both, ANSWER, ANSWER, task=asked, result="found " * 40)
    transcript = rejection.as_transcript(TOK, asked, trajectory, "grpo")
    roles = "system user assistant tool assistant user assistant tool tool assistant user assistant"
    assert " ".join(m.role for m in transcript.messages) == roles
    assert [m.content for m in transcript.messages if m.role == "user"] == ["Find it.", "And list it.", "Again."]
    (read,) = {m.content for m in transcript.messages if m.role == "tool"}
    assert 0 < len(read) < 240 and ("found " * 40).startswith(read)  # what the policy read, not all that the tool said
    calls = [c for m in transcript.messages for c in m.tool_calls]
    assert calls == list(trajectory.calls) and transcript.messages[-1].content == trajectory.answer == "Found it: 17."
    ids, sampled, _ = chat.transcript_tokens(TOK, transcript, SPECS, LOOP.max_tool_tokens)
    assert np.array_equal(ids, trajectory.tokens_T) and np.array_equal(sampled, trajectory.sampled_T)
    # Sampled in other pieces than the tokenizer's: the text survives, the ids are the trajectory's alone.
    letters = play(FIND, ANSWER, encode=lambda text: [i for part in (text[:3], text[3:]) for i in TOK.encode(part)])
    text = rejection.as_transcript(TOK, TASK, letters, "grpo")
    assert text == rejection.as_transcript(TOK, TASK, play(FIND, ANSWER), "grpo")
    assert not np.array_equal(chat.transcript_tokens(TOK, text, SPECS, 12)[0], letters.tokens_T)
    with pytest.raises(ValueError, match="no message says 'find'"):
        rejection.as_transcript(TOK, TASK, play("\n</think>\n\n<tool_call>\nfind\n</tool_call>", ANSWER), "grpo")


def test_no_tool_falls_below_its_share_and_nothing_is_left_out_that_fits():
    draw = random.Random(0)
    for _ in range(100):
        recorded = Counter({name: draw.randint(0, 9) for name in "abcd"})
        accepted = [Counter(draw.choices("abcde", k=draw.randint(0, 4))) for _ in range(draw.randint(0, 8))]
        config = MixConfig(repeats=draw.randint(1, 3), tool_floor=draw.choice([0.0, 0.25, 0.5, 1.0]))
        chosen = rejection.mix(recorded, accepted, config)

        def holds(calls, recorded=recorded, floor=Fraction(config.tool_floor)):
            total, all_ = sum(recorded.values()), sum(calls.values())
            return all(Fraction(calls[n]) * total >= floor * recorded[n] * all_ for n in recorded)

        held = sum((accepted[i] for i in chosen), recorded.copy())
        times = Counter(chosen)
        assert holds(held) and max(times.values(), default=0) <= config.repeats and chosen == sorted(chosen)
        assert all(times[i] == config.repeats or not holds(held + calls) for i, calls in enumerate(accepted))
    # A policy that has unlearnt b: of 10 episodes 4 may enter beside 4 a and 4 b, or b would have less than a third.
    assert rejection.mix({"a": 4, "b": 4}, [{"a": 1}] * 10, MixConfig(tool_floor=2 / 3)) == [0, 1, 2, 3]
    assert rejection.mix({}, [{"a": 1}], MixConfig()) == [0] and rejection.mix({"a": 1}, [], MixConfig()) == []


def test_an_episode_too_long_to_train_on_makes_no_room_for_tools_of_others(monkeypatch, tmp_path):
    long = play(LIST, LIST, LIST, ANSWER + " It is." * 99)
    short = [play(FIND, ANSWER + "!" * n, sample=n) for n in range(1, 9)]
    recorded = [rejection.as_transcript(TOK, TASK, play(FIND, FIND, LIST, LIST, ANSWER), "x")]
    limit = max(len(t.tokens_T) for t in short)
    config = with_overrides(Config(), ["iterate.mix.tool_floor=0.5", f"sft.packed_length={limit}", "rollout.context=2048"])
    run = SimpleNamespace(config=config, out=tmp_path, require=lambda stage: {})
    monkeypatch.setattr(iterate.sft, "thought", lambda run: iter(recorded))
    monkeypatch.setattr(iterate.sft, "transcript_rows", lambda run, transcripts: ([], {"too_long": 0}))
    monkeypatch.setattr(iterate, "load_trajectories", lambda path: [long, *short])
    rows, facts = iterate._merged_rows(run, 1)
    assert len(long.tokens_T) > limit and len(rows) == facts["accepted_rows"] == 4 and facts["too_long"] == 1
    assert facts["calls"] == {"find": {"recorded": 2, "mixed": 6}, "list": {"recorded": 2, "mixed": 2}}


def test_calls_are_counted_and_their_entropy_is_that_of_their_shares():
    trajectory = play(FIND, LIST, FIND, ANSWER)
    calls = rejection.calls_of(trajectory)
    assert calls == {"find": 2, "list": 1} == rejection.calls_of(rejection.as_transcript(TOK, TASK, trajectory, "x"))
    share_K = np.array([2, 1]) / 3
    assert rejection.entropy(calls) == pytest.approx(-(share_K * np.log2(share_K)).sum())
    assert rejection.entropy({"find": 3, "list": 0}) == rejection.entropy({}) == 0
