"""The world's fourteen tools, in four domains: shop, travel, bank, rooms. Each reads or writes one episode's database."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any

from pydantic import Field

from cacherl_jax.tools.functions import tool
from cacherl_jax.tools.registry import Tool, ToolError, run_live
from cacherl_jax.tools.world.database import Database, Day, database
from cacherl_jax.types import Observation, Task, ToolCall, ToolSpec

Amount = Annotated[int, Field(ge=1)]


def _row(table: Mapping[str, dict], key: str, what: str) -> dict:
    if key not in table:
        raise ToolError("not_found", f"no {what} {key}")
    return table[key]


# ---- shop ----


@tool(state=True)
def find_customer(db: Database, name: str) -> Any:
    """Find a customer by name."""
    return {"customer_id": _row(db.people, name, "customer")["customer_id"]}


@tool(state=True)
def last_order(db: Database, customer_id: str) -> Any:
    """Get the last order of a customer."""
    return {"order_id": _row(db.customers, customer_id, "customer")["order_id"]}


@tool(reads="orders", state=True)
def get_order(db: Database, order_id: str) -> Any:
    """Get the item and status of an order."""
    row = _row(db.orders, order_id, "order")
    return {"item": row["item"], "status": row["status"]}


@tool(reads="orders", writes="orders", state=True)
def cancel_order(db: Database, order_id: str) -> Any:
    """Cancel an open order."""
    row = _row(db.orders, order_id, "order")
    if row["status"] != "open":
        raise ToolError("not_open", f"order {order_id} is {row['status']}")
    db.orders[order_id] = row | {"status": "cancelled"}
    return {"done": order_id}


# ---- travel ----


@tool(state=True)
def find_flight(db: Database, origin: str, destination: str) -> Any:
    """Find a flight between two cities."""
    return dict(_row(db.flights, f"{origin}>{destination}", "flight"))


@tool(reads="flights", writes="flights bookings", state=True)
def book_flight(db: Database, flight_id: str, name: str) -> Any:
    """Book a seat on a flight."""
    seats = _row(db.flight_ids, flight_id, "flight")["seats"]
    if not seats:
        raise ToolError("sold_out", f"flight {flight_id} is full")
    booking = db.new_id("b", "bookings", flight_id, name)
    db.flight_ids[flight_id] = {"seats": seats - 1}
    db.bookings[booking] = {"flight_id": flight_id, "name": name, "seat": 10 * seats + len(name)}
    return {"booking_id": booking}


@tool(reads="bookings", state=True)
def get_booking(db: Database, booking_id: str) -> Any:
    """Get the seat of a booking."""
    row = _row(db.bookings, booking_id, "booking")
    return {"name": row["name"], "seat": row["seat"]}


# ---- bank ----


@tool(state=True)
def find_account(db: Database, name: str) -> Any:
    """Find an account by its owner's name."""
    return {"account_id": _row(db.people, name, "account")["account_id"]}


@tool(reads="balances", state=True)
def get_balance(db: Database, account_id: str) -> Any:
    """Get the balance of an account."""
    return {"balance": _row(db.accounts, account_id, "account")["balance"]}


@tool(reads="balances", writes="balances", state=True)
def transfer(db: Database, source: str, target: str, amount: Amount) -> Any:
    """Transfer money between accounts."""
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


@tool(state=True)
def get_weather(db: Database, city: str) -> Any:
    """Get the weather of a city."""
    return {"weather": _row(db.cities, city, "city")["weather"]}


@tool(state=True)
def list_rooms(db: Database, city: str) -> Any:
    """List the rooms of a city with prices."""
    rooms = _row(db.cities, city, "city")["rooms"]
    return [{"room_id": room, "price": db.rooms[room]["price"]} for room in rooms]


@tool(reads="rooms", writes="rooms", state=True)
def reserve_room(db: Database, room_id: str, day: Day) -> Any:
    """Reserve a room on a day."""
    row = _row(db.rooms, room_id, "room")
    if day in row["taken"]:
        raise ToolError("taken", f"room {room_id} is taken")
    number = db.new_id("v", "reservations", room_id, day)
    db.rooms[room_id] = row | {"taken": [*row["taken"], day]}
    db.reservations[number] = {"room_id": room_id, "day": day}
    return {"reservation_id": number}


@tool(reads="rooms", state=True)
def get_reservation(db: Database, reservation_id: str) -> Any:
    """Get the room and day of a reservation."""
    return dict(_row(db.reservations, reservation_id, "reservation"))


# ---- opened as a provider ----

# In the order in which every task lists them.
TOOLS: dict[str, Tool] = {
    t.spec.name: t
    for t in (
        find_customer, last_order, get_order, cancel_order, find_flight, book_flight, get_booking, find_account, get_balance,
        transfer, get_weather, list_rooms, reserve_room, get_reservation,
    )
}  # fmt: skip


@cache
def tool_specs() -> dict[str, ToolSpec]:
    """The tools as agents see them, by name."""
    return {name: t.spec for name, t in TOOLS.items()}


class LiveSession:
    """One episode's tools on a database of its own."""

    def __init__(self, db: Database) -> None:
        self.db = db

    def execute(self, call: ToolCall, index: int) -> Observation:
        return run_live(TOOLS[call.name], self.db, call)


class LiveTools:
    """The tools themselves. Every episode starts from the split's rows as they were generated."""

    blocking = False

    def __init__(self, split: str, seed: int) -> None:
        self._rows = database(split, seed)

    def start(self, task: Task, sample: int) -> LiveSession:
        return LiveSession(self._rows.fresh())
