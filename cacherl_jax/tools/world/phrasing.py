"""What users say. Each kind of request has wordings of its own for train, validation and test: the same words, recombined."""

from __future__ import annotations

# kind -> (train wordings, validation wordings, test wordings)
PHRASES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    # no call needed
    "thanks": (("Thanks a lot!", "Many thanks, {name}."), ("Thanks, {name}.",), ("Many thanks!", "Thanks a lot, {name}.")),
    "hello": (("Hello, I am {name}.", "Good day!"), ("Good day, {name}.",), ("Hello!", "Good day, I am {name}.")),
    "able": (
        ("What can you do?", "{name} wants to know what you can do."),
        ("Hello, what can you do?",),
        ("What can you do for me?", "Good day, what can you do?"),
    ),
    "id_given": (
        ("My order is {order_id}. Just repeat the id.", "Repeat this id: {order_id}.", "Just repeat {order_id}."),
        ("This is my order: {order_id}. Just repeat it.",),
        ("My id is {order_id}. Repeat it.", "Just repeat this: {order_id}."),
    ),
    # one call
    "order_status": (
        ("What is the status of order {order_id}?", "Tell me the status of order {order_id}.", "Order {order_id}: status?"),
        ("Give me the status of order {order_id}.",),
        ("Status of order {order_id}?", "I want to know the status of order {order_id}."),
    ),
    "account_balance": (
        ("What is the balance of account {account_id}?", "Tell me the balance of account {account_id}."),
        ("Give me the balance of account {account_id}.",),
        ("Balance of account {account_id}?", "Account {account_id}: what is the balance?"),
    ),
    "weather": (
        ("What is the weather in {city}?", "Tell me the weather in {city}.", "Weather in {city}?"),
        ("Give me the weather in {city}.",),
        ("I want to know the weather in {city}.", "The weather in {city}?"),
    ),
    "customer_id": (
        ("What is the customer id of {name}?", "Tell me the customer id of {name}.", "Customer id of {name}?"),
        ("Give me the customer id of {name}.",),
        ("I want to know the customer id of {name}.", "The customer id of {name}?"),
    ),
    "flight_price": (
        ("What is the price of a flight from {origin} to {destination}?", "Price of a flight from {origin} to {destination}?"),
        ("Tell me the price of a flight from {origin} to {destination}.",),
        ("A flight from {origin} to {destination}: what is the price?", "Give me the price of a flight from {origin} to {destination}."),
    ),
    # two calls
    "name_balance": (
        ("What is the balance of {name}?", "Tell me the balance of {name}.", "{name} wants to know the balance."),
        ("Give me the balance of {name}.",),
        ("Balance of {name}?", "I am {name}. What is the balance?"),
    ),
    "name_last_order": (
        ("What is the last order of {name}?", "Tell me the id of the last order of {name}.", "Last order of {name}?"),
        ("Give me the last order of {name}.",),
        ("I want to know the last order of {name}.", "The id of the last order of {name}?"),
    ),
    "customer_order_status": (
        ("Status of the last order of customer {customer_id}?", "Customer {customer_id}: what is the status of the last order?"),
        ("Give me the status of the last order of customer {customer_id}.",),
        ("Tell me the status of the last order of customer {customer_id}.", "What is the status of the last order of customer {customer_id}?"),
    ),
    "book": (
        ("Book a flight from {origin} to {destination} for {name}.", "{name} wants a flight from {origin} to {destination}. Book it."),
        ("I am {name}. Book a flight from {origin} to {destination}.",),
        ("For {name}, book a flight from {origin} to {destination}.", "Book {name} a flight from {origin} to {destination}."),
    ),
    # three calls
    "name_order_status": (
        ("What is the status of the last order of {name}?", "Tell me the status of the last order of {name}.", "{name} wants to know the status of the last order."),
        ("Give me the status of the last order of {name}.",),
        ("Status of the last order of {name}?", "I am {name}. What is the status of the last order?"),
    ),
    "book_seat": (
        ("Book a flight from {origin} to {destination} for {name} and tell me the seat.", "{name} wants a flight from {origin} to {destination}. Book it and tell me the seat."),
        ("I am {name}. Book a flight from {origin} to {destination} and give me the seat.",),
        ("For {name}, book a flight from {origin} to {destination} and give me the seat.", "Book {name} a flight from {origin} to {destination} and tell me the seat."),
    ),
    "name_cancel": (
        ("Cancel the last order of {name}.", "{name} wants to cancel the last order."),
        ("I am {name}. Cancel the last order.",),
        ("For {name}, cancel the last order.", "I want to cancel the last order of {name}."),
    ),
    # four calls
    "send": (
        ("Send {amount} from {name} to {other} and tell me the balance of {name}.", "{name} wants to send {amount} to {other}. Do it and tell me the balance of {name}."),
        ("I am {name}. Send {amount} to {other} and give me the balance of {name}.",),
        ("From {name} send {amount} to {other} and tell me the balance of {name}.", "Send {amount} from {name} to {other} and give me the balance of {name}."),
    ),
    "status_cancel": (
        ("Tell me the status of the last order of {name} and cancel it.", "{name} wants the status of the last order. Then cancel it."),
        ("Give me the status of the last order of {name} and cancel it.",),
        ("Status of the last order of {name}? Then cancel it.", "I am {name}. Tell me the status of the last order and cancel it."),
    ),
    # a write, then a read that it changes
    "cancel_check": (
        ("Cancel order {order_id} and tell me the status.", "Cancel order {order_id}. Then tell me the status."),
        ("Cancel order {order_id} and give me the status.",),
        ("I want to cancel order {order_id}. Then tell me the status.", "Cancel order {order_id}. Then give me the status."),
    ),
    "transfer_check": (
        ("Transfer {amount} from account {source} to account {target} and tell me the balance of {source}.", "Transfer {amount} from account {source} to {target}. Then tell me the balance of {source}."),
        ("Transfer {amount} from {source} to {target} and give me the balance of {source}.",),
        ("From account {source} transfer {amount} to account {target} and tell me the balance of {source}.", "Transfer {amount} from {source} to {target}. Then give me the balance of {source}."),
    ),
    "reserve_check": (
        ("Reserve room {room_id} on {day} and tell me the day.", "Reserve room {room_id} on {day}. Then tell me the day."),
        ("Reserve room {room_id} on {day} and give me the day.",),
        ("I want to reserve room {room_id} on {day}. Then tell me the day.", "On {day} reserve room {room_id} and tell me the day."),
    ),
    # an error to recover from
    "flight_or": (
        ("Price of a flight from {origin} to {destination}, or else to {other}?", "Tell me the price of a flight from {origin} to {destination}, or else to {other}."),
        ("What is the price of a flight from {origin} to {destination}, or else to {other}?",),
        ("Give me the price of a flight from {origin} to {destination}, or else to {other}.", "A flight from {origin} to {destination}, or else to {other}: what is the price?"),
    ),
    "reserve_or": (
        ("Reserve room {room_id} on {day}, or else room {other}.", "On {day} reserve room {room_id}, or else room {other}."),
        ("I want to reserve room {room_id} on {day}, or else room {other}.",),
        ("For {day} reserve room {room_id}, or else room {other}.", "Reserve room {room_id}, or else room {other}, on {day}."),
    ),
    "cancel_or": (
        ("Cancel order {order_id}, or else tell me the item.", "Cancel {order_id}, or else tell me the item."),
        ("Cancel order {order_id}, or else give me the item.",),
        ("I want to cancel order {order_id}, or else tell me the item.", "Cancel {order_id}, or else give me the item."),
    ),
    # two records in one result
    "cheaper": (
        ("Reserve the cheaper room in {city} on {day}.", "On {day} reserve the cheaper room in {city}."),
        ("I want to reserve the cheaper room in {city} on {day}.",),
        ("For {day} reserve the cheaper room in {city}.", "In {city} reserve the cheaper room on {day}."),
    ),
}  # fmt: skip

# Replies to requests that need no call, by the word that a right answer holds.
CANNED = {
    "welcome": "You are welcome.",
    "help": "Hello, how can I help?",
    "orders": "I can look up orders, flights, accounts and rooms.",
}
