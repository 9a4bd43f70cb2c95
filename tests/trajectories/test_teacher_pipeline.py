"""A language model as teacher: a server that misbehaves in every way it can, budgets, interruptions, and what is sent."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from endpoint_server import Act, Server

from cacherl_jax import cli, metrics
from cacherl_jax.config import TeacherConfig
from cacherl_jax.trajectories import pipeline
from cacherl_jax.trajectories.paid import TeacherStopped
from cacherl_jax.trajectories.prompts import prompt_hash
from cacherl_jax.trajectories.transcripts import read_transcripts
from cacherl_jax.types import Message, ToolCall, ToolSpec, Transcript

pytest.importorskip("openai", reason="the extra 'teacher' is not installed")

SPECS = {"find": ToolSpec("find", "Finds things.", {"type": "object"})}
GOOD = json.dumps({"reasoning": "Because the user asks for it."})
SILENT = metrics.progress_factory(enabled=False)


def transcript(n, *, said="Let me look it up.", told="It is there.", asked="Where is it?", result='{"place": "Oslo"}'):
    call = ToolCall.of("find", thing=f"thing {n}")
    messages = (
        Message("user", f"{asked} Thing {n}."),
        Message("assistant", said, tool_calls=(call,)),
        Message("tool", result),
        Message("assistant", told),
    )
    return Transcript(f"t{n}", "task", "agent", ("find",), messages)


def single(n=0, *, told="Hello there.", later="later-7"):
    """One assistant message, without a call, and a result that comes after it."""
    messages = (Message("user", f"Hello {n}"), Message("assistant", told), Message("user", "Go on"), Message("tool", later))
    return Transcript(f"s{n}", "task", "agent", ("find",), messages)


def teacher(server, **fields):
    fast = {"timeout": 5.0, "retries": 2, "concurrency": 4, "price_prompt": 1.0, "price_completion": 10.0}
    return TeacherConfig(kind="http", base_url=server.url, model="m", **(fast | fields))


def run(folder, transcripts, config, seed=0, progress=SILENT):
    return pipeline.run(folder, pipeline.Job(transcripts, SPECS, config, seed), progress)


def rows(folder):
    return [json.loads(line) for line in (folder / "provenance.jsonl").read_text().splitlines()]


def role_or_reason(body):
    """What a good server replies, with the asked role by the text."""
    said = body["messages"][1]["content"]
    if '"role"' not in body["messages"][0]["content"]:
        return GOOD
    return json.dumps({"role": "analytical" if "Let me look" in said else "user_facing"})


def in_turn(*acts):
    """A server's acts, one a request; the last one for ever."""
    left = list(acts)
    return lambda body: left.pop(0) if len(left) > 1 else left[0]


BAD = Act(status=400)


