"""Taskmaster-4 and STAR: what their readers make of the files, and what they leave out by name."""

import copy
import gzip
import json
import lzma
import tarfile
from collections import Counter

import pytest

from cacherl_jax.config import ConfigError
from cacherl_jax.data import star, taskmaster4
from cacherl_jax.types import Effects, Message, ToolCall

# ---- Taskmaster-4 ----------------------------------------------------------------------------------------------------


def exchange(number, name="get_menu_items", request='{"query": "tea"}', response='{"items":[]}'):
    call, answer = f"api_call_{number}", f"api_response_{number}"
    parts = [("api_call", name, call), ("request", request, call), ("api_response", name, answer), ("response", response, answer)]
    return [{"name": n, "value": v, "context": c} for n, v, c in parts if v is not None]


def order(*annotations, **more):
    said = [("user", "tea please", [a for e in annotations for a in e]), ("assistant", "Here.", [])]
    utterances = [{"index": i, "speaker": s, "text": t, "annotations": a} for i, (s, t, a) in enumerate(said)]
    return {"conversation_id": "dlg-1", "utterances": utterances, **more}


def read_orders(tmp_path, *dialogues):
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "data_00.json").write_text(json.dumps(dialogues))
    return taskmaster4.read(tmp_path)


def test_calls_of_an_order_follow_each_other_as_recorded(tmp_path):
    corpus = read_orders(tmp_path, order(exchange(0), exchange(1, "add_order_item", '{"n":1, "id": "x"}', '{"order_id": 5}')))
    (transcript,) = corpus.transcripts()
    assert (transcript.id, transcript.agent, transcript.tools) == ("dlg-1", "taskmaster4", ("add_order_item", "get_menu_items"))
    assert transcript.messages == (
        Message("user", "tea please"),
        Message("assistant", tool_calls=(ToolCall("get_menu_items", '{"query": "tea"}', "call_0"),)),
        Message("tool", '{"items":[]}', tool_call_id="call_0"),
        Message("assistant", tool_calls=(ToolCall("add_order_item", '{"n":1, "id": "x"}', "call_1"),)),
        Message("tool", '{"order_id": 5}', tool_call_id="call_1"),
        Message("assistant", "Here."),
    )
    assert corpus.problems == [] and corpus.specs["add_order_item"].effects.writes == ("orders",)
    assert corpus.specs["add_order_item"].parameters["properties"] == {"n": {"type": "integer"}, "id": {"type": "string"}}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"request": None}, "call 1 of get_menu_items is left out: no request"),
        ({"response": None}, "call 1 of get_menu_items is left out: no response"),
        ({"name": None}, "call 1 of None is left out: no api_call"),
        ({"request": '{"id": ""tea""}'}, "call 1 of get_menu_items is left out: Expecting ',' delimiter"),
        ({"response": '{"id": "\t"}'}, "call 1 of get_menu_items is left out: Invalid control character"),
        ({"request": "[1]"}, "call 1 of get_menu_items is left out: the request is no JSON object"),
    ],
)
def test_a_malformed_exchange_is_reported_and_the_dialogue_goes_on(tmp_path, broken, reason):
    corpus = read_orders(tmp_path, order(exchange(0), exchange(1, **broken), exchange(2)))
    (transcript,) = corpus.transcripts()
    assert [m.tool_call_id for m in transcript.messages if m.role == "tool"] == ["call_0", "call_2"]
    (problem,) = corpus.problems
    assert problem.startswith(f"data_00.json, dialogue dlg-1: {reason}")


@pytest.mark.parametrize(
    ("dialogue", "reason"),
    [
        (order(utterances=None), "dialogue dlg-1: TypeError"),
        (order([{"name": "api_call", "value": "x"}]), "dialogue dlg-1: KeyError 'context'"),
        (order(utterances=[{"speaker": "agent", "text": "", "annotations": []}]), "dialogue dlg-1: ValueError speaker 'agent'"),
        (order(utterances=[{"speaker": "user", "text": 1, "annotations": []}]), "dialogue dlg-1: TypeError text is int"),
        ({"utterances": []}, "dialogue 1: KeyError 'conversation_id'"),
    ],
)
def test_a_malformed_order_costs_only_itself(tmp_path, dialogue, reason):
    corpus = read_orders(tmp_path, order(), dialogue, order(exchange(0), conversation_id="dlg-3"))
    assert [t.id for t in corpus.transcripts()] == ["dlg-1", "dlg-3"]
    assert corpus.problems[0].startswith(f"data_00.json, {reason}") and len(corpus.problems) == 1


