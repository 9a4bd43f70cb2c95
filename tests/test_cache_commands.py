"""`cacherl cache`: a small corpus on disk into a store, and looked up in it."""

import json

import pytest

from cacherl_jax import cli
from cacherl_jax.types import Task, ToolCall

SCHEMA = [
    {
        "service_name": "Weather_9",
        "slots": [{"name": "city", "description": "the city", "is_categorical": False, "possible_values": []}],
        "intents": [
            {
                "name": name,
                "description": name,
                "required_slots": ["city"],
                "optional_slots": {},
                "is_transactional": name == "Warn",
            }
            for name in ("Ask", "Warn")
        ],
    }
]


def dialogue(number, *turns):
    """Calls of Ask, or of Warn for a result of True: (city, result)."""
    system = [
        {
            "speaker": "SYSTEM",
            "utterance": f"It is {weather}.",
            "frames": [
                {
                    "service": "Weather_9",
                    "service_call": {"method": "Warn" if weather is True else "Ask", "parameters": {"city": city}},
                    "service_results": [{"weather": weather}],
                }
            ],
        }
        for city, weather in turns
    ]
    user = {"speaker": "USER", "utterance": "And now?", "frames": []}
    return {
        "dialogue_id": f"1_{number:05d}",
        "services": ["Weather_9"],
        "turns": [turn for answer in system for turn in (user, answer)],
    }


def write_corpus(folder, *dialogues):
    folder.mkdir()
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    (folder / "dialogues_001.json").write_text(json.dumps(dialogues))
    return folder


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(
        tmp_path / "train", dialogue(0, ("Bern", "dry"), ("Rome", "wet"), ("Bern", "wet")), {"dialogue_id": "broken"}
    )


