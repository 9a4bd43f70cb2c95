"""The embedded world: right by construction, splits that share nothing, labels that hold, guards that cannot be passed."""

import copy
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import pytest

from cacherl_jax.config.data import WorldFamily
from cacherl_jax.evaluate.process_accuracy import process_accuracy
from cacherl_jax.tools import registry
from cacherl_jax.tools.record import record
from cacherl_jax.tools.world import LiveTools, make_tasks, tool_specs
from cacherl_jax.tools.world.database import DAYS, SPLITS, database
from cacherl_jax.tools.world.phrasing import CORES, phrases
from cacherl_jax.tools.world.tasks import FAMILIES
from cacherl_jax.types import Kind, Tier, ToolCall

COUNTS = {"train": 600, "validation": 100, "test": 400}


@pytest.fixture(scope="module")
def tasks():
    return {split: make_tasks(split, count, seed=3) for split, count in COUNTS.items()}


def test_every_reference_replays_live_to_its_facts(tasks):
    for split, members in tasks.items():
        provider = LiveTools(split, 3)
        for task in members:
            for reference in task.references:
                session = provider.start(task, 0)
                observed = [session.execute(call, 0) for call in reference]
                assert all(registry.check_call(tool_specs(), call) is None for call in reference)
                assert all((o.tier, o.kind, o.fidelity) == (Tier.LIVE, Kind.LIVE, 1.0) for o in observed)
                text = " ".join(o.result.content for o in observed)
                assert not reference or all(fact in text for fact in task.facts), task


def test_families_have_their_calls_and_their_errors(tasks):
    lengths = {"no_call": {0}, "one_call": {1}, "chain2": {2}, "chain3": {3}, "chain4": {4}, "choose": {2}}
    seen = {task.family for task in tasks["train"]}
    assert seen == set(FAMILIES)
    for task in tasks["train"]:
        allowed = lengths.get(task.family)
        assert allowed is None or {len(r) for r in task.references} == allowed
    recovered = [t for t in tasks["train"] if t.family == "error_recovery"]
    assert 0.4 < sum(len(t.references[0]) == 2 for t in recovered) / len(recovered) < 0.9
    assert any(len(t.references) == 2 for t in tasks["train"])


def test_splits_share_neither_entities_nor_wordings(tasks):
    def entities(members):
        values = {v for t in members for r in t.references for call in r for v in call.parsed().values() if isinstance(v, str)}
        return (values | set(re.findall(r"\b[a-z]\d{3}\b", json.dumps([t.to_json() for t in members])))) - set(DAYS)

    found = {split: entities(members) for split, members in tasks.items()}
    assert min(map(len, found.values())) > 50
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not found[a] & found[b]
    for kind in CORES:
        wordings = [set(phrases(kind, split)) for split in SPLITS]
        assert all(wordings) and sum(map(len, wordings)) == len(set().union(*wordings)) == 10


def test_the_same_seed_gives_the_same_tasks_and_another_does_not():
    assert make_tasks("train", 50, 1) == make_tasks("train", 200, 1)[:50] != make_tasks("train", 50, 2)
    chosen = make_tasks("train", 300, 1, ("chain4", "choose"))
    assert {task.family for task in chosen} == {"chain4", "choose"}
    assert 100 < sum(task.family == "choose" for task in chosen) < 200  # in equal shares
    assert set(get_args(WorldFamily)) == set(FAMILIES)
    with pytest.raises(ValueError, match="'dev' is none of train"):
        make_tasks("dev", 1, 0)


def test_effect_labels_hold(tasks):
    """A tool writes to the database only if it says so, and what it returns changes only after writes that it says it reads."""
    tables = {"orders": {"orders"}, "flights": {"flight_ids"}, "bookings": {"bookings"}, "balances": {"accounts", "transfers"},
              "rooms": {"rooms", "reservations"}}  # fmt: skip
    specs, written_by = tool_specs(), {}
    rows = copy.deepcopy({t: dict(getattr(database("train", 3), t)) for t in database("train", 3).TABLES})
    for task in tasks["train"]:
        for reference in task.references:
            session = LiveTools("train", 3).start(task, 0)
            for call in reference:
                before = {t: dict(session.db.written(t)) for t in session.db.TABLES}
                session.execute(call, 0)
                changed = {t for t in session.db.TABLES if session.db.written(t) != before[t]}
                written_by.setdefault(call.name, set()).update(changed)
    for name, changed in written_by.items():
        declared = {table for resource in specs[name].effects.writes for table in tables[resource]}
        assert changed <= declared and bool(changed) == bool(declared), name
    assert {n for n, c in written_by.items() if c} == {"cancel_order", "book_flight", "transfer", "reserve_room"}
    assert rows == {t: dict(getattr(database("train", 3), t)) for t in database("train", 3).TABLES}  # writes stay in episodes


