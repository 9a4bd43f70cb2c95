"""Reasoning is added, nothing else changes, and nobody knows the future."""

import dataclasses
import json

import pytest

from cacherl_jax.tools.record import record
from cacherl_jax.tools.world import LiveTools, make_tasks, tool_specs
from cacherl_jax.trajectories.teacher import ScriptedTeacher
from cacherl_jax.trajectories.thinking import ThinkingReport, add_thinking, check_unchanged, leaks
from cacherl_jax.trajectories.transcripts import read_transcripts, write_transcripts
from cacherl_jax.types import Message, ToolCall, Transcript

CALL = ToolCall("get_order", '{"order_id":  "o417"}')  # odd spacing must survive
TRANSCRIPT = Transcript(
    "x", "t", "a", ("get_order",),
    (
        Message("user", "Where is o417?"),
        Message("assistant", "I need the order first.", tool_calls=(CALL,)),
        Message("tool", '{"status": "shipped"}', error=None),
        Message("assistant", "Let me check again.", tool_calls=(CALL,)),
        Message("tool", "gone", error="not_found"),
        Message("assistant", "I need to say that it was shipped."),
    ),
)  # fmt: skip


def test_analysis_is_wrapped_speech_gets_reasoning_and_the_end_is_always_written():
    report = ThinkingReport()
    thought = add_thinking(TRANSCRIPT, ScriptedTeacher(tool_specs()), report)
    first, second, final = (m for m in thought.messages if m.role == "assistant")
    assert (first.reasoning, first.content) == ("I need the order first.", "")
    assert second.content == "Let me check again." and "get_order" in second.reasoning
    assert final.content == TRANSCRIPT.messages[-1].content and final.reasoning
    assert report == ThinkingReport(wrapped=1, written=2)
    assert [m.tool_calls for m in thought.messages] == [m.tool_calls for m in TRANSCRIPT.messages]
    assert [m for m in thought.messages if m.role != "assistant"] == [m for m in TRANSCRIPT.messages if m.role != "assistant"]
    assert add_thinking(thought, ScriptedTeacher({}), report) == thought and report.kept == 3


class Clairvoyant(ScriptedTeacher):
    def write(self, past, message):
        return "It will say shipped."


def test_a_teacher_that_knows_the_future_is_refused():
    report = ThinkingReport()
    silent = Message("assistant", tool_calls=(CALL,))
    early = dataclasses.replace(TRANSCRIPT, messages=(TRANSCRIPT.messages[0], silent, *TRANSCRIPT.messages[2:]))
    thought = add_thinking(early, Clairvoyant({}), report)
    assert report.leaked == 1 and thought.messages[1].reasoning == ""
    assert "shipped" in thought.messages[-1].reasoning  # known by then
    future = [Message("tool", '{"rows": [{"n": 417}]}')]
    assert leaks("It is 417.", [], Message("assistant"), future) and not leaks("It is 41.", [], Message("assistant"), future)


def test_what_ends_a_turn_is_for_the_user_however_it_sounds():
    told = Message("assistant", "Next Tuesday at 8 pm there is a game.")
    messages = (Message("user", "Any game?"), told, Message("user", "Thanks."), Message("assistant", "Now goodbye."))
    thought = add_thinking(dataclasses.replace(TRANSCRIPT, messages=messages), ScriptedTeacher({}), ThinkingReport())
    assert [m.content for m in thought.messages] == [m.content for m in messages]


@pytest.mark.parametrize("value", ['"Blue Bottle"', "true", "12.50", '"10:30 am"'])
def test_a_value_of_several_words_or_another_type_leaks_as_well(value):
    future = [Message("tool", f'{{"x": {value}}}')]
    said = json.dumps(json.loads(value)).strip('"')
    assert leaks(f"It will be {said}.", [], Message("assistant"), future)
    assert not leaks(f"It will be {said}.", [Message("user", f"Say {said}!")], Message("assistant"), future)
    assert not leaks("It will be blue 12.", [], Message("assistant"), future)


def test_calls_that_are_no_json_are_thought_about_all_the_same():
    broken = Message("assistant", tool_calls=(ToolCall("get_order", '{"order_id": '),))
    transcript = dataclasses.replace(TRANSCRIPT, messages=(TRANSCRIPT.messages[0], broken, *TRANSCRIPT.messages[2:]))
    thought = add_thinking(transcript, ScriptedTeacher({}), ThinkingReport())
    assert "get_order" in thought.messages[1].reasoning and thought.messages[1].tool_calls == broken.tool_calls


def test_every_world_transcript_keeps_calls_and_results():
    specs, report = tool_specs(), ThinkingReport()
    agents = ["expert", "stopper", "wanderer"]
    for transcript in record(make_tasks("train", 150, 0), agents, LiveTools("train", 0), specs, 0):
        thought = add_thinking(transcript, ScriptedTeacher(specs), report)
        for before, after in zip(transcript.messages, thought.messages, strict=True):
            assert before.to_json() == {k: v for k, v in after.to_json().items() if k != "reasoning_content"}
    assert report.leaked == 0 and report.written > 1000


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_changed_call_result_or_request_is_found(index):
    message = TRANSCRIPT.messages[index]
    other = {"tool_calls": (ToolCall("get_order", '{"order_id": "o417"}'),)} if index == 1 else {"content": "x"}
    messages = list(TRANSCRIPT.messages)
    messages[index] = dataclasses.replace(message, **other)
    with pytest.raises(ValueError, match=f"message {index}"):
        check_unchanged(TRANSCRIPT, dataclasses.replace(TRANSCRIPT, messages=tuple(messages)))


def test_a_broken_line_costs_only_itself(tmp_path):
    path = tmp_path / "transcripts.jsonl"
    half = dataclasses.replace(TRANSCRIPT, messages=(Message("user", "half a pair: \ud800"), *TRANSCRIPT.messages[1:]))
    assert write_transcripts(path, [half]) == 1 and read_transcripts(path) == ([half], [])
    assert write_transcripts(path, [TRANSCRIPT, TRANSCRIPT]) == 2
    good = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([good[0], b'{"id": "half', b"\xff\xfe", b"[1]", b'{"id": 1}', b"", good[1]]))
    transcripts, problems = read_transcripts(path)
    assert transcripts == [TRANSCRIPT, TRANSCRIPT]
    assert [p.split(":")[1] for p in problems] == ["2", "3", "4", "5"] and all(str(path) in p for p in problems)
