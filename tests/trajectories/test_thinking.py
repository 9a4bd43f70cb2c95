"""Reasoning is added, nothing else changes, and nobody knows the future."""

import asyncio
import dataclasses
import json

import pytest

from cacherl_jax.config import ConfigError, TeacherConfig
from cacherl_jax.tools.record import record
from cacherl_jax.tools.world import LiveTools, make_tasks, tool_specs
from cacherl_jax.trajectories.checks import check_unchanged, leaks, problem
from cacherl_jax.trajectories.teacher import Answer, ScriptedTeacher
from cacherl_jax.trajectories.thinking import ThinkingReport, add_thinking
from cacherl_jax.trajectories.transcripts import read_transcripts, write_transcripts
from cacherl_jax.types import Message, ToolCall, Transcript

CALL = ToolCall("get_order", '{"order_id":  "o417"}')  # odd spacing must survive
TRANSCRIPT = Transcript(
    "x", "t", "a", ("get_order",),
    (
        Message("user", "Where is o417?"),
        Message("assistant", "I need the order first.", tool_calls=(CALL,)),
        Message("tool", '{"status": "shipped"}', error=None),
        Message("assistant", "Let me check again for you.", tool_calls=(CALL,)),
        Message("tool", "gone", error="not_found"),
        Message("assistant", "I need to say that it was shipped."),
    ),
)  # fmt: skip


def think(transcript, teacher, **fields):
    """The transcript with reasoning, the rows of its provenance, and the counts."""
    report = ThinkingReport()
    thought, rows = asyncio.run(add_thinking(transcript, teacher, TeacherConfig(**fields), report.add))
    return thought, rows, report.to_json()


def test_analysis_is_wrapped_speech_gets_reasoning_and_the_end_is_always_written():
    thought, rows, counts = think(TRANSCRIPT, ScriptedTeacher(tool_specs()))
    first, second, final = (m for m in thought.messages if m.role == "assistant")
    assert (first.reasoning, first.content) == ("I need the order first.", "")
    assert second.content == "Let me check again for you." and "get_order" in second.reasoning
    assert final.content == TRANSCRIPT.messages[-1].content and final.reasoning
    assert counts == {"messages": 3, "kept": 0, "wrapped": 1, "written": 2, "empty": 0, "rejected": {}}
    assert [(row["message"], row["how"]) for row in rows] == [(1, "wrapped"), (3, "written"), (5, "written")]
    assert {(row["transcript"], row["teacher"]) for row in rows} == {("x", "scripted")}
    assert [m.tool_calls for m in thought.messages] == [m.tool_calls for m in TRANSCRIPT.messages]
    assert [m for m in thought.messages if m.role != "assistant"] == [m for m in TRANSCRIPT.messages if m.role != "assistant"]
    again, _, counts = think(thought, ScriptedTeacher({}))
    assert again == thought and counts["kept"] == 3


class Clairvoyant(ScriptedTeacher):
    draws = True

    async def write(self, past, message, attempt=0):
        return Answer("It will say shipped." if attempt < 2 else "I ask the tool.", prompt_tokens=10, completion_tokens=1)


def test_a_teacher_that_knows_the_future_is_refused_and_asked_again():
    silent = Message("assistant", tool_calls=(CALL,))
    early = dataclasses.replace(TRANSCRIPT, messages=(TRANSCRIPT.messages[0], silent, *TRANSCRIPT.messages[2:]))
    thought, rows, counts = think(early, Clairvoyant({}), attempts=2)
    assert (counts["empty"], counts["rejected"]) == (1, {"leak": 2}) and thought.messages[1].reasoning == ""
    assert "shipped" in thought.messages[-1].reasoning  # known by then
    assert rows[0]["rejected"] == ["leak", "leak"] and (rows[0]["prompt_tokens"], rows[0]["completion_tokens"]) == (20, 2)
    thought, _, counts = think(early, Clairvoyant({}), attempts=3)
    assert (counts["empty"], counts["rejected"]) == (0, {"leak": 2}) and thought.messages[1].reasoning == "I ask the tool."
    future = [Message("tool", '{"rows": [{"n": 417}]}')]
    assert leaks("It is 417.", [], Message("assistant"), future) and not leaks("It is 41.", [], Message("assistant"), future)


def test_a_text_that_is_no_json_leaks_by_names_and_numbers_not_by_its_language():
    future = [Message("tool", "The user can try Oslo with 3 tools, see a-17.\nNext: use What is there")]
    for said, leaking in [("I go to Oslo", 1), ("it is 3", 1), ("take A-17", 1), ("Next the user can try what is there", 0)]:
        assert leaks(said, [], Message("assistant"), future) == bool(leaking), said


