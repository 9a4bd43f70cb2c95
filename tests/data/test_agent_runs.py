"""tau-bench and LiveMCPBench: what their readers make of the files, and what they leave out by name; whose the corpora are."""

import json

import pytest

from cacherl_jax.config import ConfigError
from cacherl_jax.data import livemcpbench, tau_bench
from cacherl_jax.data.sources import SOURCES
from cacherl_jax.types import Message, ToolCall

# ---- tau-bench -------------------------------------------------------------------------------------------------------

CALL = {"id": "c", "type": "function", "function": {"name": "cancel_reservation", "arguments": '{"reservation_id":"A"}'}}
RUN = {
    "task_id": 3,
    "trial": 1,
    "reward": 1.0,
    "traj": [
        {"role": "user", "content": "Cancel A."},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "name": "cancel_reservation", "content": "Error: reservation not found"},
        {"role": "assistant", "content": "There is none."},
    ],
}
ACTION = {"name": "send_certificate", "arguments": {"user_id": "x", "amount": 5}, "response": "ok"}
TASK = {"task_id": 8, "user_id": "x", "instruction": "You want money.", "outputs": [], "ground_truth": [ACTION]}


def write_tau_bench(folder, runs=(RUN,), tasks=(TASK,)):
    for name in ("historical_trajectories", "derived"):
        (folder / name).mkdir(parents=True)
    (folder / "historical_trajectories" / "some-model-airline.json").write_text(json.dumps(runs))
    lines = [task if isinstance(task, str) else json.dumps(task) for task in tasks]
    (folder / "derived" / "airline_tasks_test.jsonl").write_text("\n".join(lines))
    return folder


def test_a_run_and_a_ground_truth_task_without_tool_definitions(tmp_path):
    root = write_tau_bench(tmp_path)
    runs = tau_bench.read(root)
    (run,) = runs.transcripts()
    assert (run.id, run.task_id, run.agent) == ("some-model-airline/3/1", "airline/test/3", "some-model")
    assert run.messages[2] == Message("tool", "Error: reservation not found", tool_call_id="c", error="tool_error")
    assert tau_bench.rewards(root) == {run.id: 1.0}
    (spec,) = runs.specs.values()
    assert (spec.name, spec.effects.writes) == ("cancel_reservation", ("reservations",))
    assert spec.parameters["properties"] == {"reservation_id": {"type": "string"}}
    (task,) = tau_bench.read(root / "derived" / "airline_tasks_test.jsonl").transcripts()
    assert (task.id, task.task_id, task.agent) == ("airline_tasks_test/8", "airline/test/8", "ground_truth")
    assert task.messages == (
        Message("user", "You want money."),
        Message("assistant", tool_calls=(ToolCall("send_certificate", '{"user_id": "x", "amount": 5}', "call_0"),)),
        Message("tool", "ok", tool_call_id="call_0"),
    )


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (5, "TypeError"),
        ({k: v for k, v in RUN.items() if k != "traj"}, "KeyError 'traj'"),
        ({**RUN, "traj": [{"role": "bot"}]}, "ValueError message role 'bot'"),
        ({k: v for k, v in RUN.items() if k != "trial"}, "KeyError 'trial'"),
    ],
)
def test_a_malformed_run_costs_only_itself(tmp_path, run, reason):
    corpus = tau_bench.read(write_tau_bench(tmp_path, runs=[RUN, run, {**RUN, "trial": 2}]))
    assert [t.id for t in corpus.transcripts()] == ["some-model-airline/3/1", "some-model-airline/3/2"]
    (problem,) = corpus.problems
    assert problem.startswith(f"some-model-airline.json, run 1: {reason}")
    assert set(tau_bench.rewards(tmp_path)) == {"some-model-airline/3/1", "some-model-airline/3/2"}


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ('{"task_id": 8, "ins', "JSONDecodeError"),
        ({**TASK, "ground_truth": [{**ACTION, "response": {}}]}, "TypeError response of send_certificate is dict"),
        ({**TASK, "ground_truth": [{"name": "x"}]}, "KeyError 'arguments'"),
    ],
)
def test_a_malformed_task_costs_only_itself(tmp_path, task, reason):
    root = write_tau_bench(tmp_path, tasks=[TASK, task, {**TASK, "task_id": 9}])
    corpus = tau_bench.read(root / "derived" / "airline_tasks_test.jsonl")
    assert [t.id for t in corpus.transcripts()] == ["airline_tasks_test/8", "airline_tasks_test/9"]
    (problem,) = corpus.problems
    assert problem.startswith(f"airline_tasks_test.jsonl, line 2: {reason}")


