"""The teacher's pipeline, measured; writes its part of experiments/teacher/result.json.

Command: python experiments/teacher/run.py checks --data DATA
         python experiments/teacher/run.py endpoint
Cost:    checks: about a CPU-minute; endpoint: about five minutes, one core
Expect:  checks: no reasoning of the scripted teacher is rejected but for a few leaks; endpoint: at least 0.90 of the limit,
         no message lost, none paid twice but what was on its way at kill -9

`checks` runs `cacherl think` with the scripted teacher over recorded corpora. `endpoint` sends 10,000 messages to a server in a
process of its own, which answers after 50 ms and fails for 5 % of requests, then does it again with a kill -9 in the middle.
"""

import argparse
import concurrent.futures
import http.client
import json
import os
import random
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
TESTS = HERE.parents[1] / "tests"
FAILURES = 0.05
REASONING = json.dumps({"reasoning": "The user wants to know where it is, so I look it up by its name."})
CORPORA = {
    "tau-bench airline": ("tau_bench", "tau-bench/historical_trajectories/gpt-4o-airline.json", None),
    "LiveMCPBench": ("livemcpbench", "livemcpbench", None),
    "SGD": ("sgd", "sgd/train", 2000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("checks", "endpoint", "serve"))
    parser.add_argument("--data", type=Path, help="the folder of the corpora, for `checks`")
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.05, help="the server takes for a reply")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate-only", action="store_true", help="endpoint: without the kill")
    parser.add_argument("--smoke", action="store_true", help="seconds: 5 dialogues a corpus, 60 messages; writes no result")
    args = parser.parse_args()
    if args.what == "serve":
        serve(args.seed, args.seconds)
        return
    limit, messages = (5, 60) if args.smoke else (None, args.messages)
    with tempfile.TemporaryDirectory() as scratch:
        if args.what == "checks":
            result = {name: checks(args.data, Path(scratch) / name, *corpus, limit) for name, corpus in CORPORA.items()}
        else:
            result = endpoint(Path(scratch), messages, args.concurrency, args.seconds, args.seed)
            if not args.rate_only:
                result["killed"] = killed(Path(scratch), messages, args.concurrency, args.seconds, args.seed + 1)
    print(json.dumps(result, indent=1))
    if not args.smoke:
        path = HERE / "result.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        name = args.what if args.what == "checks" else f"{args.what}, replies after {args.seconds} s"
        path.write_text(json.dumps(known | {name: result}, indent=1) + "\n")


