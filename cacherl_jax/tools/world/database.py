"""The world's state: one database a split, derived from a seed, with names and ids that no other split has.

A name is two words of small inventories and an id a letter with three digits, so that a test name is new while its words
are not: a policy must copy, it cannot have memorised.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import ChainMap
from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, get_args

import numpy as np

SPLITS = ("train", "validation", "test")
_SHARES = (0.6, 0.1, 0.3)  # of names and ids, by split

# The two words of a person's name, and of a city's.
_PERSON = (
    "Ann Ben Cara Dan Eva Finn Gus Hana Ida Jan Kim Leo Mia Ned Olga Paul Rosa Sam Tim Uma Vera Will Yan Zoe Amy Bob Dora Emil "
    "Fay Gil Hugo Iris Joe Kate Lena Max",
    "Bell Cole Dean Ford Gray Hill Hunt King Lane Moss Nash Page Reed Ross Shaw Todd Wade West Wood York Adams Baker Clark "
    "Diaz Ellis Frost Gomez Hayes Jones Kelly Lopez Moore Owens Perez Quinn Smith",
)
_CITY = (
    "North South East New Old Port Saint Fort Lake Grand Upper Lower Great Little High Royal Green Black White Silver Golden Red",
    "Bay Haven Falls Creek Ridge Grove Point Valley Beach Castle Bridge Forest Harbor Island Garden Meadow Rock Tower",
)

Day = Literal["monday", "tuesday", "wednesday", "thursday", "friday"]
DAYS: tuple[Day, ...] = get_args(Day)
ITEMS = ("lamp", "desk", "chair", "phone", "book", "clock")
WEATHER = ("sunny", "rainy", "windy", "cloudy")
ROWS = {"people": (600, 100, 300), "cities": (200, 40, 100), "flights": (600, 100, 300), "rooms": (200, 40, 100)}

Table = MutableMapping[str, dict]


@dataclass(frozen=True)
class Database:
    """Tables by id or name. `overlay` tables take this episode's writes; the split's rows beneath are never changed."""

    split: str
    people: Table  # name -> customer_id, account_id
    customers: Table  # customer_id -> name, order_id
    orders: Table  # order_id -> item, status
    accounts: Table  # account_id -> name, balance
    cities: Table  # name -> weather, rooms
    flights: Table  # "origin>destination" -> flight_id, price
    flight_ids: Table  # flight_id -> seats
    bookings: Table  # booking_id -> flight_id, name, seat
    transfers: Table  # transfer_id -> source, target, amount
    rooms: Table  # room_id -> city, price, taken (days)
    reservations: Table  # reservation_id -> room_id, day

    TABLES = (
        "people", "customers", "orders", "accounts", "cities", "flights", "flight_ids", "bookings", "transfers", "rooms",
        "reservations",
    )  # fmt: skip

    def fresh(self) -> Database:
        """The same rows with nothing written yet."""
        return Database(self.split, **{name: ChainMap({}, getattr(self, name)) for name in self.TABLES})

    def written(self, table: str) -> dict[str, dict]:
        """What this episode wrote to a table."""
        rows = getattr(self, table)
        return dict(rows.maps[0]) if isinstance(rows, ChainMap) else {}

    def new_id(self, letter: str, table: str, *parts: object) -> str:
        """An id for a row to be written, from what it holds and how many were written to its table before."""
        text = repr((self.split, letter, parts, len(self.written(table))))
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        own = _ids(letter)[self.split]
        return own[number % len(own)]


@cache
def _ids(letter: str) -> dict[str, list[str]]:
    """All ids of a letter, by split."""
    order = np.random.default_rng(list(letter.encode())).permutation(1000)
    return _shared_out([f"{letter}{number:03d}" for number in order])


@cache
def _names(words: tuple[str, str]) -> dict[str, list[str]]:
    """All names of two words, by split."""
    names = [" ".join(pair) for pair in itertools.product(*(w.split() for w in words))]
    return _shared_out([names[i] for i in np.random.default_rng(0).permutation(len(names))])


def _shared_out(values: list[str]) -> dict[str, list[str]]:
    a, b = int(len(values) * _SHARES[0]), int(len(values) * (_SHARES[0] + _SHARES[1]))
    return dict(zip(SPLITS, (values[:a], values[a:b], values[b:]), strict=True))


@lru_cache(maxsize=16)
def database(split: str, seed: int) -> Database:
    """The rows of a split. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    index = SPLITS.index(split)
    rng = np.random.default_rng((seed, index))
    count = {name: rows[index] for name, rows in ROWS.items()}
    people_names = [str(name) for name in rng.permutation(_names(_PERSON)[split])[: count["people"]]]
    city_names = [str(name) for name in rng.permutation(_names(_CITY)[split])[: count["cities"]]]

    def ids(letter: str, n: int) -> list[str]:
        return [str(i) for i in rng.permutation(_ids(letter)[split])[:n]]

    n = count["people"]
    people, customers, orders, accounts = {}, {}, {}, {}
    for name, customer, account, order in zip(people_names, ids("c", n), ids("a", n), ids("o", n), strict=True):
        people[name] = {"customer_id": customer, "account_id": account}
        customers[customer] = {"name": name, "order_id": order}
        orders[order] = {"item": str(rng.choice(ITEMS)), "status": str(rng.choice(("open", "shipped")))}
        accounts[account] = {"name": name, "balance": int(rng.integers(10, 99)) * 10}
    cities, rooms = {}, {}
    room_ids = ids("r", 2 * count["rooms"])
    for i, city in enumerate(city_names):
        pair = room_ids[2 * i : 2 * i + 2]
        cities[city] = {"weather": str(rng.choice(WEATHER)), "rooms": pair}
        prices = rng.permutation(np.arange(3, 10))[:2] * 10
        for room, price in zip(pair, prices, strict=True):
            taken = [str(day) for day in rng.permutation(DAYS)[:2]]
            rooms[room] = {"city": city, "price": int(price), "taken": taken}
    flights, flight_ids = {}, {}
    for flight in ids("f", count["flights"]):
        origin, destination = rng.choice(city_names, 2, replace=False)
        route = f"{origin}>{destination}"
        if route not in flights:
            flights[route] = {"flight_id": flight, "price": int(rng.integers(5, 60)) * 10}
            flight_ids[flight] = {"seats": int(rng.integers(0, 4))}
    return Database(
        split, people, customers, orders, accounts, cities, flights, flight_ids, {}, {}, rooms, {}
    )  # fmt: skip
