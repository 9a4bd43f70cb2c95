"""A user's own files: OpenAI's form, the form of Hermes and Qwen, and every way in which a record can be wrong."""

import gzip
import json

import pytest

from cacherl_jax.cache.imports import import_transcripts
from cacherl_jax.cache.store import SQLiteStore
from cacherl_jax.data import chats
from cacherl_jax.text import chat
from cacherl_jax.types import Message, ToolCall, ToolSpec, Transcript

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Tells it", "parameters": PARAMETERS}}
SPEC = ToolSpec("weather", "Tells it", PARAMETERS)


def openai_call(arguments='{"city": "Oslo"}', name="weather", id="c1"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def openai_record(**more):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Is it "}, {"type": "text", "text": "raining?"}]},
        {"role": "assistant", "content": None, "tool_calls": [openai_call()]},
        {"role": "tool", "tool_call_id": "c1", "content": "yes"},
        {"role": "assistant", "content": "It rains.", "reasoning_content": "The tool says so."},
    ]
    return {"messages": messages, "tools": [WEATHER], **more}


READ = (
    Message("user", "Is it raining?"),
    Message("assistant", tool_calls=(ToolCall("weather", '{"city": "Oslo"}', "c1"),)),
    Message("tool", "yes", tool_call_id="c1"),
    Message("assistant", "It rains.", reasoning="The tool says so."),
)


def write_lines(path, records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


@pytest.mark.parametrize("form", ["chats.jsonl", "chats.json", "chats.jsonl.gz", "chats.json.gz"])
def test_openais_form_in_lines_or_a_list_compressed_or_not(tmp_path, form):
    records = [openai_record(), openai_record(id=7, task_id="t", agent="gpt"), openai_record()["messages"]]
    text = json.dumps(records) if ".json." in f"{form}." else "\n".join(map(json.dumps, records))
    path = tmp_path / form
    path.write_bytes(gzip.compress(text.encode()) if form.endswith(".gz") else text.encode())
    for where in (path, tmp_path):
        corpus = chats.read_openai(where)
        first = 0 if ".json." in f"{form}." else 1
        assert list(corpus.transcripts()) == [
            Transcript(f"chats:{first}", f"chats:{first}", "openai", ("weather",), READ),
            Transcript("7", "t", "gpt", ("weather",), READ),
            Transcript(f"chats:{first + 2}", f"chats:{first + 2}", "openai", ("weather",), READ),
        ]
        assert corpus.specs == {"weather": SPEC} and corpus.problems == [] and corpus.licence == "not stated"


def test_the_older_form_and_our_own_transcripts_are_read(tmp_path):
    call = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    old = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "weather", "content": "yes"},
    ]
    own = Transcript("d1", "t1", "expert", ("weather", "idle"), READ)
    records = [{"messages": old, "functions": [WEATHER["function"]]}, own.to_json()]
    corpus = chats.read_openai(write_lines(tmp_path / "c.jsonl", records))
    older, ours = corpus.transcripts()
    assert [m.role for m in older.messages] == ["user", "assistant", "tool"] and older.messages[1].tool_calls[0].name == "weather"
    assert ours == own and corpus.problems == []
    assert corpus.specs == {"weather": SPEC, "idle": ToolSpec("idle", "", {"type": "object", "properties": {}})}


def with_message(**message):
    return openai_record(messages=[*openai_record()["messages"], message])


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ('{"messages": [{"role": "user", "con', "JSONDecodeError"),
        ("5", "TypeError a record is int, expected an object"),
        ({"conversations": []}, "KeyError 'messages'"),
        (openai_record(messages=None), "TypeError"),
        (openai_record(messages=[]), "ValueError the assistant says nothing"),
        (openai_record(messages=["hello"]), "AttributeError"),
        (openai_record(tools=5), "TypeError tools is int, expected a list"),
        (openai_record(tools="[{"), "JSONDecodeError"),
        (with_message(role="narrator", content="x"), "ValueError message of 'narrator', which is none of system"),
        (with_message(role="user", content=5), "TypeError content is int, expected text"),
        (with_message(role="user", content=[{"type": "image_url"}]), "ValueError content has parts that are no text: image_url"),
        (with_message(role="assistant", content="", tool_calls=[{"id": "x"}]), "ValueError tool call without a name"),
        ("[" * 100_000, "RecursionError"),
    ],
)
def test_a_record_that_cannot_be_read_costs_only_itself_and_is_named(tmp_path, record, reason):
    path = write_lines(tmp_path / "c.jsonl", [openai_record(), record, "", openai_record()])
    corpus = chats.read_openai(path)
    for _ in range(2):
        assert [t.id for t in corpus.transcripts()] == ["c:1", "c:4"]
        (problem,) = corpus.problems
        assert problem.startswith(f"c.jsonl, line 2: {reason}")


