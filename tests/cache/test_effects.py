"""Effects from recordings: what is found in worlds whose truth is known, and what is not claimed."""

import json
import random
import runpy
from pathlib import Path

import pytest

from cacherl_jax.cache import effects
from cacherl_jax.cache.lookup import recordings
from cacherl_jax.cache.store import Recording
from cacherl_jax.types import Effects, ToolResult, ToolSpec

EXPERIMENT = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / "effects" / "run.py"))


def spec(name, **labels):
    return ToolSpec(name, "", {"type": "object"}, Effects(**{k: (v,) if isinstance(v, str) else v for k, v in labels.items()}))


TRUE = {
    s.name: s
    for s in (
        spec("get_item", reads="items"),
        spec("set_item", reads="items", writes="items"),
        spec("make_item", reads="counter", writes="counter"),
        spec("get_made", reads="counter"),
        spec("get_name"),
        spec("roll", stochastic=True),
        spec("headline", time_dependent=True),
    )
}


def episode(number, length, rng):
    """A plain world: items by id; ids made one after the other; a die; news that change every 50 episodes."""
    items = {f"item{i}": 0 for i in range(3)}
    made = []
    for _ in range(length):
        tool, item = rng.choice([n for n in TRUE if n != "get_made"] + ["get_made"] * bool(made)), f"item{rng.randrange(3)}"
        arguments, error = {"item_id": item}, None
        if tool == "get_item":
            result = {"item_id": item, "value": items[item]}
        elif tool == "set_item":
            items[item] = arguments["value"] = rng.randrange(100)
            result = "done"
        elif tool == "make_item":
            made.append(f"made{len(made)}x")
            arguments, result = {}, {"made_id": made[-1]}
        elif tool == "get_made":
            arguments = {"made_id": rng.choice(made)}
            result = {"made_id": arguments["made_id"], "owner": "me"}
        elif tool == "get_name":
            result = f"the item {item}"
        else:
            result = rng.randrange(6) if tool == "roll" else f"news {number // 50}"
            arguments = {"topic": "all"}
        content = json.dumps(result)
        at = 1000.0 * number
        yield Recording(b"", tool, json.dumps(arguments), "", ToolResult(content, error), f"e{number}", recorded_at=at)


def world(episodes, length, seed=0):
    rng = random.Random(seed)
    return [r for number in range(episodes) for r in episode(number, length, rng)]


@pytest.fixture(scope="module")
def report():
    return effects.infer(world(200, 12), TRUE)


def test_relations_variation_and_labels_are_found(report):
    found = {(r["writer"], r["reader"]) for r in report["relations"]}
    assert ("set_item", "get_item") in found and ("make_item", "get_made") in found
    assert found <= effects.changes({n: s.effects for n, s in TRUE.items()})
    tools = report["tools"]
    assert tools["set_item"]["writes"] == tools["make_item"]["writes"] == "yes"
    assert tools["get_item"]["writes"] == tools["get_name"]["writes"] == "no"
    assert tools["roll"]["varies"] == "stochastic" and tools["headline"]["varies"] == "time_dependent"
    assert tools["get_name"]["varies"] == "constant"
    label = {name: tools[name]["effects"] for name in tools}
    assert label["roll"]["stochastic"] and label["headline"]["time_dependent"]
    assert set(label["set_item"]["writes"]) & set(label["get_item"]["reads"])
    assert not set(label["set_item"]["writes"]) & set(label["get_made"]["reads"])
    assert label["get_name"] == {"reads": [], "writes": [], "stochastic": False, "time_dependent": False}
    json.dumps(report)


def test_true_labels_are_not_contradicted_and_false_ones_are_with_an_example(report):
    assert report["contradictions"] == []
    false = TRUE | {
        "set_item": spec("set_item"),
        "get_name": spec("get_name", writes="items"),
        "roll": spec("roll"),
        "get_item": spec("get_item", reads="items", stochastic=True),
    }
    said = effects.infer(world(200, 12), false)["contradictions"]
    kinds = {(c["tool"], c["kind"]) for c in said}
    assert {("set_item", "changes"), ("get_name", "no_change"), ("roll", "stochastic")} <= kinds
    (change,) = [c for c in said if c["seen"] == "set_item changes what get_item answers"]
    before, after = change["example"]
    assert before["call"] == after["call"] and before["result"] != after["result"]
    (roll,) = [c for c in said if c["tool"] == "roll"]
    assert {e["call"] for e in roll["example"]} == {'roll {"topic":"all"}'} and roll["example"][0] != roll["example"][1]


