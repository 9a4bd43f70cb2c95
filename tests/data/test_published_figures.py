"""What the corpora are known for: figures of exact keys to the digit, and conversations as Qwen's own template renders them."""

import json
from collections import defaultdict

import pytest

from cacherl_jax.cache.imports import import_transcripts
from cacherl_jax.cache.store import SQLiteStore
from cacherl_jax.data.sources import SOURCES
from cacherl_jax.text import chat

RUNS = {
    "tau_bench": ("tau-bench", "historical_trajectories/gpt-4o-airline.json", "traj"),
    "livemcpbench": ("livemcpbench", "trajectories_claude-sonnet-4.json", "messages"),
}


@pytest.fixture(scope="module", params=sorted(RUNS))
def runs(request, shared_data):
    """A corpus as its reader opens it, and the messages of each run as its file has them."""
    folder, file, field = RUNS[request.param]
    recorded = [run[field] for run in json.loads((shared_data / folder / file).read_text())]
    return request.param, SOURCES[request.param](shared_data / folder), recorded


FIGURES = {
    "tau_bench": {"calls": 1164, "distinct": 568, "conflicting": 2, "hits_while_filling": 596},
    "livemcpbench": {"calls": 814, "distinct": 795, "conflicting": 0, "hits_while_filling": 19},
}


def test_exact_keys_give_the_published_figures(runs, tmp_path):
    source, corpus, recorded = runs
    with SQLiteStore(tmp_path / "store.sqlite", mode="rw") as store:
        counted = import_transcripts(store, corpus.transcripts(), corpus.specs, "raw")
    assert counted == FIGURES[source] and corpus.problems == []
    # And from the file: name and JSON of the parsed arguments with sorted keys; the result is the next one with the call's id
    # (runs of tau-bench use an id more than once).
    results = defaultdict(set)
    calls = 0
    for messages in recorded:
        for i, message in enumerate(messages):
            for call in message.get("tool_calls") or ():
                key = call["function"]["name"] + json.dumps(json.loads(call["function"]["arguments"]), sort_keys=True)
                results[key].add(next(m["content"] for m in messages[i:] if m.get("tool_call_id") == call["id"]))
                calls += 1
    assert (calls, len(results), sum(len(r) > 1 for r in results.values())) == tuple(counted.values())[:3]


def test_half_of_tau_benchs_calls_repeat_and_its_known_effects_explain_every_conflict(shared_data, tmp_path):
    assert round(100 * FIGURES["tau_bench"]["hits_while_filling"] / FIGURES["tau_bench"]["calls"]) == 51
    for name, conflicts in (
        ("historical_trajectories/gpt-4o-airline.json", (2, 0)),
        ("derived/retail_tasks_train.jsonl", (4, 0)),
    ):
        corpus = SOURCES["tau_bench"](shared_data / "tau-bench" / name)
        found = []
        for mode in ("raw", "state"):
            with SQLiteStore(tmp_path / f"{corpus.files[0].stem}.{mode}", mode="rw") as store:
                found.append(import_transcripts(store, corpus.transcripts(), corpus.specs, mode)["conflicting"])
        assert tuple(found) == conflicts, name


def test_runs_are_rendered_as_the_official_template_does(runs, official, qwen_tokenizer):
    source, corpus, recorded = runs
    transcripts = list(corpus.transcripts())
    assert len(transcripts) == len(recorded) == {"tau_bench": 200, "livemcpbench": 95}[source]
    for number, (transcript, messages) in enumerate(zip(transcripts, recorded, strict=True)):
        tools = [corpus.specs[name] for name in transcript.tools]
        functions = [tool.to_function() for tool in tools]
        # The two templates differ in the generation prompt alone: a conversation meets both where it opens a turn.
        plain = {"thinking_model": False, "add_generation_prompt": False}
        expected = official.text(messages, functions, thinking_model=False)
        assert chat.render_official(transcript.messages, tools, **plain) == expected, transcript.id
        if number % 4 == 0:  # tokens take most of the time
            ids = chat.official_ids(qwen_tokenizer, transcript.messages, tools, **plain)
            assert ids == official.ids(expected), transcript.id
        asked = [i for i, m in enumerate(messages) if m["role"] in ("user", "tool")][-2:]
        for thinking_model, stop in ((number % 2 == 0, asked[0] + 1), (number % 2 == 1, asked[-1] + 1)):
            expected = official.text(messages[:stop], functions, thinking_model=thinking_model, prompt=True)
            options = {"thinking_model": thinking_model, "add_generation_prompt": True}
            assert chat.render_official(transcript.messages[:stop], tools, **options) == expected, transcript.id