def test_definitions_that_are_wrong_absent_or_changed(tmp_path):
    changed = {"name": "weather", "description": "Otherwise", "parameters": PARAMETERS}
    unnamed = {"type": "function", "function": {"description": "?"}}
    undefined = openai_record()["messages"][:1] + [
        {"role": "assistant", "tool_calls": [openai_call('{"n": 3}', "roll")]},
        {"role": "tool", "tool_call_id": "c1", "content": "4"},
    ]
    records = [openai_record(tools=json.dumps([WEATHER, unnamed])), openai_record(tools=changed), {"messages": undefined}]
    corpus = chats.read_openai(write_lines(tmp_path / "c.jsonl", records))
    assert [t.tools for t in corpus.transcripts()] == [("weather",), ("weather",), ("roll",)]
    roll = ToolSpec("roll", "", {"type": "object", "properties": {"n": {"type": "integer"}}})
    assert corpus.specs == {"weather": SPEC, "roll": roll}
    assert [p.partition(": ")[::2] for p in corpus.problems] == [
        ("c.jsonl, line 1", f"a tool's definition without a name or with parameters that are no schema: {unnamed}"),
        ("c.jsonl, line 2", "tool weather is defined otherwise than before; the first definition holds"),
    ]


def test_arguments_that_are_no_json_and_odd_payloads_reach_the_store_as_they_are(tmp_path):
    contents = ["x" * 10_000_000, "\ud83d", '{"a": NaN, "a": 1}', "[" * 100_000, "\x00\x01", "</tool_response><|im_end|>"]
    records = [openai_record() for _ in contents]
    for record, content in zip(records, contents, strict=True):
        record["messages"][2]["content"] = content
    records[0]["messages"][1]["tool_calls"] = [openai_call('{"city": ')]
    corpus = chats.read_openai(write_lines(tmp_path / "c.jsonl", records))
    with SQLiteStore(tmp_path / "s", mode="rw") as store:
        counted = import_transcripts(store, corpus.transcripts(), corpus.specs, "canonical")
        assert counted == {"calls": 6, "distinct": 2, "conflicting": 1, "hits_while_filling": 4} and corpus.problems == []
        assert [e.result.content for e in store.entries()] == contents


def test_a_line_that_is_no_utf8_is_named(tmp_path):
    good = json.dumps(openai_record()).encode()
    (tmp_path / "c.jsonl").write_bytes(good + b"\n" + good.replace(b"Oslo", b"\xff") + b"\n" + good)
    corpus = chats.read_openai(tmp_path / "c.jsonl")
    assert [t.id for t in corpus.transcripts()] == ["c:1", "c:3"]
    assert corpus.problems[0].startswith("c.jsonl, line 2: UnicodeDecodeError") and len(corpus.problems) == 1


# ---- Hermes and Qwen -------------------------------------------------------------------------------------------------

HERMES_SYSTEM = f"You call functions. They are in <tools></tools> tags: <tools>\n{json.dumps([WEATHER])}\n</tools> Call them so."
CALLS = (
    "Two calls.\n<tool_call>\n{'arguments': {'city': \"Oslo\"}, 'name': 'weather'}\n</tool_call>\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Bergen"}}\n</tool_call>'
)
RESULTS = '<tool_response>\n{"rain": true}\n</tool_response>\n<tool_response>\nno\n</tool_response>'
HERMES_READ = (
    Message("user", "Is it raining?"),
    Message(
        "assistant", "Two calls.", tool_calls=(ToolCall("weather", '{"city": "Oslo"}'), ToolCall("weather", '{"city": "Bergen"}'))
    ),
    Message("tool", '{"rain": true}'),
    Message("tool", "no"),
    Message("assistant", "It rains in Oslo.", reasoning="The first says so."),
)
ANSWER = "<think>\nThe first says so.\n</think>\n\nIt rains in Oslo."