def test_values_leak_out_of_texts_in_json_and_in_other_spellings():
    future = [Message("tool", '{"note": "Your code is XK-42, the bus leaves from Oslo.", "price": 1250.50, "seats": [1200,7.0]}')]
    for said, leaking in [
        ("the code XK-42", 1), ("I go to Oslo", 1), ("it costs $1,250.5", 1), ("1,200 seats", 1), ("row 7", 1),
        ("your code is the bus", 0), ("12 or 50", 0),
    ]:  # fmt: skip
        assert leaks(said, [], Message("assistant"), future) == bool(leaking), said
    past = [Message("user", "Is it 1,250.50 or [7,200]? And 1200.0?")]
    assert not leaks("1250.5 and 7 of 1,200", past, Message("assistant"), future)
    assert not leaks("200 it is", past, Message("assistant"), [Message("tool", "[200]")])


ANSWER = "Your order o417 was shipped on Monday, and it will be with you by the end of this week."


@pytest.mark.parametrize(
    ("reasoning", "found"),
    [
        ("I ask the tool now.", ""),
        ("  ", "empty"),
        ("Now.", "short"),
        ("so " * 9, "long"),
        ("I answer.</think> Hello", "marks"),
        ("<|im_end|> I answer.", "marks"),
        ("It is gone.", "leak"),
        ("I say: " + ANSWER, "repeated"),
        ("Short and good.", "repeated"),
        ("it was shipped on Monday, and it will be with you", ""),  # eleven words in a row
    ],
)
def test_what_is_wrong_with_reasoning(reasoning, found):
    told = reasoning if reasoning.startswith("Short") else ANSWER  # the same, to the word
    messages = [Message("user", "Where is o417?"), Message("assistant", told), Message("tool", "gone"), Message("tool", '"gone"')]
    most = 8 if found == "long" else 60
    assert problem(reasoning, messages, 1, TeacherConfig(min_words=2, max_words=most)) == found


def test_reasoning_inside_the_text_is_taken_apart_or_reported():
    def one(content):
        messages = (Message("user", "Hi"), Message("assistant", content))
        thought, _, counts = think(dataclasses.replace(TRANSCRIPT, messages=messages), ScriptedTeacher({}))
        return thought.messages[1].reasoning, thought.messages[1].content, counts["kept"], counts["rejected"]

    assert one("<think>\nA greeting.\n</think>\n\nHello!") == ("A greeting.", "Hello!", 1, {})
    assert one("A greeting.</think>Hello!") == ("A greeting.", "Hello!", 1, {})
    reasoning, *rest = one("<think>\n\n</think>\n\nHello!")  # of a model that does not think: its reasoning is written
    assert reasoning and rest == ["Hello!", 0, {}]
    assert one("Hello <think> A greeting.") == ("", "Hello <think> A greeting.", 0, {"marked_text": 1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "http", "model": "m"}, "teacher.base_url is empty"),
        ({"kind": "policy"}, "teacher.policy is empty"),
        ({"min_words": 9, "max_words": 8}, "min_words=9 is above"),
        ({"budget_money": 1.0}, "limits nothing"),
    ],
)
def test_teachers_that_cannot_be_asked_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        TeacherConfig(**fields)


def test_what_ends_a_turn_is_for_the_user_however_it_sounds():
    told = Message("assistant", "Next Tuesday at 8 pm there is a game.")
    messages = (Message("user", "Any game?"), told, Message("user", "Thanks."), Message("assistant", "Now goodbye."))
    thought, _, _ = think(dataclasses.replace(TRANSCRIPT, messages=messages), ScriptedTeacher({}))
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
    thought, _, _ = think(transcript, ScriptedTeacher({}))
    assert "get_order" in thought.messages[1].reasoning and thought.messages[1].tool_calls == broken.tool_calls


def test_every_world_transcript_keeps_calls_and_results():
    specs, teacher, written = tool_specs(), ScriptedTeacher(tool_specs()), 0
    agents = ["expert", "stopper", "wanderer"]
    for transcript in record(make_tasks("train", 150, 0), agents, LiveTools("train", 0), specs, 0):
        thought, _, counts = think(transcript, teacher)
        assert not counts["rejected"]
        written += counts["written"]
        for before, after in zip(transcript.messages, thought.messages, strict=True):
            assert before.to_json() == {k: v for k, v in after.to_json().items() if k != "reasoning_content"}
    assert written > 1000


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
