"""tau-bench (Yao et al. 2024, arXiv 2406.12045; MIT): recorded runs, and ground-truth actions with their responses.

Runs are JSON lists as upstream has them (historical_trajectories/gpt-4o-airline.json). Ground truth is JSON lines
(derived/airline_tasks_test.jsonl): a task's instruction as the user's message, then each action with what the official
tool answered; what the agent would have said is not recorded. Tool definitions are those of derived/tools_DOMAIN.jsonl or,
where that is absent, inferred. The two domains share names of tools, so one opened corpus has one domain.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cacherl_jax.config import ConfigError
from cacherl_jax.data.recorded import (
    UNREADABLE,
    Recorded,
    Report,
    find,
    infer_specs,
    line_records,
    list_records,
    pair_results,
    read_bytes,
)
from cacherl_jax.types import Effects, Message, ToolCall, ToolSpec, Transcript

LICENCE = "MIT"
ATTRIBUTION = "tau-bench, Yao et al. 2024 (arXiv 2406.12045), https://github.com/sierra-research/tau-bench"


def _effects(reads: str = "", writes: str = "") -> Effects:
    return Effects(tuple(reads.split()), tuple(writes.split()))


# What the official tools read and write of their database: the known truth for effect labels. Payments move a balance that
# the user's record holds; flights and products never change.
EFFECTS: dict[str, dict[str, Effects]] = {
    "airline": {
        "book_reservation": _effects("users reservations flights", "users reservations"),
        "calculate": _effects(),
        "cancel_reservation": _effects("reservations", "reservations"),
        "get_reservation_details": _effects("reservations"),
        "get_user_details": _effects("users"),
        "list_all_airports": _effects(),
        "search_direct_flight": _effects("flights"),
        "search_onestop_flight": _effects("flights"),
        "send_certificate": _effects("users", "users"),
        "think": _effects(),
        "transfer_to_human_agents": _effects(),
        "update_reservation_baggages": _effects("users reservations", "users reservations"),
        "update_reservation_flights": _effects("users reservations flights", "users reservations"),
        "update_reservation_passengers": _effects("reservations", "reservations"),
    },
    "retail": {
        "calculate": _effects(),
        "cancel_pending_order": _effects("orders users", "orders users"),
        "exchange_delivered_order_items": _effects("orders users products", "orders"),
        "find_user_id_by_email": _effects("users"),
        "find_user_id_by_name_zip": _effects("users"),
        "get_order_details": _effects("orders"),
        "get_product_details": _effects("products"),
        "get_user_details": _effects("users"),
        "list_all_product_types": _effects("products"),
        "modify_pending_order_address": _effects("orders", "orders"),
        "modify_pending_order_items": _effects("orders users products", "orders users"),
        "modify_pending_order_payment": _effects("orders users", "orders users"),
        "modify_user_address": _effects("users", "users"),
        "return_delivered_order_items": _effects("orders users", "orders"),
        "think": _effects(),
        "transfer_to_human_agents": _effects(),
    },
}


def read(path: Path) -> Recorded:
    """Opens the runs of tau-bench's folder, or one file of runs or of ground truth.

    Raises ConfigError for a folder without runs or with those of both domains, and for a file of neither domain.
    """
    files = (path,) if path.is_file() else find(path / "historical_trajectories", "*.json")
    if not files:
        raise ConfigError(
            f"{path} holds no historical_trajectories/*.json; give the folder of tau-bench, a file of that folder, or a file "
            "such as derived/retail_tasks_train.jsonl"
        )
    domains = {domain(file) for file in files}
    if len(domains) > 1:
        raise ConfigError(f"{path} holds runs of {' and '.join(sorted(domains))}, whose tools share names; give one file")
    (of,) = domains
    specs, schemas = _specs(files[0].parent.parent / "derived", of)
    runs = files[0].name.removesuffix(".gz").endswith(".json")

    def tools() -> tuple[str, ...]:
        return tuple(specs)

    corpus = Recorded(
        files=files,
        specs=specs,
        records=_runs if runs else _tasks,
        convert=lambda record, report: run(record, tools(), report) if runs else ground_truth(record, tools()),
        licence=LICENCE,
        attribution=ATTRIBUTION,
        schemas=schemas,
    )
    if not schemas:
        specs.update(infer_specs(corpus.transcripts(), EFFECTS[of]))
    return corpus


def domain(file: Path) -> str:
    """airline or retail, by the file's name. Raises ConfigError for another name."""
    for name in EFFECTS:
        if name in file.name:
            return name
    raise ConfigError(f"{file.name}: neither airline nor retail is in the file's name")