def test_hidden_state_is_told_from_chance():
    rng = random.Random(0)

    def calls(number, repeats):
        balance = rng.randrange(1000)
        return [Recording(b"", "balance", "{}", "", ToolResult(str(balance)), f"u{number}") for _ in range(repeats)]

    once = effects.infer([r for n in range(30) for r in calls(n, 1)], {"balance": spec("balance")})
    assert once["tools"]["balance"]["varies"] == "hidden_state_or_stochastic"
    twice = effects.infer([r for n in range(30) for r in calls(n, 2)], {"balance": spec("balance")})
    assert twice["tools"]["balance"]["varies"] == "hidden_state" and twice["relations"] == []
    assert [c["kind"] for c in twice["contradictions"]] == ["hidden_state"]


def test_little_evidence_is_not_stretched():
    few = effects.infer(world(3, 6), TRUE)
    assert {t["writes"] for t in few["tools"].values()} == {"unknown"} and few["relations"] == []
    nothing = effects.infer([], TRUE)
    assert nothing["tools"] == {} and nothing["relations"] == [] and nothing["contradictions"] == []

    def together(number):  # which of the two wrote?
        for tool, result in (("get", "old"), ("a", "ok"), ("b", "ok"), ("get", "new")):
            yield Recording(b"", tool, json.dumps({"key": f"key{number}"}), "", ToolResult(result), f"e{number}")

    both = effects.infer([r for n in range(40) for r in together(n)], {})
    assert both["relations"] == [] and both["tools"]["a"]["writes"] == both["tools"]["b"]["writes"] == "unknown"


def test_calls_that_failed_write_nothing():
    def failing(number):
        for tool, result, error in (("get", "1", None), ("set", "no", "denied"), ("set", "ok", None), ("get", "2", None)):
            if number % 2 or tool != "set" or error:
                value = "1" if number % 2 == 0 else result
                yield Recording(b"", tool, json.dumps({"key": f"key{number}"}), "", ToolResult(value, error), f"e{number}")

    report = effects.infer([r for n in range(60) for r in failing(n)], {})
    (relation,) = report["relations"]
    assert (relation["writer"], relation["reader"], relation["intervals"], relation["changed"]) == ("set", "get", 30, 30)


def test_discoveries_follow_the_published_example():
    # Benjamini and Hochberg 1995, section 4.2: of these fifteen, four are discoveries at 0.05.
    values = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    tests = {(f"w{i}", "r", True): p for i, p in enumerate(values)}
    assert effects._discoveries(tests, 0.05) == {(f"w{i}", "r", True) for i in range(4)}


def test_the_embedded_world_is_read_from_an_explorer():
    specs = EXPERIMENT["tool_specs"]()
    report = EXPERIMENT["report"](EXPERIMENT["explore"](60, 30, 5), specs)
    scored = effects.score(report, specs)
    assert scored["relations"]["precision"]["share"] == 1.0 and scored["relations"]["recall"]["share"] >= 0.75
    assert scored["writers"]["precision"]["share"] == scored["non_writers"]["precision"]["share"] == 1.0


def test_hidden_state_of_a_real_corpus(shared_data):
    from cacherl_jax.data import sgd

    corpus = sgd.read(shared_data / "sgd" / "dev")
    banking = [t for t in corpus.transcripts() if any("Bank" in name for name in t.tools)]
    recorded = [r for t in banking for r in recordings(t, corpus.specs, "raw")]
    report = effects.infer(recorded, corpus.specs)
    name = next(n for n in report["tools"] if n.endswith("CheckBalance"))
    (said,) = [c for c in report["contradictions"] if c["tool"] == name]
    assert said["kind"].startswith("hidden_state") and said["example"][0]["call"] == said["example"][1]["call"]


def test_a_changed_record_is_read_by_every_tool_that_shows_its_kind():
    def calls(number):
        place = {"item_id": f"item{number}"}
        before, after = place | {"size": 1, "colour": "red"}, place | {"size": 2, "colour": "red"}
        shown = [("get", before), ("resize", after)] if number % 2 else [("label", before)]
        for tool, record in shown:
            yield Recording(b"", tool, json.dumps(place), "", ToolResult(json.dumps(record)), f"e{number}")

    report = effects.infer([r for n in range(40) for r in calls(n)], {})
    assert {(r["writer"], r["reader"]) for r in report["relations"]} == {("resize", r) for r in ("get", "label", "resize")}
