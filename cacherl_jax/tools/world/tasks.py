"""Tasks of the world: families of 0 to 4 calls. A reference is made by doing the task live: right by construction."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cacherl_jax.tools.registry import run_live
from cacherl_jax.tools.world.database import DAYS, SPLITS, Database, database
from cacherl_jax.tools.world.phrasing import phrases
from cacherl_jax.tools.world.tools import TOOLS, tool_specs
from cacherl_jax.types import Message, Task, ToolCall

# Family -> share of tasks, and its kinds of request in equal parts.
FAMILIES: dict[str, tuple[float, tuple[str, ...]]] = {
    "no_call": (0.12, ("thanks", "hello", "able", "id_given")),
    "one_call": (0.18, ("order_status", "account_balance", "weather", "customer_id", "flight_price")),
    "chain2": (0.25, ("name_balance", "name_last_order", "customer_order_status", "book")),
    "chain3": (0.20, ("name_order_status", "book_seat", "name_cancel")),
    "chain4": (0.08, ("send", "status_cancel")),
    "write_then_read": (0.07, ("cancel_check", "transfer_check", "reserve_check")),
    "error_recovery": (0.06, ("flight_or", "reserve_or", "cancel_or")),
    "choose": (0.04, ("cheaper",)),
}


class _Episode:
    """A task in the making: draws entities, does the calls live, notes what the answer must hold."""

    def __init__(self, rows: Database, rng: np.random.Generator) -> None:
        self.rows, self.rng, self.db = rows, rng, rows.fresh()
        self.calls: list[ToolCall] = []
        self.facts: tuple[str, ...] = ()

    def pick(self, table: str, where: Callable[[dict], bool] = lambda row: True) -> tuple[str, dict]:
        keys = list(getattr(self.rows, table))
        while True:
            key = keys[int(self.rng.integers(len(keys)))]
            if where(getattr(self.rows, table)[key]):
                return key, getattr(self.rows, table)[key]

    def two(self, table: str) -> tuple[str, str]:
        """Two different rows."""
        first, _ = self.pick(table)
        second = first
        while second == first:
            second, _ = self.pick(table)
        return first, second

    def person(self) -> str:
        return self.pick("people")[0]

    def route(self, seats: bool = False) -> tuple[str, str]:
        key, _ = self.pick("flights", lambda row: not seats or self.rows.flight_ids[row["flight_id"]]["seats"] > 0)
        origin, destination = key.split(">")
        return origin, destination

    def call(self, name: str, /, **arguments: Any) -> Any:
        call = ToolCall.of(name, **arguments)
        self.calls.append(call)
        return json.loads(run_live(TOOLS[name], self.db, call).result.content)

    def answer(self, *facts: object) -> None:
        self.facts = tuple(str(fact) for fact in facts)


Entities = dict[str, Any]


def _no_call(e: _Episode, kind: str) -> Entities:
    if kind == "id_given":
        order_id, _ = e.pick("orders")
        e.answer(order_id)
        return {"order_id": order_id}
    e.answer({"thanks": "welcome", "hello": "help", "able": "orders"}[kind])
    return {"name": e.person()}


def _one_call(e: _Episode, kind: str) -> Entities:
    if kind == "order_status":
        order_id, _ = e.pick("orders")
        e.answer(e.call("get_order", order_id=order_id)["status"])
        return {"order_id": order_id}
    if kind == "account_balance":
        account_id, _ = e.pick("accounts")
        e.answer(e.call("get_balance", account_id=account_id)["balance"])
        return {"account_id": account_id}
    if kind == "weather":
        city, _ = e.pick("cities")
        e.answer(e.call("get_weather", city=city)["weather"])
        return {"city": city}
    if kind == "customer_id":
        name = e.person()
        e.answer(e.call("find_customer", name=name)["customer_id"])
        return {"name": name}
    origin, destination = e.route()
    e.answer(e.call("find_flight", origin=origin, destination=destination)["price"])
    return {"origin": origin, "destination": destination}


def _last_order(e: _Episode, name: str) -> str:
    customer_id = e.call("find_customer", name=name)["customer_id"]
    return e.call("last_order", customer_id=customer_id)["order_id"]


def _book(e: _Episode) -> tuple[str, Entities]:
    origin, destination = e.route(seats=True)
    name = e.person()
    flight_id = e.call("find_flight", origin=origin, destination=destination)["flight_id"]
    booking_id = e.call("book_flight", flight_id=flight_id, name=name)["booking_id"]
    return booking_id, {"origin": origin, "destination": destination, "name": name}


def _chain(e: _Episode, kind: str) -> Entities:
    """Chains of two to four calls, in which ids are copied from results."""
    if kind in ("book", "book_seat"):
        booking_id, entities = _book(e)
        e.answer(e.call("get_booking", booking_id=booking_id)["seat"] if kind == "book_seat" else booking_id)
        return entities
    if kind == "customer_order_status":
        customer_id, _ = e.pick("customers")
        order_id = e.call("last_order", customer_id=customer_id)["order_id"]
        e.answer(e.call("get_order", order_id=order_id)["status"])
        return {"customer_id": customer_id}
    if kind == "send":
        amount = int(e.rng.integers(1, 10)) * 10
        name, other = e.two("people")
        source = e.call("find_account", name=name)["account_id"]
        target = e.call("find_account", name=other)["account_id"]
        e.call("transfer", source=source, target=target, amount=amount)
        e.answer(e.call("get_balance", account_id=source)["balance"])
        return {"name": name, "other": other, "amount": amount}

    def open_order(row: dict) -> bool:
        return e.rows.orders[e.rows.customers[row["customer_id"]]["order_id"]]["status"] == "open"

    name, _ = e.pick("people", open_order if kind in ("name_cancel", "status_cancel") else lambda row: True)
    if kind == "name_balance":
        account_id = e.call("find_account", name=name)["account_id"]
        e.answer(e.call("get_balance", account_id=account_id)["balance"])
        return {"name": name}
    order_id = _last_order(e, name)
    if kind == "name_last_order":
        e.answer(order_id)
    if kind in ("name_order_status", "status_cancel"):
        e.answer(e.call("get_order", order_id=order_id)["status"])
    if kind in ("name_cancel", "status_cancel"):
        e.answer(e.call("cancel_order", order_id=order_id)["done"])
    return {"name": name}


def _write_then_read(e: _Episode, kind: str) -> Entities:
    if kind == "cancel_check":
        order_id, _ = e.pick("orders", lambda row: row["status"] == "open")
        e.call("cancel_order", order_id=order_id)
        e.answer(e.call("get_order", order_id=order_id)["status"])
        return {"order_id": order_id}
    if kind == "transfer_check":
        source, target = e.two("accounts")
        amount = int(e.rng.integers(1, 10)) * 10
        e.call("transfer", source=source, target=target, amount=amount)
        e.answer(e.call("get_balance", account_id=source)["balance"])
        return {"source": source, "target": target, "amount": amount}
    day = str(e.rng.choice(DAYS))
    room_id, _ = e.pick("rooms", lambda row: day not in row["taken"])
    reservation_id = e.call("reserve_room", room_id=room_id, day=day)["reservation_id"]
    e.answer(e.call("get_reservation", reservation_id=reservation_id)["day"])
    return {"room_id": room_id, "day": day}


def _error_recovery(e: _Episode, kind: str) -> Entities:
    """The first attempt fails in two of three tasks; in the third it succeeds and nothing may follow."""
    fails = bool(e.rng.random() < 2 / 3)
    if kind == "cancel_or":
        order_id, _ = e.pick("orders", lambda row: (row["status"] == "open") != fails)
        result = e.call("cancel_order", order_id=order_id)
        e.answer(e.call("get_order", order_id=order_id)["item"] if fails else result["done"])
        return {"order_id": order_id}
    if kind == "reserve_or":
        day = str(e.rng.choice(DAYS))
        room_id, _ = e.pick("rooms", lambda row: (day in row["taken"]) == fails)
        other, _ = e.pick("rooms", lambda row: day not in row["taken"])
        result = e.call("reserve_room", room_id=room_id, day=day)
        if fails:
            result = e.call("reserve_room", room_id=other, day=day)
        e.answer(result["reservation_id"])
        return {"room_id": room_id, "other": other, "day": day}
    origin, good = e.route()
    spare, _ = e.pick("cities", lambda row: True)
    while spare in (good, origin) or f"{origin}>{spare}" in e.rows.flights:
        spare, _ = e.pick("cities")
    first, second = (spare, good) if fails else (good, spare)
    result = e.call("find_flight", origin=origin, destination=first)
    if fails:
        result = e.call("find_flight", origin=origin, destination=second)
    e.answer(result["price"])
    return {"origin": origin, "destination": first, "other": second}


def _choose(e: _Episode, kind: str) -> Entities:
    day = str(e.rng.choice(DAYS))

    def cheaper_is_free(row: dict) -> bool:
        room = min(row["rooms"], key=lambda r: e.rows.rooms[r]["price"])
        return day not in e.rows.rooms[room]["taken"]

    city, _ = e.pick("cities", cheaper_is_free)
    rooms = e.call("list_rooms", city=city)
    room_id = min(rooms, key=lambda r: r["price"])["room_id"]
    e.answer(e.call("reserve_room", room_id=room_id, day=day)["reservation_id"])
    return {"city": city, "day": day}


_MAKERS: dict[str, Callable[[_Episode, str], Entities]] = {
    "no_call": _no_call,
    "one_call": _one_call,
    "chain2": _chain,
    "chain3": _chain,
    "chain4": _chain,
    "write_then_read": _write_then_read,
    "error_recovery": _error_recovery,
    "choose": _choose,
}


def _orders(kind: str, calls: list[ToolCall]) -> tuple[tuple[ToolCall, ...], ...]:
    """Every accepted order of the reference: the two accounts of a transfer may be found either way round."""
    orders = [tuple(calls)]
    if kind == "send":
        orders.append((calls[1], calls[0], *calls[2:]))
    return tuple(orders)


def make_tasks(split: str, count: int, seed: int, families: Sequence[str] = ()) -> list[Task]:
    """`count` tasks of a split, each asked differently from all others: of `families` in equal shares, without them of all
    FAMILIES in their own.

    The same (split, seed, families) gives the same first tasks whatever the count. Raises ValueError for an unknown split.
    """
    rows = database(split, seed)
    rng = np.random.default_rng((seed, SPLITS.index(split), 1))
    shares = {family: 1 / len(families) for family in families} or {family: share for family, (share, _) in FAMILIES.items()}
    tasks: list[Task] = []
    asked: set[str] = set()
    repeats = 0
    while len(tasks) < count:
        family = str(rng.choice(list(shares), p=list(shares.values())))
        kind = str(rng.choice(FAMILIES[family][1]))
        episode = _Episode(rows, rng)
        entities = _MAKERS[family](episode, kind)
        text = str(rng.choice(phrases(kind, split))).format(**entities)
        if text in asked:
            repeats += 1
            if repeats > 50 * count:
                raise ValueError(f"the world's {split} split has no {count} different tasks")
            continue
        asked.add(text)
        tasks.append(
            Task(
                id=f"{split}-{len(tasks):05d}",
                family=family,
                split=split,
                tools=tuple(tool_specs()),
                messages=(Message("user", text),),
                references=_orders(kind, episode.calls),
                facts=episode.facts,
            )
        )
    return tasks
