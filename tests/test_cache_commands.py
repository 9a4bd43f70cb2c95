"""`cacherl cache`: a small corpus on disk into a store, and looked up in it."""

import json

import pytest

from cacherl_jax import cli

SCHEMA = [
    {
        "service_name": "Weather_9",
        "slots": [{"name": "city", "description": "the city", "is_categorical": False, "possible_values": []}],
        "intents": [
            {"name": "Ask", "description": "asks", "required_slots": ["city"], "optional_slots": {}, "is_transactional": False}
        ],
    }
]


def dialogue(number, *turns):
    system = [
        {
            "speaker": "SYSTEM",
            "utterance": f"It is {weather}.",
            "frames": [
                {
                    "service": "Weather_9",
                    "service_call": {"method": "Ask", "parameters": {"city": city}},
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


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    dialogues = [dialogue(0, ("Bern", "dry"), ("Rome", "wet"), ("Bern", "wet")), {"dialogue_id": "broken"}]
    (folder / "dialogues_001.json").write_text(json.dumps(dialogues))
    return folder


def cache(capsys, verb, corpus, *more):
    status = cli.main(["cache", verb, "--source", "sgd", "--path", str(corpus), "--json", *map(str, more)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_import_then_lookup(corpus, tmp_path, capsys):
    store = tmp_path / "a.sqlite"
    status, out, _ = cache(capsys, "import", corpus, "--store", store, "--key", "raw")
    counted = {"calls": 3, "distinct": 2, "conflicting": 1, "hits_while_filling": 1, "malformed": 1}
    assert status == 0 and json.loads(out) == counted
    status, out, _ = cache(capsys, "lookup", corpus, "--store", store)
    hits = {"exact_hits": 3, "recorded_among_stored": 3, "recorded_is_most_frequent": 2}
    assert status == 0 and json.loads(out) == {"calls": 3, "distinct": 2, "conflicting": 1, "malformed": 1} | hits


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