def turns(*pairs, names=("from", "value")):
    return [dict(zip(names, pair, strict=True)) for pair in pairs]


def test_conversations_of_hermes_and_messages_of_qwen_are_the_same(tmp_path):
    said = [("human", "Is it raining?"), ("gpt", CALLS), ("tool", RESULTS), ("gpt", ANSWER)]
    as_qwen = [("user", "Is it raining?"), ("assistant", CALLS), ("user", RESULTS), ("assistant", ANSWER)]
    head = chat.render_official([Message("system", "Be brief.")], [SPEC], thinking_model=False, add_generation_prompt=False)
    qwen_system = head.removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n")
    records = [
        {"id": "h", "conversations": turns(("system", HERMES_SYSTEM), *said)},
        {"id": "q", "messages": turns(("system", qwen_system), *as_qwen, names=("role", "content"))},
        {"id": "n", "system": "Be brief.", "tools": json.dumps([WEATHER]), "conversations": turns(*said)},
    ]
    corpus = chats.read_hermes(write_lines(tmp_path / "c.jsonl", records))
    hermes, qwen, none = corpus.transcripts()
    assert corpus.problems == [] and corpus.specs == {"weather": SPEC}
    assert hermes.messages == (Message("system", HERMES_SYSTEM), *HERMES_READ)
    assert qwen.messages == none.messages == (Message("system", "Be brief."), *HERMES_READ)
    assert {t.tools for t in (hermes, qwen, none)} == {("weather",)} and {t.agent for t in (hermes, qwen, none)} == {"hermes"}


def test_a_call_alone_under_its_own_name(tmp_path):
    said = turns(
        ("human", "?"),
        ("function_call", '{"name": "weather", "arguments": {"city": "Oslo"}}'),
        ("observation", "yes"),
        ("gpt", "Yes."),
    )
    (transcript,) = chats.read_hermes(write_lines(tmp_path / "c.jsonl", [{"conversations": said}])).transcripts()
    assert transcript.messages == (
        Message("user", "?"), Message("assistant", tool_calls=(ToolCall("weather", '{"city": "Oslo"}'),)),
        Message("tool", "yes"), Message("assistant", "Yes."),
    )  # fmt: skip


def test_a_malformed_call_is_left_out_with_its_result(tmp_path):
    calls = '<tool_call>\n{"name": "weather", "arguments": {"city": }}\n</tool_call>\n' + CALLS.split("\n", 1)[1]
    results = f"<tool_response>\nerror\n</tool_response>\n{RESULTS}"
    said = turns(("human", "?"), ("gpt", calls), ("tool", results), ("gpt", "Yes."))
    corpus = chats.read_hermes(write_lines(tmp_path / "c.jsonl", [{"conversations": said}]))
    (transcript,) = corpus.transcripts()
    assert [c.parsed()["city"] for c in transcript.messages[1].tool_calls] == ["Oslo", "Bergen"]
    assert [m.content for m in transcript.messages[2:4]] == ['{"rain": true}', "no"]
    (problem,) = corpus.problems
    assert problem.startswith("c.jsonl, line 1: a call is left out: Expecting value")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"conversations": turns(("human", "?"), ("gpt", "<think>\nendless"))}, "ValueError a thinking block is not closed"),
        ({"conversations": turns(("gpt", None), ("bot", "x"))}, "ValueError message of 'bot'"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "TypeError content is int"),
        ({"chat": []}, "KeyError 'messages'"),
        ({"conversations": turns(("system", "<tools>{no}</tools>"), ("gpt", "x"))}, "JSONDecodeError"),
    ],
)
def test_a_record_of_hermes_that_cannot_be_read_is_named(tmp_path, record, reason):
    corpus = chats.read_hermes(write_lines(tmp_path / "c.jsonl", [record]))
    assert list(corpus.transcripts()) == []
    (problem,) = corpus.problems
    assert problem.startswith(f"c.jsonl, line 1: {reason}")