def test_taskmasters_calls_are_all_read_or_reported(shared_data):
    corpus = taskmaster4.read(shared_data / "taskmaster4")
    transcripts = list(corpus.transcripts())
    called, left_out = Counter(), 0
    for path in sorted((shared_data / "taskmaster4" / "data").glob("*.gz")):
        for dialogue in json.loads(gzip.decompress(path.read_bytes())):
            for utterance in dialogue["utterances"]:
                values = {}
                for annotation in utterance["annotations"]:
                    values.setdefault(annotation["context"].split("_")[2], {})[annotation["name"]] = annotation["value"]
                for parts in values.values():
                    try:
                        json.loads(parts["request"]), json.loads(parts["response"])
                        called[parts["api_call"]] += 1
                    except (KeyError, ValueError):
                        left_out += 1
    assert Counter(c.name for t in transcripts for m in t.messages for c in m.tool_calls) == called
    assert len(transcripts) == len({t.id for t in transcripts}) == 3_000
    assert (called.total(), left_out, len(corpus.problems)) == (12_404, 118, 118)
    assert set(corpus.specs) == set(called) == set(taskmaster4.EFFECTS)


# ---- STAR ------------------------------------------------------------------------------------------------------------

BANK_SCHEMA = {
    "input": [
        {"Name": "BankName", "Type": "Categorical", "Categories": ["Chase", "PNC"], "ReadableName": "Bank Name"},
        {"Name": "Pin", "Type": "Integer", "Min": 0, "Max": 9, "ReadableName": "PIN"},
        {"Name": "User", "Type": "ShortString", "ReadableName": "User"},
    ],
    "required": ["BankName"], "function": "generic_sample", "db": "bank", "output": [], "returns_count": False,
}  # fmt: skip
QUERY = {
    "Agent": "Wizard", "Action": "query", "APIName": "bank",
    "Constraints": [
        {"BankName": 'api.is_equal_to("Chase")'}, {"Pin": "api.is_at_least(3)"}, {"Pin": "api.is_at_most(5)"}, {"User": '"Ann"'},
        {"User": '"Ann"'},
    ],
}  # fmt: skip
ITEM = {"Agent": "KnowledgeBase", "Action": "return_item", "APIName": "bank", "Item": {"Balance": 5}, "TotalItems": 2}
VISIT = {
    "DialogueID": 12,
    "Scenario": {"WizardCapabilities": [{"Task": "bank"}]},
    "Events": [
        {"Agent": "UserGuide", "Action": "instruct", "Text": "Be angry."},
        {"Agent": "User", "Action": "utter", "Text": "My balance?"},
        {"Agent": "Wizard", "Action": "request_suggestions", "Text": "draft"},
        QUERY,
        ITEM,
        {"Agent": "Wizard", "Action": "pick_suggestion", "Text": "Five."},
        {"Agent": "User", "Action": "complete"},
    ],
}