@pytest.mark.parametrize(
    ("acts", "rejected", "requests", "fields"),
    [
        ((GOOD,), [], 1, {}),
        ((Act(status=429, headers={"Retry-After": "0.4"}), GOOD), [], 2, {}),
        ((Act(status=500), Act(status=503), GOOD), [], 3, {}),
        ((Act(seconds=5.0), GOOD), [], 2, {"timeout": 0.2}),
        ((Act(closes=True), GOOD), [], 2, {}),
        ((Act(raw="<html>busy"), Act(raw="{}"), GOOD), [], 3, {}),
        (("Because so.", GOOD), ["no_json"], 2, {}),
        ((json.dumps({"thought": "x y"}), json.dumps({"reasoning": 7}), GOOD), ["wrong_schema"] * 2, 3, {}),
        (("", GOOD), ["empty"], 2, {}),
        ((Act(GOOD[:20], finish="length"), GOOD), ["cut"], 2, {}),
        ((json.dumps({"reasoning": "so " * 50}), GOOD), ["long"], 2, {"max_words": 49}),
        ((json.dumps({"reasoning": "It will be later-7."}), GOOD), ["leak"], 2, {}),
        ((json.dumps({"reasoning": "I greet.</think> Hello"}), GOOD), ["marks"], 2, {}),
        (("Not at all.",), ["no_json"] * 3, 3, {}),
        ((json.dumps({"reasoning": "half \ud800 a pair"}),), [], 1, {}),
        ((Act(GOOD, counts=False),), [], 1, {}),
        ((Act(GOOD, usage={"total_tokens": 9, "completion_tokens": None}),), [], 1, {}),
        ((BAD, GOOD), [], 2, {}),  # json_schema refused: json_object then
    ],
)
def test_a_server_that_misbehaves(tmp_path, acts, rejected, requests, fields):
    began = time.monotonic()
    with Server(in_turn(*acts)) as server:
        result = run(tmp_path, [single()], teacher(server, **fields))
        bodies = server.requests
    assert len(bodies) == requests and result["rejected"] == ({rejected[0]: len(rejected)} if rejected else {})
    (row,) = rows(tmp_path)
    assert row["rejected"] == rejected and row["how"] == ("empty" if len(rejected) == 3 else "written")
    assert row["teacher"] == "m" and row["prompt"] == prompt_hash() and row["completion_tokens"] > 0
    seeds = [body["seed"] for body in bodies]
    assert len(set(seeds)) == max(
        1, len(rejected) + (row["how"] == "written")
    )  # another seed for what was rejected, not for a retry
    kinds = [body["response_format"]["type"] for body in bodies]
    assert kinds == (["json_schema", "json_object"] if acts[0] is BAD else ["json_schema"] * requests)
    assert not isinstance(acts[0], Act) or acts[0].status != 429 or time.monotonic() - began >= 0.4


@pytest.mark.parametrize(
    ("acts", "message"),
    [
        ((Act(status=401),), "HTTP status 401"),
        ((Act(status=500),), "failed 2 times in a row: HTTP status 500"),
        ((BAD,), "refused"),
    ],
)
def test_an_endpoint_that_cannot_be_used_ends_the_run(tmp_path, acts, message):
    with Server(in_turn(*acts)) as server, pytest.raises(TeacherStopped, match=message):
        run(tmp_path, [single()], teacher(server, retries=1))
    assert not (tmp_path / "transcripts.jsonl").exists()


@pytest.mark.parametrize(("status", "reason", "concurrency"), [(413, "refused", 4), (500, "failed", 4), (500, "failed", 1)])
def test_what_the_endpoint_cannot_do_costs_only_itself(tmp_path, status, reason, concurrency):
    """Also where it comes first, as often as requests are on their way."""

    def answer(body):
        number = int(re.search(r"Hello (\d+)", body["messages"][1]["content"])[1])
        return Act(status=status) if number < concurrency else Act(GOOD, seconds=0.02)

    with Server(answer) as server:
        made = run(tmp_path, [single(n) for n in range(12)], teacher(server, concurrency=concurrency, retries=0))
    assert (made["written"], made["empty"], made["rejected"]) == (12 - concurrency, concurrency, {reason: concurrency})
    assert [row["how"] for row in rows(tmp_path)] == ["empty"] * concurrency + ["written"] * (12 - concurrency)


def test_an_outage_that_ends_loses_nothing(tmp_path):
    """While it is away others wait as well; what was on its way then gets its reply after all."""
    came = []

    def answer(body):
        came.append(body)
        return Act(status=503) if 5 <= len(came) <= 8 else Act(GOOD, seconds=0.02)

    with Server(answer) as server:
        made = run(tmp_path, [single(n) for n in range(12)], teacher(server, retries=0))
    assert (made["written"], made["rejected"], len(came)) == (12, {}, 12 + 4)


def test_places_are_held_until_the_reply_is_there_and_refusals_are_forgotten(tmp_path):
    def answer(body):
        long = "Hello 7" in body["messages"][1]["content"]
        return Act(status=413) if long and not taken else Act(GOOD, seconds=0.02, head_first=True)

    taken = []
    with Server(answer) as server:
        run(tmp_path, [single()], teacher(server, concurrency=2))
        first = run(tmp_path, [single(n) for n in range(12)], teacher(server, concurrency=2))
        assert server.most_at_once == 2 and len(server.requests) == 12 + 1  # the refused one without a schema as well, once
        assert (first["written"], first["empty"], first["rejected"]) == (11, 1, {"refused": 1})
        taken.append(True)  # by a server with more room
        again = run(tmp_path, [single(n) for n in range(12)], teacher(server, concurrency=2))
    assert (again["written"], again["requests"], again["from_store"]) == (12, 1, 11)