def test_a_write_changes_a_later_read():
    db = database("train", 3)
    order = next(o for o, row in db.orders.items() if row["status"] == "open")
    session = LiveTools("train", 3).start(make_tasks("train", 1, 3)[0], 0)
    read = ToolCall.of("get_order", order_id=order)
    assert json.loads(session.execute(read, 0).result.content)["status"] == "open"
    session.execute(ToolCall.of("cancel_order", order_id=order), 0)
    assert json.loads(session.execute(read, 0).result.content)["status"] == "cancelled"
    assert session.execute(ToolCall.of("cancel_order", order_id=order), 0).result.error == "not_open"


def test_an_account_cannot_pay_itself_and_no_task_asks_for_it(tasks):
    session = LiveTools("train", 3).start(tasks["train"][0], 0)
    account = next(iter(database("train", 3).accounts))
    pay = ToolCall.of("transfer", source=account, target=account, amount=10)
    assert session.execute(pay, 0).result.error == "same_account"
    calls = [c.parsed() for t in tasks["train"] for c in t.references[0] if c.name == "transfer"]
    assert len(calls) > 10 and all(c["source"] != c["target"] for c in calls)


def test_demonstrators_have_the_competence_that_they_state(tasks):
    specs = tool_specs()
    by_id = {task.id: task for task in tasks["train"]}
    right: dict[tuple[str, int], list[int]] = {}
    for transcript in record(tasks["train"], ["expert", "stopper", "wanderer"], LiveTools("train", 3), specs, 3):
        task = by_id[transcript.task_id]
        calls = [c for m in transcript.messages for c in m.tool_calls]
        right.setdefault((transcript.agent, min(len(task.references[0]), 3)), []).append(process_accuracy(task, calls, specs))
        assert transcript.messages[-1].role == "assistant" and transcript.messages[-1].content
    share = {key: sum(v) / len(v) for key, v in right.items()}
    assert [share["expert", n] for n in range(4)] == [1.0] * 4
    assert share["stopper", 0] == share["stopper", 1] == 1.0 and 0.4 < share["stopper", 2] < 0.6 and share["stopper", 3] == 0.0
    assert share["wanderer", 0] == 1.0 and share["wanderer", 1] == share["wanderer", 2] == share["wanderer", 3] == 0.0


def test_what_a_policy_may_write_is_answered_never_raised():
    specs = tool_specs()
    for call, kind in (
        (ToolCall("nope", "{}"), "unknown_tool"),
        (ToolCall("get_order", "{"), "malformed_arguments"),
        (ToolCall("get_order", "[]"), "malformed_arguments"),
        (ToolCall("get_order", "[" * 100_000), "malformed_arguments"),
        (ToolCall("get_order", "{}"), "schema_violation"),
        (ToolCall("get_order", '{"order_id": 3}'), "schema_violation"),
        (ToolCall("get_order", '{"order_id": "o1", "x": 1}'), "schema_violation"),
    ):
        result = registry.check_call(specs, call)
        assert result.error == kind and json.loads(result.content)["error"] == kind
    assert registry.check_call(specs, ToolCall.of("get_order", order_id="o1")) is None


def test_live_tools_cannot_be_reached_where_forbidden():
    task = make_tasks("train", 1, 3)[0]
    call = ToolCall.of("get_weather", city="x")
    before = registry.live_call_count()
    with registry.forbid_live(), pytest.raises(registry.LiveToolError, match="get_weather"):
        LiveTools("train", 3).start(task, 0).execute(call, 0)
    assert registry.live_call_count() == before + 1  # attempts are counted
    with registry.forbid_live(), ThreadPoolExecutor(1) as pool, pytest.raises(registry.LiveToolError):
        pool.submit(LiveTools("train", 3).start(task, 0).execute, call, 0).result()
    assert LiveTools("train", 3).start(task, 0).execute(call, 0).result.error == "not_found"
