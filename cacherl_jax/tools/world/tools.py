"""The world's fourteen tools, in four domains: shop, travel, bank, rooms. Each reads or writes one episode's database."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from cacherl_jax.tools.registry import Tool, ToolError, run_live
from cacherl_jax.tools.world.database import DAYS, Database, database
from cacherl_jax.types import Effects, Observation, Task, ToolCall, ToolSpec

TOOLS: dict[str, Tool] = {}
_TYPES: dict[str, dict[str, Any]] = {
    "amount": {"type": "integer", "minimum": 1},
    "day": {"type": "string", "enum": list(DAYS)},
}


def _tool(description: str, *, reads: str = "", writes: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as a tool; its parameters after the database become the schema, all required."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        names = run.__code__.co_varnames[1 : run.__code__.co_argcount]
        parameters = {
            "type": "object",
            "properties": {name: _TYPES.get(name, {"type": "string"}) for name in names},
            "required": list(names),
            "additionalProperties": False,
        }
        effects = Effects(reads=tuple(reads.split()), writes=tuple(writes.split()))
        TOOLS[run.__name__] = Tool(ToolSpec(run.__name__, description, parameters, effects), run)
        return run

    return register


def _row(table: Mapping[str, dict], key: str, what: str) -> dict:
    if key not in table:
        raise ToolError("not_found", f"no {what} {key}")
    return table[key]


# ---- shop ----


@_tool("Find a customer by name.")
def find_customer(db: Database, name: str) -> Any:
    return {"customer_id": _row(db.people, name, "customer")["customer_id"]}


@_tool("Get the last order of a customer.")
def last_order(db: Database, customer_id: str) -> Any:
    return {"order_id": _row(db.customers, customer_id, "customer")["order_id"]}


@_tool("Get the item and status of an order.", reads="orders")
def get_order(db: Database, order_id: str) -> Any:
    row = _row(db.orders, order_id, "order")
    return {"item": row["item"], "status": row["status"]}


@_tool("Cancel an open order.", reads="orders", writes="orders")
def cancel_order(db: Database, order_id: str) -> Any:
    row = _row(db.orders, order_id, "order")
    if row["status"] != "open":
        raise ToolError("not_open", f"order {order_id} is {row['status']}")
    db.orders[order_id] = row | {"status": "cancelled"}
    return {"done": order_id}


# ---- travel ----


@_tool("Find a flight between two cities.")
def find_flight(db: Database, origin: str, destination: str) -> Any:
    return dict(_row(db.flights, f"{origin}>{destination}", "flight"))


@_tool("Book a seat on a flight.", reads="flights", writes="flights bookings")
def book_flight(db: Database, flight_id: str, name: str) -> Any:
    seats = _row(db.flight_ids, flight_id, "flight")["seats"]
    if not seats:
        raise ToolError("sold_out", f"flight {flight_id} is full")
    booking = db.new_id("b", "bookings", flight_id, name)
    db.flight_ids[flight_id] = {"seats": seats - 1}
    db.bookings[booking] = {"flight_id": flight_id, "name": name, "seat": 10 * seats + len(name)}
    return {"booking_id": booking}


@_tool("Get the seat of a booking.", reads="bookings")
def get_booking(db: Database, booking_id: str) -> Any:
    row = _row(db.bookings, booking_id, "booking")
    return {"name": row["name"], "seat": row["seat"]}


# ---- bank ----


@_tool("Find an account by its owner's name.")
def find_account(db: Database, name: str) -> Any:
    return {"account_id": _row(db.people, name, "account")["account_id"]}


@_tool("Get the balance of an account.", reads="balances")
def get_balance(db: Database, account_id: str) -> Any:
    return {"balance": _row(db.accounts, account_id, "account")["balance"]}


@_tool("Transfer money between accounts.", reads="balances", writes="balances")
def transfer(db: Database, source: str, target: str, amount: int) -> Any:
    if source == target:
        raise ToolError("same_account", f"account {source} cannot pay itself")
    giver, taker = _row(db.accounts, source, "account"), _row(db.accounts, target, "account")
    if giver["balance"] < amount:
        raise ToolError("too_little", f"account {source} has less")
    db.accounts[source] = giver | {"balance": giver["balance"] - amount}
    db.accounts[target] = taker | {"balance": taker["balance"] + amount}
    number = db.new_id("t", "transfers", source, target, amount)
    db.transfers[number] = {"source": source, "target": target, "amount": amount}
    return {"transfer_id": number}


# ---- rooms ----


@_tool("Get the weather of a city.")
def get_weather(db: Database, city: str) -> Any:
    return {"weather": _row(db.cities, city, "city")["weather"]}


@_tool("List the rooms of a city with prices.")
def list_rooms(db: Database, city: str) -> Any:
    rooms = _row(db.cities, city, "city")["rooms"]
    return [{"room_id": room, "price": db.rooms[room]["price"]} for room in rooms]


@_tool("Reserve a room on a day.", reads="rooms", writes="rooms")
def reserve_room(db: Database, room_id: str, day: str) -> Any:
    row = _row(db.rooms, room_id, "room")
    if day in row["taken"]:
        raise ToolError("taken", f"room {room_id} is taken")
    number = db.new_id("v", "reservations", room_id, day)
    db.rooms[room_id] = row | {"taken": [*row["taken"], day]}
    db.reservations[number] = {"room_id": room_id, "day": day}
    return {"reservation_id": number}


@_tool("Get the room and day of a reservation.", reads="rooms")
def get_reservation(db: Database, reservation_id: str) -> Any:
    return dict(_row(db.reservations, reservation_id, "reservation"))


# ---- opened as a provider ----


@cache
def tool_specs() -> dict[str, ToolSpec]:
    """The tools as agents see them, by name, in the order in which every task lists them."""
    return {name: tool.spec for name, tool in TOOLS.items()}


class LiveSession:
    """One episode's tools on a database of its own."""

    def __init__(self, db: Database) -> None:
        self.db = db

    def execute(self, call: ToolCall) -> Observation:
        return run_live(TOOLS[call.name], self.db, call)


class LiveTools:
    """The tools themselves. Every episode starts from the split's rows as they were generated."""

    def __init__(self, split: str, seed: int) -> None:
        self._rows = database(split, seed)

    def start(self, task: Task, sample: int) -> LiveSession:
        return LiveSession(self._rows.fresh())
