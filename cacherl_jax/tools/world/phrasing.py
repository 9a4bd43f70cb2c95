"""What users say: every request is a lead ("Can you ...?") around a core ("book a flight from A to B for N").

All leads occur with some kinds in every split, but a pair of lead and kind belongs to one split alone: a test request is
worded in a way that training never saw for that kind, out of words that it did see.
"""

from __future__ import annotations

ASKING = (
    "What is {core}?", "Tell me {core}.", "Give me {core}.", "I want to know {core}.", "Please tell me {core}.",
    "Can you tell me {core}?", "Hello, what is {core}?", "I need {core}.", "Show me {core}.", "Please give me {core}.",
)  # fmt: skip
DOING = (
    "Please {core}.", "Can you {core}?", "I want you to {core}.", "Hello, please {core}.", "I need you to {core}.",
    "Could you {core}?", "Now {core}.", "Go and {core}.", "Hello, can you {core}?", "Please {core} now.",
)  # fmt: skip
SAYING = ("{core}", "Hello, {core}", "Well, {core}", "So, {core}", "Now, {core}", "{core} Bye.", "Good, {core}", "Yes, {core}",
          "Fine, {core}", "Okay, {core}")  # fmt: skip

# kind -> (leads, core)
CORES: dict[str, tuple[tuple[str, ...], str]] = {
    # no call needed
    "thanks": (SAYING, "many thanks from {name}."),
    "hello": (SAYING, "I am {name}, good day."),
    "able": (DOING, "tell {name} what you can do"),
    "id_given": (DOING, "just repeat the id {order_id}"),
    # one call
    "order_status": (ASKING, "the status of order {order_id}"),
    "account_balance": (ASKING, "the balance of account {account_id}"),
    "weather": (ASKING, "the weather in {city}"),
    "customer_id": (ASKING, "the customer id of {name}"),
    "flight_price": (ASKING, "the price of a flight from {origin} to {destination}"),
    # two calls
    "name_balance": (ASKING, "the balance of {name}"),
    "name_last_order": (ASKING, "the id of the last order of {name}"),
    "customer_order_status": (ASKING, "the status of the last order of customer {customer_id}"),
    "book": (DOING, "book a flight from {origin} to {destination} for {name}"),
    # three calls
    "name_order_status": (ASKING, "the status of the last order of {name}"),
    "book_seat": (DOING, "book a flight from {origin} to {destination} for {name} and tell me the seat"),
    "name_cancel": (DOING, "cancel the last order of {name}"),
    # four calls
    "send": (DOING, "send {amount} from {name} to {other} and tell me the balance of {name}"),
    "status_cancel": (DOING, "tell me the status of the last order of {name} and cancel it"),
    # a write, then a read that it changes
    "cancel_check": (DOING, "cancel order {order_id} and tell me the status"),
    "transfer_check": (DOING, "transfer {amount} from {source} to {target} and tell me the balance of {source}"),
    "reserve_check": (DOING, "reserve room {room_id} on {day} and tell me the day"),
    # an error to recover from
    "flight_or": (ASKING, "the price of a flight from {origin} to {destination}, or else to {other}"),
    "reserve_or": (DOING, "reserve room {room_id}, or else room {other}, on {day}"),
    "cancel_or": (DOING, "cancel order {order_id}, or else tell me the item"),
    # two records in one result
    "cheaper": (DOING, "reserve the cheaper room in {city} on {day}"),
}

# Of every ten pairs of lead and kind: six for train, one for validation, three for test.
_OWNER = ("train", "test", "train", "train", "test", "train", "validation", "train", "test", "train")


def phrases(kind: str, split: str) -> list[str]:
    """The wordings of a kind in a split."""
    leads, core = CORES[kind]
    shift = list(CORES).index(kind)
    return [lead.format(core=core) for i, lead in enumerate(leads) if _OWNER[(i + shift) % len(_OWNER)] == split]


# Replies to requests that need no call, by the word that a right answer holds.
CANNED = {
    "welcome": "You are welcome.",
    "help": "Hello, how can I help?",
    "orders": "I can look up orders, flights, accounts and rooms.",
}