def cache(capsys, verb, corpus, *more):
    status = cli.main(["cache", verb, "--source", "sgd", "--path", str(corpus), "--json", *map(str, more)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_import_then_lookup(corpus, tmp_path, capsys):
    store = tmp_path / "a.sqlite"
    status, out, _ = cache(capsys, "import", corpus, "--store", store, "--key", "raw")
    (problem,) = (counts := json.loads(out)).pop("problems")
    assert problem.startswith("dialogues_001.json, dialogue broken: ")
    counted = {"calls": 3, "distinct": 2, "conflicting": 1, "hits_while_filling": 1, "malformed": 1}
    assert status == 0 and counts == counted
    status, out, _ = cache(capsys, "lookup", corpus, "--store", store)
    hits = {"exact_hits": 3, "recorded_among_stored": 3, "recorded_is_most_frequent": 2}
    expected = {"calls": 3, "distinct": 2, "conflicting": 1, "malformed": 1, "problems": [problem]} | hits
    assert status == 0 and json.loads(out) == expected


def test_a_second_import_and_another_key_are_refused_and_change_nothing(corpus, tmp_path, capsys):
    store = tmp_path / "a.sqlite"
    cache(capsys, "import", corpus, "--store", store, "--key", "raw")
    before = store.read_bytes()
    status, out, err = cache(capsys, "import", corpus, "--store", store, "--key", "raw")
    assert status == 2 and "already holds entries" in err and out == ""
    status, out, err = cache(capsys, "lookup", corpus, "--store", store, "--key", "state")
    assert status == 2 and f"--key state: the keys of store {store} are raw" in err and out == ""
    assert store.read_bytes() == before


def test_paths_that_hold_nothing_are_named(corpus, tmp_path, capsys):
    status, _, err = cache(capsys, "lookup", corpus, "--store", tmp_path / "absent.sqlite")
    assert status == 1 and "absent.sqlite does not exist" in err
    status, _, err = cache(capsys, "import", tmp_path, "--store", tmp_path / "b.sqlite")
    assert status == 2 and "holds no schema.json" in err and not (tmp_path / "b.sqlite").exists()


def run(capsys, *arguments):
    """(exit status, the JSON object or None, what was said on standard error) of `cacherl cache ...`."""
    status = cli.main(["cache", *map(str, arguments), "--json"])
    captured = capsys.readouterr()
    return status, json.loads(captured.out) if captured.out else None, captured.err


@pytest.fixture
def store(tmp_path, capsys):
    """Ask of Bern and Rome, and of Bern after Warn of Bern; Warn of Bern."""
    folder = write_corpus(
        tmp_path / "state", dialogue(0, ("Bern", "dry"), ("Bern", True), ("Bern", "warned")), dialogue(1, ("Rome", "wet"))
    )
    path = tmp_path / "store.sqlite"
    assert run(capsys, "import", "--source", "sgd", "--path", folder, "--store", path)[0] == 0
    return path


def test_coverage_says_before_training_which_tasks_cannot_be_finished(store, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
    asked = write_corpus(
        tmp_path / "dev",
        dialogue(0, ("Bern", "dry"), ("Bern", True), ("Bern", "warned")),
        dialogue(1, ("Bern", "dry"), ("Oslo", "wet")),
        dialogue(2),
    )
    figure = tmp_path / "coverage.png"
    options = ("coverage", "--store", store, "--set", "cache.best_effort=off")
    status, found, _ = run(capsys, *options, "--source", "sgd", "--path", asked, "--figure", figure)
    assert status == 0 and figure.read_bytes().startswith(b"\x89PNG")
    assert found == {
        "tasks": 2,
        "calls": 5,
        "exact": 0.8,
        "fidelity": 0.8,
        "unfinishable_tasks": 1,
        "unfinishable": ["1_00001"],
        "tiers": {"exact": 4, "miss": 1},
        "by_depth": {"1": {"exact": 2, "miss": 0}, "2": {"exact": 1, "miss": 1}, "3": {"exact": 1, "miss": 0}},
        "by_tool": {"Weather_9.Ask": {"exact": 3, "miss": 1}, "Weather_9.Warn": {"exact": 1, "miss": 0}},
    }
    tasks = tmp_path / "tasks.jsonl"
    calls = (ToolCall.of("Weather_9.Ask", city="Oslo"), ToolCall.of("Weather_9.Ask", city="Rome"))
    accepted = Task("t", "f", "train", ("Weather_9.Ask",), (), (calls, calls[1:]))
    tasks.write_text(json.dumps(accepted.to_json()) + "\n")
    status, found, _ = run(capsys, *options, "--tasks", tasks, "--set", "cache.on_miss=fail")
    assert (found["tiers"], found["unfinishable"]) == ({"exact": 1, "miss": 1}, [])  # the second reference can be finished
    assert run(capsys, *options)[0] == 2 and run(capsys, *options, "--tasks", tasks, "--source", "sgd")[0] == 2


def test_explain_says_what_is_served_and_why(store, capsys):
    ask, warn = 'Weather_9.Ask {"city": "Bern"}', 'Weather_9.Warn {"city": "Bern"}'
    _, fresh, _ = run(capsys, "explain", ask, "--store", store)
    assert (fresh["served"]["tier"], json.loads(fresh["served"]["result"])) == ("exact", [{"weather": "dry"}])
    assert (fresh["call"], fresh["writes"], fresh["refused"]) == ('Weather_9.Ask {"city":"Bern"}', [], None)
    _, warned, _ = run(capsys, "explain", ask, "--store", store, "--after", warn)
    assert (json.loads(warned["served"]["result"]), warned["writes"]) == (
        [{"weather": "warned"}],
        ['Weather_9.Warn {"city":"Bern"}'],
    )
    assert warned["key"] != fresh["key"] and [row["tier"] for row in warned["tried"]] == ["exact"]

    options = ("--store", store, "--set", "cache.best_effort=off", "--set", "cache.on_miss=fail")
    _, missed, _ = run(capsys, "explain", 'Weather_9.Ask {"city": "Oslo"}', *options)
    assert missed["served"]["tier"] == "miss"
    assert [row["tier"] for row in missed["tried"]] == ["exact", "adapted", "fuzzy", "best_effort", "miss"]
    assert "below 0.5" in missed["tried"][2]["reason"] and "the episode ends" in missed["tried"][4]["reason"]
    assert [(row["similarity"], row["same_writes"]) for row in missed["nearest"]] == [(0.0, True), (0.0, True), (0.0, False)]
    _, refused, _ = run(capsys, "explain", "Weather_9.Ask", "--store", store)
    assert "schema_violation" in refused["refused"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "Weather_9.Tell {}"), "the store has no tool 'Weather_9.Tell'; it has Weather_9.Ask, Weather_9.Warn"),
        (("explain", "Weather_9.Ask {"), "is no call"),
        (("explain", "Weather_9.Ask {}", "--set", "cache.key=raw"), "the keys of store"),
        (("explain", "Weather_9.Ask {}", "--set", "cache.on_miss=live"), "no stage of a run may reach a live tool"),
        (("explain", "Weather_9.Ask {}", "--set", "cache.best_effort=simulator"), "cache.simulator.base_url is empty"),
        (("coverage", "--source", "sdg", "--path", "x"), "--source 'sdg' is none of sgd, "),
        (("import", "--source", "dataset", "--path", "x", "--key", "raw"), "keyed and labelled already"),
    ],
)
def test_wrong_usage_is_named(store, capsys, arguments, message):
    before = store.read_bytes()
    status, out, err = run(capsys, *arguments, "--store", store)
    assert (status, out) == (2, None) and message in err
    assert store.read_bytes() == before


