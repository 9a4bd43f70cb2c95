"""Taskmaster-4 (Byrne and Ganesh, Google; CC BY 4.0): coffee orders as tools and transcripts.

The calls annotated on a user's utterance become turns of the assistant, one a call, since each uses what the one before
gave; requests and responses stay as recorded. The corpus has no schemas: those given are inferred from the recordings.
Some requests and responses are absent or no JSON: such a call is reported and left out, the dialogue goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cacherl_jax.config import ConfigError
from cacherl_jax.data.recorded import Recorded, Report, find, infer_specs, list_records
from cacherl_jax.types import Effects, Message, ToolCall, Transcript

LICENCE = "CC BY 4.0"
ATTRIBUTION = (
    "Taskmaster-4, Bill Byrne and Saravanan Ganesh, Google LLC (arXiv 2403.10704), "
    "https://github.com/google-research-datasets/Taskmaster"
)

# Read off the tools' names: an order has a state that the calls about it change and show; the menu is fixed.
_ORDERS = ("orders",)
EFFECTS = {
    "add_order_item": Effects(reads=_ORDERS, writes=_ORDERS),
    "update_order": Effects(reads=_ORDERS, writes=_ORDERS),
    "update_order_item": Effects(reads=_ORDERS, writes=_ORDERS),
    "finish_order": Effects(reads=_ORDERS, writes=_ORDERS),
    "get_order_details": Effects(reads=_ORDERS),
    "get_menu_items": Effects(reads=("menu",)),
    "get_addons": Effects(reads=("menu",)),
    "show_menu": Effects(reads=("menu",)),
}


def read(path: Path) -> Recorded:
    """Opens the folder of data_*.json, or the folder above (TM-4-2024). Raises ConfigError when there is no such file."""
    files = find(path, "data_*.json") or find(path / "data", "data_*.json")
    if not files:
        raise ConfigError(f"{path} holds no data_*.json (compressed or not); give the folder TM-4-2024 of Taskmaster-4")
    corpus = Recorded(
        files=files,
        specs={},
        records=list_records("dialogue", "conversation_id"),
        convert=lambda dialogue, report: to_transcript(dialogue, tuple(corpus.specs), report),
        licence=LICENCE,
        attribution=ATTRIBUTION,
    )
    corpus.specs.update(infer_specs(corpus.transcripts(), EFFECTS))
    return corpus


def to_transcript(dialogue: Mapping[str, Any], tools: tuple[str, ...], report: Report) -> Transcript:
    """One dialogue. Raises KeyError, TypeError or ValueError for a malformed one."""
    messages: list[Message] = []
    for utterance in dialogue["utterances"]:
        speaker, text = utterance["speaker"], utterance["text"]
        if speaker not in ("user", "assistant"):
            raise ValueError(f"speaker {speaker!r} is neither user nor assistant")
        if not isinstance(text, str):
            raise TypeError(f"text is {type(text).__name__}, expected text")
        messages.append(Message(speaker, text))
        for call, response in _exchanges(utterance["annotations"], report):
            messages += [Message("assistant", tool_calls=(call,)), Message("tool", response, tool_call_id=call.id)]
    name = dialogue["conversation_id"]
    return Transcript(name, name, "taskmaster4", tools, tuple(messages))


def _exchanges(annotations: Sequence[Mapping[str, Any]], report: Report) -> Iterator[tuple[ToolCall, str]]:
    """Each call with its response. Contexts "api_call_3" and "api_response_3" belong together."""
    exchanges: dict[str, dict[str, Any]] = {}
    for annotation in annotations:
        number = annotation["context"].rsplit("_", 1)[-1]
        exchanges.setdefault(number, {})[annotation["name"]] = annotation["value"]
    for number, parts in exchanges.items():
        name = parts.get("api_call")
        try:
            if not isinstance(name, str):
                raise ValueError("no api_call")
            for part in ("request", "response"):
                if not isinstance(parts.get(part), str):
                    raise ValueError(f"no {part}")
                if not isinstance(json.loads(parts[part]), dict):
                    raise ValueError(f"the {part} is no JSON object")
        except (ValueError, RecursionError) as error:
            report(f"call {number} of {name} is left out: {error}")
            continue
        yield ToolCall(name, parts["request"], id=f"call_{number}"), parts["response"]
