"""Stored episodes played again: the same ids under the same tools, another course from the first observation that differs."""

import dataclasses
import json

import pytest

from cacherl_jax.cache.counterfactual import with_result, without_entry
from cacherl_jax.cache.lookup import CachedTools, record_transcript
from cacherl_jax.cache.store import MemoryStore
from cacherl_jax.config import CacheConfig, RolloutConfig
from cacherl_jax.rollout.agent_loop import CallTools, Episode
from cacherl_jax.rollout.fork import replay
from cacherl_jax.rollout.tool_calls import ToolCalls, make_calls
from cacherl_jax.text import chat
from cacherl_jax.text.tokenizer import train_tokenizer
from cacherl_jax.tools.functions import FunctionTools, tool
from cacherl_jax.trajectory import StopReason, Trajectory
from cacherl_jax.types import Message, Task, Tier, ToolCall, ToolResult, Transcript


@tool(reads="money", state=True)
def balance(accounts: dict) -> int:
    return accounts["a"]


@tool(reads="money", writes="money", state=True)
def pay(accounts: dict, amount: int) -> str:
    accounts["a"] -= amount
    return f"paid {amount}"


LIVE = FunctionTools([balance, pay], state=lambda: {"a": 100})
SPECS = LIVE.specs
TASK = Task("t", "f", "train", ("balance", "pay"), (Message("user", "Pay 10."),), ((),), followups=("And now?",))
TOK = train_tokenizer(["Pay 10. And now? I see. It is done. paid"] * 3, chat.template_runs(list(SPECS.values())), 420)
CONFIG = RolloutConfig(context=2048, max_turns=6, max_turn_tokens=300, max_sampled_tokens=900, max_tool_tokens=16)
END = "<|im_end|>"


def say(*calls, text="", thought="I see."):
    written = "\n".join(f'<tool_call>\n{{"name": "{c.name}", "arguments": {c.arguments}}}\n</tool_call>' for c in calls)
    return f"{thought}\n</think>\n\n{text}{written}{END}"


READ, PAY, PAY_MORE = ToolCall.of("balance"), ToolCall.of("pay", amount=10), ToolCall.of("pay", amount=1)
BAD = ToolCall.of("pay", amount="much")
ANSWER = say(text="It is done.")


def recorded(*steps):
    store = MemoryStore()
    for i, pairs in enumerate(steps):
        messages = [m for c, content in pairs for m in (Message("assistant", tool_calls=(c,)), Message("tool", content))]
        record_transcript(store, Transcript(str(i), "t", "a", TASK.tools, tuple(messages)), SPECS, "state")
    return store


# The balance is 100, later 90. Two recordings disagree on what a payment says: it is drawn.
LONG_TEXT = " so it is" * 20
STORE = recorded(
    [(READ, "100"), (PAY, f"paid 10{LONG_TEXT}"), (READ, "90")],
    [(PAY, f"paid ten{LONG_TEXT}"), (READ, "90")],
    [(PAY, f"paid ten{LONG_TEXT}"), (PAY, "paid 10 again"), (READ, "80")],
)
STRICT = CacheConfig(fuzzy_threshold=2.0, best_effort="off", on_miss="fail", fidelity="table")


def cached(store=STORE, **policy):
    return CachedTools(store, SPECS, dataclasses.replace(STRICT, **policy), seed=0)


def begin(config=CONFIG, task=TASK, tok=TOK, sample=0):
    return Episode(tok, SPECS, task, sample, config, chat.opening(tok, task.messages, [SPECS[n] for n in task.tools]))


def go_on(episode, step, turns, session):
    """Plays scripted turns from `step` on; the logprobs tell the turns apart."""
    while step is not None:
        ids = TOK.encode(turns[episode.turn])[: episode.budget]
        step = episode.on_turn(ids, [-0.5 - episode.turn] * len(ids), [-0.25] * len(ids))
        if isinstance(step, CallTools):
            step = episode.on_answers(make_calls(session, step.calls))
    return episode.trajectory(seconds=[(1.0, 0.0)] * episode.turn)


def play(turns, provider, config=CONFIG):
    episode = begin(config)
    made = go_on(episode, episode.start(), turns, provider.start(TASK, 0))
    return Trajectory.from_json(json.loads(json.dumps(made.to_json())))


LONG = [say(READ), say(PAY, READ), say(BAD, READ), ANSWER, say(READ), ANSWER]
STOPS = {
    "answer": (LONG, CONFIG),
    "turn_cap": (LONG, dataclasses.replace(CONFIG, max_turns=3)),
    "token_cap": (LONG, dataclasses.replace(CONFIG, max_sampled_tokens=40)),
    "context_full": (LONG, dataclasses.replace(CONFIG, context=130)),
    "turn_truncated": ([say(READ), say(PAY), say(text="word " * 400)], CONFIG),
    "void_turn": (["I wonder " * 60, say(READ), say()], dataclasses.replace(CONFIG, max_turn_tokens=100)),
    "tool_failure": ([say(READ), say(PAY, PAY_MORE, READ)], CONFIG),
}


def test_stops_are_all_there():
    assert STOPS.keys() == {reason.value for reason in StopReason}


@pytest.mark.parametrize("reason", STOPS)
def test_under_the_same_tools_the_ids_held_are_the_stored_ones(reason):
    turns, config = STOPS[reason]
    stored = play(turns, cached(), config)
    assert stored.stop.value == reason and stored.turns >= 2
    sampled = [s for s in stored.segments if s.source == "sampled"]
    for count in range(stored.turns + 1):
        episode, session = begin(config), cached().start(TASK, 0)
        step = replay(episode, session, stored, count)
        if count == stored.turns:
            assert step is None
        else:
            assert step.ids == stored.tokens_T[: sampled[count].start].tolist()
        made = go_on(episode, step, turns, session)
        assert made.digest() == stored.digest()
        assert made.info == {"replay": {"of": stored.digest(), "turns": count, "changed": None}}