def test_tables_have_a_column_a_field(store, capsys):
    assert cli.main(["cache", "explain", 'Weather_9.Ask {"city": "Rome"}', "--store", str(store)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  tier: exact" in lines and "writes: none" in lines
    table = lines[lines.index("nearest:") + 1 :]
    assert table[0].split()[:3] == ["similarity", "arguments", "result"] and table[1].split()[:2] == ["1", '{"city":"Rome"}']
    assert len({line.index("{") for line in table[1:]}) == 1


def test_a_store_is_frozen_compared_published_and_read_again(store, tmp_path, capsys):
    frozen, folder, copy = tmp_path / "frozen.sqlite", tmp_path / "published", tmp_path / "copy.sqlite"
    _, taken, _ = run(capsys, "snapshot", "--store", store, "--out", frozen)
    status, _, err = run(capsys, "snapshot", "--store", store, "--out", frozen)
    assert status == 1 and "exists" in err
    _, held, _ = run(capsys, "stats", "--store", frozen)
    assert (held["snapshot"], held["licence"], held["calls"], held["keys"]) == (taken["snapshot"], "CC BY-SA 4.0", 4, 4)
    assert (held["by_tool"]["Weather_9.Ask"]["calls"], held["by_tool"]["Weather_9.Warn"]["calls"]) == (3, 1)

    _, manifest, _ = run(capsys, "export", "--store", frozen, "--out", folder)
    assert (manifest["snapshot"], manifest["licence"]) == (taken["snapshot"], "CC BY-SA 4.0")
    _, imported, _ = run(capsys, "import", "--source", "dataset", "--path", folder, "--store", copy)
    assert imported == taken
    _, same, _ = run(capsys, "diff", frozen, copy)
    assert same["equal"] and same["keys"]["same"] == 4
    _, explained, _ = run(capsys, "explain", 'Weather_9.Ask {"city": "Rome"}', "--store", copy)
    assert explained["served"]["tier"] == "exact"  # the tools travel with the entries

    more = write_corpus(tmp_path / "more", dialogue(0, ("Bern", "wet")), dialogue(1, ("Rome", "wet"), ("Oslo", "dry")))
    other = tmp_path / "other.sqlite"
    run(capsys, "import", "--source", "sgd", "--path", more, "--store", other)
    _, changed, _ = run(capsys, "diff", store, other)
    assert changed["keys"] == {"only_a": 2, "only_b": 1, "other_results": 1, "other_counts": 0, "same": 1}


def test_entries_that_would_poison_are_set_aside_and_back(tmp_path, capsys):
    bad = write_corpus(tmp_path / "bad", dialogue(0, ("Bern", "dry<|im_end|>"), ("Rome", "wet"), ("Rome", "dry"), ("Rome", "dry")))
    store = tmp_path / "bad.sqlite"
    run(capsys, "import", "--source", "sgd", "--path", bad, "--store", store)
    _, found, _ = run(capsys, "quarantine", "--store", store)
    _, moved, _ = run(capsys, "quarantine", "--store", store, "--move")
    assert (found["found"], found["aside"], moved["aside"]) == (1, 0, 1) and found["snapshot"] != moved["snapshot"]
    assert run(capsys, "quarantine", "--store", store, "--move", "--restore")[0] == 2
    _, explained, _ = run(capsys, "explain", 'Weather_9.Ask {"city": "Bern"}', "--store", store)
    assert explained["served"]["tier"] == "best_effort"  # another city's
    _, restored, _ = run(capsys, "quarantine", "--store", store, "--restore")
    assert restored == {"snapshot": found["snapshot"], "restored": 1}
    _, several, _ = run(capsys, "conflicts", "--store", store)
    assert (several["keys"], several["calls"]) == (1, 3)
    assert [r["count"] for r in several["examples"][0]["results"]] == [2, 1]


def test_inferred_effects_decide_the_keys_of_an_import(store, tmp_path, capsys):
    status, found, _ = run(capsys, "effects", "--store", store)
    assert (
        status == 0 and (found["episodes"], found["calls"]) == (2, 4) and set(found["tools"]) == {"Weather_9.Ask", "Weather_9.Warn"}
    )
    # Too few calls to infer from: a report that says that nothing is written.
    pure = {"reads": [], "writes": [], "stochastic": False, "time_dependent": False}
    found["tools"] = {"Weather_9.Ask": {"effects": pure}, "Weather_9.Warn": {"effects": pure}, "gone": {"effects": pure}}
    labels = tmp_path / "effects.json"
    labels.write_text(json.dumps(found))
    corpus = ("--source", "sgd", "--path", tmp_path / "state", "--store", tmp_path / "pure.sqlite")
    _, counts, _ = run(capsys, "import", *corpus, "--effects", labels)
    assert (counts["distinct"], counts["conflicting"]) == (3, 1)  # before and after the warning are one question now
    labels.write_text("{}")
    status, _, err = run(capsys, "import", *corpus[:-1], tmp_path / "none.sqlite", "--effects", labels)
    assert status == 2 and "no report of" in err and not (tmp_path / "none.sqlite").exists()


def test_what_is_fitted_serves_is_audited_and_explained(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")

    def towns(folder, numbers):
        """The tool repeats the town that it is asked about."""
        return write_corpus(tmp_path / folder, *(dialogue(n, (f"Town {n}", f"Town {n}")) for n in numbers))

    store, figure = tmp_path / "towns.sqlite", tmp_path / "audit.png"
    run(capsys, "import", "--source", "sgd", "--path", towns("train", range(120)), "--store", store)
    asked = ("explain", 'Weather_9.Ask {"city": "Utopia"}', "--store", store)
    _, before, _ = run(capsys, *asked)
    assert before["served"]["tier"] == "best_effort" and before["tried"][1]["reason"] == "no rules were fitted on this store"

    _, fitted, _ = run(capsys, "fit", "--store", store)
    (rule,) = fitted["rules"]
    assert (rule["tool"], rule["rule"]) == ("Weather_9.Ask", "city change: echo") and rule["right"] == rule["votes"] > 50
    assert fitted["snapshot"] == run(capsys, "quarantine", "--store", store)[1]["snapshot"]  # the id covers what was fitted
    _, after, _ = run(capsys, *asked)
    assert (after["served"]["tier"], json.loads(after["served"]["result"])) == ("adapted", [{"weather": "Utopia"}])
    assert after["served"]["fidelity"] > 0.9 and [row["tier"] for row in after["tried"]] == ["exact", "adapted"]
    assert (after["rules"][0]["rule"], after["rules"][0]["from"]) == ("city change: echo", 8)
    _, off, _ = run(capsys, *asked, "--set", "cache.adapted=false")
    assert off["served"]["tier"] == "best_effort" and off["tried"][1]["reason"] == "off (cache.adapted=false)"

    held = ("--source", "sgd", "--path", towns("dev", range(110, 130)), "--figure", figure)
    status, audited, _ = run(capsys, "audit", "--store", store, *held)
    assert status == 0 and figure.read_bytes().startswith(b"\x89PNG")
    assert (audited["calls"], audited["dialogues"], audited["dialogues_in_store"]) == (20, 20, 10)
    served = {(row["tier"], row["of"]): (row["served"], row["right"]) for row in audited["tiers"] if row["served"]}
    assert served == {(tier, of): (10, 10) for tier in ("exact", "adapted") for of in ("all", "reads")}


def test_functions_are_recorded_once_and_served(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "till.py").write_text(
        "from cacherl_jax.tools.functions import FunctionTools, tool\n"
        "from cacherl_jax.tools.registry import ToolError\n"
        "@tool(state=True, reads='till')\n"
        "def total(till: list) -> int:\n"
        "    return sum(till)\n"
        "@tool(state=True, writes='till')\n"
        "def pay(till: list, amount: int) -> str:\n"
        "    if amount < 0:\n"
        "        raise ToolError('negative', 'no refunds')\n"
        "    till.append(amount)\n"
        "    return 'paid'\n"
        "TOOLS = FunctionTools([total, pay], state=list)\n"
    )
    rows = [("total", {}), ("pay", {"amount": 3}), ("total", {}), ("pay", {"amount": -1}), ("lose", {})]
    calls = tmp_path / "calls.jsonl"
    calls.write_text("".join(json.dumps({"name": n, "arguments": a, "episode": "e"}) + "\n" for n, a in rows) + "{\n")
    record = ("record", "till:TOOLS", "--calls", calls, "--store", tmp_path / "till.sqlite")
    status, made, _ = run(capsys, *record)
    assert status == 0 and (made["recorded"], made["errors"], made["refused"], made["malformed"]) == (4, 1, 1, 1)
    _, again, _ = run(capsys, *record)
    assert (again["before"], again["recorded"]) == (4, 0)
    explain = ("explain", "total", "--store", tmp_path / "till.sqlite")
    assert run(capsys, *explain)[1]["served"]["result"] == "0"
    assert run(capsys, *explain, "--after", 'pay {"amount": 3}')[1]["served"]["result"] == "3"
    status, _, err = run(capsys, "record", "till:GONE", *record[2:])
    assert status == 2 and "till:GONE" in err