def test_order_roles_provenance_and_what_is_sent(tmp_path):
    huge = json.dumps({"text": "x" * 50_000})
    transcripts = [transcript(n, result=huge, asked="half \ud800 a pair" if n else "Where?") for n in range(20)]
    transcripts[15:] = [transcript(n, result=huge, said="I look it up for you.") for n in range(15, 20)]
    with Server(lambda body: Act(role_or_reason(body), seconds=0.02 * (len(body["messages"][1]["content"]) % 3))) as server:
        result = run(tmp_path, transcripts, teacher(server, max_past=4000))
        bodies, at_once = list(server.requests), server.most_at_once
        again = run(tmp_path / "again", transcripts, teacher(server, max_past=4000))
    thought, _ = read_transcripts(tmp_path / "transcripts.jsonl")
    assert [t.id for t in thought] == [t.id for t in transcripts] and 2 <= at_once <= 4
    assert [(r["transcript"], r["message"], r["how"]) for r in rows(tmp_path)] == [
        (f"t{n}", i, how) for n in range(20) for i, how in ((1, "wrapped" if n < 15 else "written"), (3, "written"))
    ]
    assert thought[0].messages[1].reasoning == "Let me look it up." and thought[0].messages[3].content == "It is there."
    spent = [sum(r[f"{kind}_tokens"] for r in rows(tmp_path)) for kind in ("prompt", "completion")]
    assert [result["prompt_tokens"], result["completion_tokens"]] == spent and result["requests"] == len(bodies) == 45
    assert result["money"] == pytest.approx((spent[0] + 10 * spent[1]) / 1e6) and again["wrapped"] == 15
    firsts = 0
    for body in bodies:
        text = body["messages"][1]["content"]
        assert len(text) < 9000 and ("Thing" in text)
        if "calls find" in text.partition("The agent's next message:")[2]:  # the first message: nothing that came after it
            assert "xxx" not in text and "It is there." not in text
            firsts += 1
        elif "It is there." in text:
            assert "characters are left out]" in text
    assert firsts == 5


def test_equal_requests_are_asked_once_and_stored_ones_never_again(tmp_path):
    same = [dataclasses.replace(single(), id=f"copy {n}") for n in range(12)]
    with Server(lambda body: Act(GOOD, seconds=0.05)) as server:
        first = run(tmp_path, same, teacher(server))
        second = run(tmp_path, same, teacher(server))
        assert len(server.requests) == 1
        assert (first["requests"], second["requests"], second["from_store"], second["money"]) == (1, 0, 12, first["money"])
        run(tmp_path, same, teacher(server), seed=1)
        assert len(server.requests) == 2
    paid = pipeline.dry_run(tmp_path, pipeline.Job(same, SPECS, teacher(server), 0))
    assert (paid["messages"], paid["requests"], paid["paid_before"], paid["money_at_most"]) == (12, 0, 12, 0)


@pytest.mark.parametrize("budget", [{"budget_tokens": 3000}, {"budget_money": 0.012}])
def test_a_budget_stops_before_it_is_overspent_and_a_larger_one_goes_on(tmp_path, budget):
    transcripts = [single(n) for n in range(30)]
    with Server(lambda body: Act(GOOD, seconds=0.01)) as server:
        small = teacher(server, max_tokens=500, **budget)
        for _ in range(2):
            with pytest.raises(
                TeacherStopped, match=r"the budget of teacher\.budget_\w+=\S+ leaves no room for a request of up to [\d.]+"
            ):
                run(tmp_path, transcripts, small)
            done = len(server.requests)
        assert 1 <= done < 30 and not (tmp_path / "transcripts.jsonl").exists()
        result = run(tmp_path, transcripts, dataclasses.replace(small, budget_tokens=0, budget_money=0))
        assert len(server.requests) == 30 and result["requests"] == 30 - done and result["written"] == 30
        assert set(server.served.values()) == {1}