def test_live_tools_are_asked_with_their_timeout():
    stored = play(LONG, LIVE)
    for count in range(stored.turns):
        episode, session, tools = begin(), LIVE.start(TASK, 0), ToolCalls(SPECS, 60.0)
        step = replay(episode, session, stored, count, tools=tools)
        assert go_on(episode, step, LONG, session).digest() == stored.digest()
    assert [o.result.content for o in stored.observations if o.call == READ] == ["100", "90", "90", "90"]


def entry_of(trajectory, call):
    return next(o.entry for o in trajectory.observations if o.call == call)


def test_one_entry_changed_takes_another_course_from_where_it_is_read():
    stored = play(LONG, cached())
    assert [o.call for o in stored.observations] == [READ, PAY, READ, BAD, READ, READ]
    last = entry_of(dataclasses.replace(stored, observations=stored.observations[2:]), READ)
    provider = cached(with_result(STORE, last, ToolResult("90 or so")))
    episode, session = begin(), provider.start(TASK, 0)
    step = replay(episode, session, stored, stored.turns)
    assert episode.info["replay"] == {"of": stored.digest(), "turns": 2, "changed": 2}
    same = next(s.start for s in stored.segments if s.observation == 2)
    assert step.ids[:same] == stored.tokens_T[:same].tolist()
    assert "90 or so" in TOK.decode(step.ids[same:]) and episode.turn == 2
    made = go_on(episode, step, [*LONG[:2], ANSWER, ANSWER], session)
    assert (made.stop, made.turns) == (StopReason.ANSWER, 4)
    assert [o.result for o in made.observations[:2]] == [o.result for o in stored.observations[:2]]


def test_without_an_entry_the_miss_is_what_the_agent_reads_or_what_ends_it():
    stored = play(LONG, cached())
    less = without_entry(STORE, entry_of(stored, READ))
    episode = begin()
    step = replay(episode, cached(less, on_miss="error").start(TASK, 0), stored, stored.turns)
    assert '{"error": "cache' in TOK.decode(step.ids) and episode.info["replay"]["changed"] == 0 and episode.turn == 1
    episode = begin()
    assert replay(episode, cached(less).start(TASK, 0), stored, stored.turns) is None
    assert episode.trajectory().stop is StopReason.TOOL_FAILURE and episode.info["replay"]["changed"] == 0


def test_a_tier_or_threshold_changes_by_configuration():
    turns = [say(READ), say(PAY, PAY_MORE), ANSWER, ANSWER]
    strict = play(turns, cached(on_miss="error"))
    assert [o.tier for o in strict.observations] == [Tier.EXACT, Tier.EXACT, Tier.MISS]
    episode, session = begin(), cached(fuzzy_threshold=0.0).start(TASK, 0)
    step = replay(episode, session, strict, strict.turns)
    made = go_on(episode, step, turns, session)
    assert made.info["replay"]["changed"] == 2 and made.observations[2].tier is Tier.FUZZY
    # What reads the same is no change, however it is now trusted.
    episode = begin()
    assert replay(episode, cached(on_miss="error", fidelity_exact=0.5).start(TASK, 0), strict, strict.turns) is None
    made = episode.trajectory()
    assert made.info["replay"]["changed"] is None and made.tokens_T.tolist() == strict.tokens_T.tolist()
    assert [o.fidelity for o in made.observations] == [0.5, 0.5, 0.0]


def test_an_episode_that_met_a_limit_goes_on_under_a_higher_one():
    turns, config = STOPS["turn_cap"]
    stored = play(turns, cached(), config)
    episode, session = begin(), cached().start(TASK, 0)
    step = replay(episode, session, stored, stored.turns)
    assert step.ids[: len(stored.tokens_T)] == stored.tokens_T.tolist() and len(step.ids) > len(stored.tokens_T)
    assert go_on(episode, step, LONG, session).digest() == play(LONG, cached()).digest()


def test_what_cannot_be_replayed_is_refused():
    stored = play(LONG, cached())

    def attempt(turns=2, trajectory=stored, **options):
        return replay(begin(**options), cached().start(TASK, 0), trajectory, turns)

    with pytest.raises(ValueError, match="sample 0 of task t cannot be replayed in task u"):
        attempt(task=dataclasses.replace(TASK, id="u"))
    for turns in (-1, 7):
        with pytest.raises(ValueError, match=f"has 6 turns; {turns} cannot"):
            attempt(turns)
    other = train_tokenizer(["another text"] * 3, chat.template_runs(list(SPECS.values())), 400)
    with pytest.raises(ValueError, match=r"ids differ at position \d+ \(\d+ stored, \d+ now\); .* another tokenizer"):
        attempt(tok=other)
    first, read = next((s.start, stored.observations[1].shown) for s in stored.segments if s.observation == 1)
    assert read == len(TOK.decode(TOK.encode(stored.observations[1].result.content)[: CONFIG.max_tool_tokens]))
    with pytest.raises(ValueError, match=f"ids differ at position {first + 1 + 4} "):  # after the opening, and what is still read
        attempt(config=dataclasses.replace(CONFIG, max_tool_tokens=4))
    with pytest.raises(ValueError, match=r"turn 1 of .* has 13 tokens; the limits of this run allow 10"):
        attempt(config=dataclasses.replace(CONFIG, max_turn_tokens=10))