def rewards(path: Path) -> dict[str, float]:
    """The reward of each run that `read(path)` reads, by its transcript's id; a run without one is left out."""
    corpus = read(path)
    found: dict[str, float] = {}

    def noting_reward(record: tuple[str, Mapping[str, Any]], report: Report) -> Transcript:
        transcript = run(record, (), report)
        found[transcript.id] = float(record[1]["reward"])
        return transcript

    for _ in replace(corpus, convert=noting_reward).transcripts():
        pass
    return found


def _specs(folder: Path, of: str) -> tuple[dict[str, ToolSpec], tuple[Path, ...]]:
    files = find(folder, f"tools_{of}.jsonl")
    specs = {}
    for file in files:
        try:
            for line in read_bytes(file).splitlines():
                function = json.loads(line)["function"]
                name = function["name"]
                effects = EFFECTS[of].get(name, Effects())
                specs[name] = ToolSpec(name, function["description"], function["parameters"], effects)
        except (*UNREADABLE, LookupError, TypeError) as error:
            raise ConfigError(f"{file} is no list of tool definitions: {type(error).__name__} {error}") from error
    return specs, files


def _runs(file: Path) -> Iterator[tuple[str, tuple[str, Any]]]:
    """The runs of a file, each with the file's name: "gpt-4o-airline"."""
    for number, (_, record) in enumerate(list_records("run", "task_id")(file)):
        yield f"run {number}", (file.name.removesuffix(".gz").removesuffix(".json"), record)


def _tasks(file: Path) -> Iterator[tuple[str, tuple[str, bytes]]]:
    """The lines of a file of tasks, each with the file's name: "airline_tasks_test"."""
    for name, line in line_records(file):
        yield name, (file.name.removesuffix(".gz").removesuffix(".jsonl"), line)


def _run_id(stem: str, run: Mapping[str, Any]) -> str:
    return f"{stem}/{run['task_id']}/{run['trial']}"


def run(record: tuple[str, Mapping[str, Any]], tools: tuple[str, ...], report: Report) -> Transcript:
    """A recorded run. Upstream ran the tasks of the test split."""
    stem, content = record
    messages = []
    for message in map(Message.from_json, content["traj"]):
        failed = message.role == "tool" and message.content.startswith("Error")
        messages.append(replace(message, error="tool_error") if failed else message)
    agent, _, of = stem.rpartition("-")
    task = f"{of}/test/{content['task_id']}"
    return Transcript(_run_id(stem, content), task, agent, tools, pair_results(messages, report))


def ground_truth(record: tuple[str, bytes], tools: tuple[str, ...]) -> Transcript:
    """A task's instruction and the actions that solve it, with their responses."""
    stem, line = record
    task = json.loads(line)
    messages = [Message("user", task["instruction"])]
    for i, action in enumerate(task["ground_truth"]):
        call = ToolCall(action["name"], json.dumps(action["arguments"], ensure_ascii=False), id=f"call_{i}")
        response = action["response"]
        if not isinstance(response, str):
            raise TypeError(f"response of {call.name} is {type(response).__name__}, expected text")
        error = "tool_error" if response.startswith("Error") else None
        messages.append(Message("assistant", tool_calls=(call,)))
        messages.append(Message("tool", response, tool_call_id=call.id, error=error))
    of, _, split = stem.split("_")
    name = f"{of}/{split}/{task['task_id']}"
    return Transcript(f"{stem}/{task['task_id']}", name, "ground_truth", tools, tuple(messages))