def think(*options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "cacherl_jax.cli", "think", "--json", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def output(process: subprocess.Popen) -> dict:
    printed, _ = process.communicate()
    assert process.returncode == 0, f"cacherl think ended with status {process.returncode}"
    return json.loads(printed)


def cpu_seconds() -> float:
    """Of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ---- checks ----------------------------------------------------------------------------------------------------------


def checks(data: Path, out: Path, source: str, path: str, most: int | None, smoke: int | None) -> dict:
    """The counts of one corpus, seconds included; what starting the command takes is in them."""
    limit = smoke or most
    began, before = time.monotonic(), cpu_seconds()
    options = ["--source", source, "--path", str(data / path), "--out", str(out)]
    result = output(think(*options, *(["--limit", str(limit)] if limit else [])))
    result["left_out"] = len(result["left_out"])
    return result | {"seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(cpu_seconds() - before, 1)}


# ---- endpoint --------------------------------------------------------------------------------------------------------


def serve(seed: int, seconds: float) -> None:
    """Answers until standard input ends, then prints what it did. The same requests fail in the same way at every try."""
    server_module = runpy.run_path(str(TESTS / "endpoint_server.py"))
    act = server_module["Act"]
    draws, kinds, times = random.Random(seed), Counter(), []
    failures = {
        "429 with Retry-After": act(status=429, headers={"Retry-After": "1"}, seconds=seconds),
        "500": act(status=500, seconds=seconds),
        "503": act(status=503, seconds=seconds),
        "connection closed": act(closes=True, seconds=seconds),
        "no completion": act(raw="<html>busy</html>", seconds=seconds),
        "reply is no JSON": act("I think that", seconds=seconds),
    }

    def answer(body: dict) -> object:
        kind = draws.choice(list(failures)) if draws.random() < FAILURES else "answered"
        kinds[kind] += 1
        times.append(time.monotonic())
        return failures.get(kind, act(REASONING, seconds=seconds))

    with server_module["Server"](answer) as server:
        print(server.url, flush=True)
        for _ in sys.stdin:  # each line asks how many requests have come
            print(len(server.requests), flush=True)
        twice = sum(times - 1 for times in server.served.values())
    served = {"requests": len(server.requests), "kinds": dict(sorted(kinds.items())), "most_at_once": server.most_at_once}
    served["seconds"] = round(times[-1] - times[0] + seconds, 2)  # from the first request to the last reply
    print(json.dumps(served | {"completions": sum(server.served.values()), "served_again": twice}))


class Served:
    """The server in a process of its own, so that its work and the client's are told apart."""

    def __init__(self, seed: int, seconds: float) -> None:
        command = [sys.executable, str(Path(__file__)), "serve", "--seed", str(seed), "--seconds", str(seconds)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = self._process.stdout.readline().strip()

    def requests(self) -> int:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def end(self) -> dict:
        self._process.stdin.close()
        printed = json.loads(self._process.stdout.read())
        self._process.wait()
        return printed


def chats(path: Path, messages: int) -> Path:
    """Transcripts of two assistant messages, a bare call and an answer: one request each."""
    with path.open("w") as f:
        for n in range(messages // 2):
            call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": json.dumps({"thing": f"thing {n}"})}}
            turns = [
                {"role": "user", "content": f"Where is thing {n}? " + "I have looked for it all over the house. " * 20},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": json.dumps({"place": f"shelf {n}"})},
                {"role": "assistant", "content": f"It stands on shelf {n}."},
            ]
            f.write(json.dumps({"messages": turns}) + "\n")
    return path


def options(server: Served, scratch: Path, name: str, messages: int, concurrency: int) -> list[str]:
    settings = {"kind": "http", "base_url": server.url, "model": "m", "concurrency": concurrency, "timeout": 10.0}
    sets = [f"--set=teacher.{field}={value}" for field, value in settings.items()]
    corpus = chats(scratch / "chats.jsonl", messages)
    return ["--source", "openai", "--path", str(corpus), "--out", str(scratch / name), *sets]


def endpoint(scratch: Path, messages: int, concurrency: int, seconds: float, seed: int) -> dict:
    """The rate, beside that of a bare socket client at the same time on the same machine."""
    load = os.getloadavg()[0]
    server, before = Served(seed, seconds), cpu_seconds()
    result = output(think(*options(server, scratch, "whole", messages, concurrency)))
    cpu, served = cpu_seconds() - before, server.end()
    limit = concurrency / seconds
    rate = served["requests"] / served["seconds"]
    return {
        **{name: result[name] for name in ("messages", "written", "empty", "rejected", "tries", "requests")},
        "concurrency": concurrency,
        "requests_per_second": round(rate, 1),
        "limit": limit,
        "share_of_limit": round(rate / limit, 3),
        "bare_client_share": bare(concurrency, seconds, seed),
        "client_cpu_seconds": round(cpu, 1),  # imports included
        "server": served,
        "cores": os.cpu_count(),
        "load_before_and_after": [round(load, 1), round(os.getloadavg()[0], 1)],
    }


def bare(concurrency: int, seconds: float, seed: int) -> float:
    """The share of the limit that blocking sockets reach, without any work: what this machine leaves of it."""
    server = Served(seed, seconds)
    host = urllib.parse.urlsplit(server.url).netloc
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 2000}]})

    def work(_: int) -> None:
        connection = http.client.HTTPConnection(host)
        for _ in range(50):
            try:
                connection.request("POST", "/v1/chat/completions", body)
                connection.getresponse().read()
            except (OSError, http.client.HTTPException):
                connection.close()
        connection.close()

    with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(work, range(concurrency)))
    served = server.end()
    return round(served["requests"] / served["seconds"] / (concurrency / seconds), 3)


def killed(scratch: Path, messages: int, concurrency: int, seconds: float, seed: int) -> dict:
    """kill -9 after half of the messages; the same command goes on."""
    server = Served(seed, seconds)
    command = options(server, scratch, "killed", messages, concurrency)
    process = think(*command)
    while server.requests() < messages / 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    asked = server.requests()
    result = output(think(*command))
    lines = (scratch / "killed" / "think" / "transcripts.jsonl").read_text().splitlines()
    return {
        "requests_before_kill": asked,
        **{name: result[name] for name in ("from_store", "messages", "written")},
        "transcripts": len(lines),
        "server": server.end(),
    }


if __name__ == "__main__":
    main()
