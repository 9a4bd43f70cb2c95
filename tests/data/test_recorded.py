"""What all readers share: files in either form, ids, results in call order, definitions inferred from calls."""

import gzip
import json

import pytest

from cacherl_jax.config import ConfigError
from cacherl_jax.data import recorded
from cacherl_jax.data.recorded import Recorded, find, infer_specs, line_records, list_records, manifest, pair_results
from cacherl_jax.data.sources import SOURCES
from cacherl_jax.types import Effects, Message, ToolCall, Transcript


def convert(record, report):
    if record.get("note"):
        report(record["note"])
    return Transcript(record["id"], "t", "a", (), (Message("user", record["text"]),))


def corpus_of(files, records):
    return Recorded(tuple(files), {}, records, convert, "CC0", "somebody")


def test_reports_and_refusals_name_file_and_record_and_an_id_names_one_dialogue(tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    good = {"id": "x", "text": "hello"}
    one.write_text(json.dumps([good, {"id": "y"}, {**good, "note": "a call was left out"}]))
    two.write_text(json.dumps([good]))
    corpus = corpus_of((one, two), list_records("chat", "id"))
    for _ in range(2):  # problems and ids are those of one reading
        assert [t.id for t in corpus.transcripts()] == ["x", "x#2", "x#3"]
        assert corpus.problems == ["one.json, chat y: KeyError 'text'", "one.json, chat x: a call was left out"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_cut_file_of_lines_keeps_what_stands_before_the_cut(tmp_path, packed):
    lines = [json.dumps({"id": str(n), "text": "hello" * n}).encode() + b"\n" for n in range(300)]
    path = tmp_path / ("chats.jsonl.gz" if packed else "chats.jsonl")
    whole = gzip.compress(b"".join(lines)) if packed else b"".join(lines)
    path.write_bytes(whole[:-30])
    corpus = corpus_of((path,), line_records)
    corpus.convert = lambda line, report: convert(json.loads(line), report)
    read = [t.id for t in corpus.transcripts()]
    assert read == [str(n) for n in range(len(read))] and 0 < len(read) < 300
    (problem,) = corpus.problems
    assert problem.startswith(f"{path.name}: Compressed file ended" if packed else f"{path.name}, line 300: JSONDecodeError")


def test_a_damaged_stream_costs_its_file_alone(tmp_path):
    packed = bytearray(gzip.compress(json.dumps([{"id": "x", "text": "abcdefghij" * 50}] * 9).encode(), 9))
    packed[30:40] = b"\xff" * 10
    (tmp_path / "a.json.gz").write_bytes(packed)
    (tmp_path / "b.json").write_text(json.dumps([{"id": "x", "text": "y"}]))
    corpus = corpus_of(find(tmp_path, "*.json"), list_records("chat", "id"))
    assert len(list(corpus.transcripts())) == 1
    assert [p.partition(":")[0] for p in corpus.problems] == ["a.json.gz"]


def test_a_file_in_both_forms_is_read_once(tmp_path):
    for name in ("b.json.gz", "a.json", "a.json.gz", "c.txt", "d.json.bak"):
        (tmp_path / name).write_bytes(gzip.compress(b"[]") if name.endswith(".gz") else b"[]")
    assert [path.name for path in find(tmp_path, "*.json")] == ["a.json", "b.json.gz"]
    digests = manifest(tmp_path, find(tmp_path, "*.json"))
    assert set(digests) == {"a.json", "b.json"} and digests["a.json"] == digests["b.json"]


def test_schemas_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "schema.json").write_text("[{")
    with pytest.raises(ConfigError, match=r"schema\.json cannot be read: Expecting property name"):
        recorded.read_schema(tmp_path / "schema.json")


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_a_folder_without_the_expected_files_is_refused(source, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match=r"holds no .*\.json.*give "):
            SOURCES[source](path)


# ---- results and calls -----------------------------------------------------------------------------------------------

A, B, C = (ToolCall(name, "{}", id=name.upper()) for name in "abc")


def result(of, content=None):
    return Message("tool", content or f"of {of}", tool_call_id=of)


def test_results_stand_in_the_order_of_their_calls():
    messages = (Message("assistant", tool_calls=(A, B, C)), result("C"), result("A"), result("B"), Message("user", "so?"))
    problems = []
    assert [m.content for m in pair_results(messages, problems.append)] == ["", "of A", "of B", "of C", "so?"]
    assert problems == []


def test_results_without_ids_belong_to_the_calls_in_order_even_to_equal_ones():
    same = ToolCall("a", "{}")
    messages = (Message("assistant", tool_calls=(same, same)), Message("tool", "1"), Message("tool", "2"))
    assert pair_results(messages, pytest.fail) == messages


@pytest.mark.parametrize(
    ("messages", "kept", "problems"),
    [
        # A call that alone has no result would be answered with another's.
        ([Message("assistant", tool_calls=(A, B)), result("B")], [("b",), "of B"], ["call of a without a result"]),
        ([Message("assistant", tool_calls=(A,)), result("A"), result("Z")], [("a",), "of A"], ["without a call: 'of Z'"]),
        ([Message("user", "u"), result("A")], ["u"], ["without a call: 'of A'"]),
        ([result("A"), Message("assistant", "x")], ["x"], ["without a call: 'of A'"]),
        ([Message("assistant", "x", tool_calls=(ToolCall("", "?"), B)), Message("tool", "1"), Message("tool", "2")],
         [("b",), "2"], []),
        ([Message("assistant", tool_calls=(ToolCall("", "?"),)), Message("tool", "1"), Message("user", "u")], ["u"], []),
        # The last turn's calls may be unanswered.
        ([Message("assistant", tool_calls=(A, B))], [("a", "b")], []),
    ],
)  # fmt: skip
def test_what_belongs_to_nothing_is_left_out_and_reported(messages, kept, problems):
    found = []
    paired = pair_results(messages, found.append)
    assert [tuple(c.name for c in m.tool_calls) or m.content for m in paired] == kept
    assert len(found) == len(problems) and all(part in line for part, line in zip(problems, found, strict=True))


def test_definitions_are_inferred_from_what_was_called():
    calls = (
        ToolCall.of("b", x=1, y="a", z=None),
        ToolCall.of("b", x=2.5, y=True, w=[1]),
        ToolCall("b", "not json"),
        ToolCall.of("a"),
    )
    transcript = Transcript("x", "x", "a", (), tuple(Message("assistant", tool_calls=(call,)) for call in calls))
    specs = infer_specs([transcript], {"a": Effects(writes=("w",))})
    assert list(specs) == ["a", "b"] and specs["a"].effects == Effects(writes=("w",)) and specs["b"].effects == Effects()
    assert specs["b"].parameters == {
        "type": "object",
        "properties": {
            "x": {"type": "number"},
            "y": {"type": ["boolean", "string"]},
            "z": {"type": "null"},
            "w": {"type": "array"},
        },
    }