def test_ctrl_c_keeps_what_is_paid(tmp_path):
    def press(body):
        if len(server.requests) == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return Act(GOOD, seconds=0.05)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    transcripts = [single(n) for n in range(40)]
    with Server(press) as server:
        try:
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path, transcripts, teacher(server))
        finally:
            signal.signal(signal.SIGINT, before)
        asked = len(server.requests)
        assert 10 <= asked < 40 and not (tmp_path / "transcripts.jsonl").exists()
        assert run(tmp_path, transcripts, teacher(server))["requests"] == 40 - asked
        assert set(server.served.values()) == {1} and len(server.served) == 40


def corpus(path, transcripts):
    lines = [{"messages": [m.to_json() for m in t.messages]} for t in transcripts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_corpus_by_the_command_line_killed_and_resumed(tmp_path, capsys):
    path = corpus(tmp_path / "chats.jsonl", [transcript(n) for n in range(40)])
    out = tmp_path / "out"
    base = ["think", "--source", "openai", "--path", str(path), "--out", str(out), "--json", "--limit", "30"]
    assert cli.main([*base, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out) == {"transcripts": 30, "messages": 60, "left_out": []} and not out.exists()
    with Server(lambda body: Act(role_or_reason(body), seconds=0.05)) as server:
        sets = ("kind=http", f"base_url={server.url}", "model=m", "concurrency=4")
        base += [f"--set=teacher.{name}" for name in sets]
        child = subprocess.Popen([sys.executable, "-m", "cacherl_jax.cli", *base], env=os.environ | {"PYTHONPATH": os.getcwd()})
        threading.Thread(target=lambda: (wait_for(lambda: len(server.requests) >= 12), child.kill())).start()
        assert child.wait() == -signal.SIGKILL
        asked = dict(server.served)
        assert cli.main([*base, "--tfds"]) == 0
        result = json.loads(capsys.readouterr().out)
        twice = sum(times > 1 for times in server.served.values())
    assert result["from_store"] >= len(asked) - 4 and twice <= 4 and len(server.served) == 60 and result["messages"] == 60
    import tensorflow_datasets as tfds

    examples = list(tfds.builder_from_directory(result["tfds"]).as_data_source("train"))
    lines = (out / "think" / "transcripts.jsonl").read_text().splitlines()
    assert [e["json"].decode() for e in examples] == lines and len(lines) == 30
    assert [row for e in examples for row in json.loads(e["provenance"])] == rows(out / "think")
    assert cli.main(base[:5] + ["--out", str(out), "--limit", "29"]) == 2 and "limit" in capsys.readouterr().err
    (tmp_path / "larger" / "think").mkdir(parents=True)
    shutil.copy(out / "think" / "replies.sqlite", tmp_path / "larger" / "think")
    other = ["--out", str(tmp_path / "larger"), "--limit", "35", "--dry-run"]
    assert cli.main([*base, *other]) == 0 and json.loads(capsys.readouterr().out)["paid_before"] == 60


def wait_for(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)


def test_a_folder_without_both_options_is_refused(tmp_path, capsys):
    for wrong in (["--source", "sgd"], ["--limit", "3"], ["--source", "none", "--path", str(tmp_path)]):
        assert cli.main(["think", "--out", str(tmp_path / "x"), *wrong]) == 2
        assert "--source" in capsys.readouterr().err


def test_the_experiment_runs_small():
    """experiments/teacher in seconds: the rate's arithmetic, not the rate."""
    program = Path(__file__).parents[2] / "experiments" / "teacher" / "run.py"
    done = subprocess.run([sys.executable, program, "endpoint", "--smoke", "--rate-only"], capture_output=True, text=True)
    result = json.loads(done.stdout)
    assert result["messages"] == result["written"] == 60 and result["tries"] == result["server"]["requests"] >= 60
    assert result["server"]["served_again"] == 0 and 0 < result["share_of_limit"] <= 1