def test_domains_are_not_mixed(tmp_path):
    root = write_tau_bench(tmp_path)
    (root / "historical_trajectories" / "some-model-retail.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds runs of airline and retail, whose tools share names; give one file"):
        tau_bench.read(root)
    (root / "historical_trajectories" / "telecom.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"telecom\.json: neither airline nor retail"):
        tau_bench.read(root / "historical_trajectories" / "telecom.json")
    (root / "derived" / "tools_retail.jsonl").write_text('{"type": "function"}')
    with pytest.raises(ConfigError, match=r"tools_retail\.jsonl is no list of tool definitions: KeyError 'function'"):
        tau_bench.read(root / "historical_trajectories" / "some-model-retail.json")


def test_tau_benchs_files(shared_data):
    root = shared_data / "tau-bench"
    file = root / "historical_trajectories" / "gpt-4o-airline.json"
    recorded = {f"gpt-4o-airline/{r['task_id']}/{r['trial']}": r["reward"] for r in json.loads(file.read_text())}
    assert tau_bench.rewards(root) == recorded and len(recorded) == 200
    for name, domain, count in (
        ("airline_tasks_test", "airline", 50),
        ("retail_tasks_dev", "retail", 20),
        ("retail_tasks_train", "retail", 500),
    ):
        tasks = [json.loads(line) for line in (root / "derived" / f"{name}.jsonl").read_text().splitlines()]
        corpus = tau_bench.read(root / "derived" / f"{name}.jsonl")
        transcripts = list(corpus.transcripts())
        assert len(transcripts) == len({t.id for t in transcripts}) == count and corpus.problems == []
        for transcript, task in zip(transcripts, tasks, strict=True):
            calls = [(call.name, call.parsed()) for m in transcript.messages for call in m.tool_calls]
            assert calls == [(action["name"], action["arguments"]) for action in task["ground_truth"]]
            responses = [m.content for m in transcript.messages if m.role == "tool"]
            assert responses == [action["response"] for action in task["ground_truth"]]
        assert {n: s.effects for n, s in corpus.specs.items()} == tau_bench.EFFECTS[domain]
        assert all(set(t.tools) == set(corpus.specs) for t in transcripts)


# ---- LiveMCPBench ----------------------------------------------------------------------------------------------------

MCP_TOOL = {"name": "search", "description": None, "inputSchema": {"type": "object", "properties": {"q": {"type": "string"}}}}
MCP = [{"name": "Web", "tools": {"web": {"server_name": "web", "tools": [MCP_TOOL]}}}]


def mcp_run(task, content, ids=("c",)):
    calls = [{"id": i, "type": "function", "function": {"name": "route", "arguments": '{"query": "web"}'}} for i in ids]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "So:", "tool_calls": calls}]
    return {"task_id": task, "messages": [*messages, *({"role": "tool", "tool_call_id": i, "content": content} for i in ids)]}


def test_livemcpbenchs_runs_errors_and_servers(tmp_path):
    runs = [mcp_run("a", "x isError=False"), {}, mcp_run("b", "x isError=True"), mcp_run("c", "Tool call timed out.")]
    (tmp_path / "trajectories_some-model.json").write_text(json.dumps(runs))
    (tmp_path / "tools.json").write_text(json.dumps(MCP))
    corpus = livemcpbench.read(tmp_path)
    transcripts = list(corpus.transcripts())
    assert [(t.id, t.task_id, t.agent, t.tools) for t in transcripts] == [
        (f"some-model/{name}", name, "some-model", ("route",)) for name in "abc"
    ]
    assert [t.messages[-1].error for t in transcripts] == [None, "tool_error", "timeout"]
    assert corpus.problems == ["trajectories_some-model.json, run 1: KeyError 'messages'"]
    assert {n: s.parameters["properties"] for n, s in corpus.specs.items()} == {
        "web.search": {"q": {"type": "string"}},
        "route": {"query": {"type": "string"}},
    }
    (tmp_path / "tools.json").write_text('[{"name": "Web"}]')
    with pytest.raises(ConfigError, match=r"tools\.json is no list of MCP servers' tools: KeyError 'tools'"):
        livemcpbench.read(tmp_path)
    (tmp_path / "tools.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no tools\.json"):
        livemcpbench.read(tmp_path)


# ---- all -------------------------------------------------------------------------------------------------------------


def test_licences_are_those_of_the_folders(shared_data):
    folders = {"tau_bench": "tau-bench"} | {name: name for name in ("sgd", "taskmaster4", "star", "livemcpbench")}
    for source, folder in folders.items():
        lines = (shared_data / folder / "SOURCE.md").read_text().splitlines()
        stated = next(line.removeprefix("Licence: ") for line in lines if line.startswith("Licence: "))
        home = next(line.removeprefix("Source: ") for line in lines if line.startswith("Source: "))
        corpus = SOURCES[source](shared_data / folder / ("dev" if source == "sgd" else ""))
        assert stated.startswith(corpus.licence) and home in corpus.attribution