def write_star(folder, dialogues, schema=BANK_SCHEMA):
    """The corpus with unpacked dialogues; values that are not bytes are written as JSON."""
    (folder / "api_schemas").mkdir(parents=True)
    (folder / "dialogues").mkdir()
    (folder / "api_schemas" / "bank.json").write_text(json.dumps(schema))
    for name, content in dialogues.items():
        (folder / "dialogues" / f"{name}.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def test_a_query_becomes_a_call_with_its_constraint_expressions(tmp_path):
    corpus = star.read(write_star(tmp_path, {"12": VISIT}))
    (transcript,) = corpus.transcripts()
    arguments = {"BankName": 'api.is_equal_to("Chase")', "Pin": ["api.is_at_least(3)", "api.is_at_most(5)"], "User": '"Ann"'}
    assert (transcript.id, transcript.agent, transcript.tools) == ("12", "star", ("bank",))
    assert transcript.messages == (
        Message("user", "My balance?"),
        Message("assistant", tool_calls=(ToolCall("bank", json.dumps(arguments), "call_1"),)),
        Message("tool", '{"Item": {"Balance": 5}, "TotalItems": 2}', tool_call_id="call_1"),
        Message("assistant", "Five."),
    )
    spec = corpus.specs["bank"]
    described = {name: schema["description"] for name, schema in spec.parameters["properties"].items()}
    assert described == {"BankName": "Bank Name (Chase, PNC)", "Pin": "PIN (0 to 9)", "User": "User (ShortString)"}
    assert spec.parameters["required"] == ["BankName"] and spec.effects == Effects(stochastic=True)


def visit(change):
    dialogue = copy.deepcopy(VISIT)
    change(dialogue)
    return dialogue


@pytest.mark.parametrize(
    ("dialogue", "reason"),
    [
        (b'{"DialogueID": 5, "Eve', "JSONDecodeError"),
        (b'{"Events": "\xff"}', "UnicodeDecodeError"),
        ([], "TypeError"),
        (visit(lambda d: d.update(Events=[])), "ValueError nobody says anything"),
        (visit(lambda d: d["Events"].pop(4)), "ValueError query of bank without a result"),
        (visit(lambda d: d["Events"].__delitem__(slice(4, None))), "ValueError query of bank without a result"),
        (visit(lambda d: d["Events"].insert(3, QUERY)), "ValueError query of bank without a result"),
        (visit(lambda d: d["Events"].pop(3)), "ValueError result of bank without a query"),
        (visit(lambda d: d["Events"][3].pop("Constraints")), "KeyError 'Constraints'"),
        (visit(lambda d: d["Events"][3].update(Constraints=[{"Pin": 5}])), "TypeError int where text is expected: 5"),
        (visit(lambda d: d.pop("Scenario")), "KeyError 'Scenario'"),
    ],
)
def test_a_visit_that_cannot_be_read_costs_only_itself(tmp_path, dialogue, reason):
    corpus = star.read(write_star(tmp_path, {"1": VISIT, "5": dialogue, "9": {**VISIT, "DialogueID": 9}}))
    assert [t.id for t in corpus.transcripts()] == ["12", "9"]
    (problem,) = corpus.problems
    assert problem.startswith(f"dialogues, 5.json: {reason}")


def test_a_schema_of_another_form_and_absent_parts_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"bank\.json is no API schema of STAR: KeyError 'input'"):
        star.read(write_star(tmp_path / "a", {}, schema={}))
    write_star(tmp_path / "b", {})
    (tmp_path / "b" / "dialogues").rmdir()
    with pytest.raises(ConfigError, match=r"b holds no dialogues/ or dialogues\.tar\.xz"):
        star.read(tmp_path / "b")


def test_stars_archive_is_read_whole_and_a_cut_one_as_far_as_it_goes(shared_data, tmp_path):
    corpus = star.read(shared_data / "star")
    queries = Counter()
    transcripts = {t.id: t for t in corpus.transcripts()}
    unpacked = write_star(tmp_path / "unpacked", {})
    (unpacked / "api_schemas" / "bank.json").unlink()
    for path in (shared_data / "star" / "api_schemas").iterdir():
        (unpacked / "api_schemas" / path.name).symlink_to(path)
    with tarfile.open(shared_data / "star" / "dialogues.tar.xz") as archive:
        for member in archive:
            if member.isfile():
                dialogue = json.loads(archive.extractfile(member).read())
                queries.update(e["APIName"] for e in dialogue["Events"] if e["Action"] == "query")
                if dialogue["DialogueID"] < 30:
                    (unpacked / "dialogues" / f"{dialogue['DialogueID']}.json").write_text(json.dumps(dialogue))
    assert Counter(c.name for t in transcripts.values() for m in t.messages for c in m.tool_calls) == queries
    assert (len(transcripts), queries.total(), len(corpus.specs)) == (6_205, 22_169, 25)
    assert len(corpus.problems) == 447 and {p.rpartition(": ")[2] for p in corpus.problems} == {"ValueError nobody says anything"}
    same = list(star.read(unpacked).transcripts())
    assert same == [transcripts[t.id] for t in same] and len(same) > 20

    packed = lzma.compress(lzma.decompress((shared_data / "star" / "dialogues.tar.xz").read_bytes())[:400_000])
    for name, content in (("cut", packed), ("torn", packed[:-3000])):
        write_star(tmp_path / name, {})
        (tmp_path / name / "dialogues").rmdir()
        (tmp_path / name / "dialogues.tar.xz").write_bytes(content)
        part = star.read(tmp_path / name)
        assert 0 < len(list(part.transcripts())) < 40
        assert part.problems[-1].startswith("dialogues.tar.xz: "), part.problems
