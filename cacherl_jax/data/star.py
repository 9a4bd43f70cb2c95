"""STAR (Mosig, Mehri and Kober 2020, arXiv 2010.11853; MIT): a wizard's queries as tools and transcripts.

A service is a tool. Its arguments are constraint expressions as recorded: a literal in JSON ("\\"Alexis\\"", "21") or a call
such as "api.is_equal_to(\\"Chase\\")"; an argument constrained in several ways has a list of them. The result is the item
that the knowledge base showed, null where none, and the number of matching items (-1 where not counted). Drafts that the
wizard did not send and instructions to the participants are left out.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cacherl_jax.config import ConfigError
from cacherl_jax.data.recorded import Recorded, find, read_schema
from cacherl_jax.types import Effects, Message, ToolCall, ToolSpec, Transcript

LICENCE = "MIT"
ATTRIBUTION = "STAR, Mosig, Mehri and Kober 2020 (arXiv 2010.11853), https://github.com/RasaHQ/STAR"


def read(path: Path) -> Recorded:
    """Opens the folder that holds api_schemas/ (or upstream's apis/apis/) and dialogues/, packed as dialogues.tar.xz or
    not. Raises ConfigError naming what is absent."""
    schemas = find(path / "api_schemas", "*.json") or find(path / "apis" / "apis", "*.json")
    dialogues = next((p for name in ("dialogues", "dialogues.tar.xz", "dialogues.tar") if (p := path / name).exists()), None)
    if not schemas or dialogues is None:
        what = "dialogues/ or dialogues.tar.xz" if schemas else "api_schemas/*.json or apis/apis/*.json"
        raise ConfigError(f"{path} holds no {what}; give the folder of STAR")
    names = {schema.name.partition(".")[0]: schema for schema in schemas}
    specs = {name: _spec(name, schema) for name, schema in names.items()}
    return Recorded(
        files=(dialogues,),
        specs=specs,
        records=_dialogues,
        convert=lambda content, _: to_transcript(json.loads(content), specs),
        licence=LICENCE,
        attribution=ATTRIBUTION,
        schemas=schemas,
    )


def _dialogues(path: Path) -> Iterator[tuple[str, bytes]]:
    """The files of the folder or archive in name order, which is the archive's."""
    if path.is_dir():
        for file in sorted(path.glob("*.json")):
            yield file.name, file.read_bytes()
        return
    with tarfile.open(path) as archive:
        for member in archive:
            if member.name.endswith(".json") and (file := archive.extractfile(member)) is not None:
                yield Path(member.name).name, file.read()


def _spec(name: str, path: Path) -> ToolSpec:
    schema = read_schema(path)
    try:
        properties = {}
        for field in schema["input"]:
            kind = f"{field['Min']} to {field['Max']}" if "Min" in field else field["Type"]
            kind = ", ".join(field.get("Categories", ())) or kind
            properties[field["Name"]] = {
                "type": ["string", "array"],
                "items": {"type": "string"},
                "description": f"{field['ReadableName']} ({kind})",
            }
        description = (
            f"Queries the service {name}. An argument is a constraint: a literal in JSON, or an expression such as "
            "api.is_equal_to(literal), api.is_at_least(literal), api.is_one_of(list); or a list of constraints."
        )
        parameters = {"type": "object", "properties": properties, "required": list(schema["required"])}
        # Such a service shows one of the matching items by chance.
        effects = Effects(stochastic=schema["function"] == "generic_sample")
    except (LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no API schema of STAR: {type(error).__name__} {error}") from error
    return ToolSpec(name, description, parameters, effects)


def to_transcript(dialogue: Mapping[str, Any], specs: Mapping[str, ToolSpec]) -> Transcript:
    """One dialogue. Raises KeyError, TypeError or ValueError for a malformed one."""
    messages: list[Message] = []
    waiting: ToolCall | None = None
    for event in dialogue["Events"]:
        who, what = event["Agent"], event["Action"]
        if waiting and (who, what) != ("KnowledgeBase", "return_item"):
            raise ValueError(f"query of {waiting.name} without a result")
        if what in ("utter", "pick_suggestion"):
            messages.append(Message("user" if who == "User" else "assistant", _text(event["Text"])))
        elif what == "query":
            arguments = json.dumps(_constraints(event["Constraints"]), ensure_ascii=False)
            waiting = ToolCall(event["APIName"], arguments, id=f"call_{len(messages)}")
            messages.append(Message("assistant", tool_calls=(waiting,)))
        elif what == "return_item":
            if waiting is None or event["APIName"] != waiting.name:
                raise ValueError(f"result of {event['APIName']} without a query")
            result = {"Item": event.get("Item"), "TotalItems": event["TotalItems"]}
            messages.append(Message("tool", json.dumps(result, ensure_ascii=False), tool_call_id=waiting.id))
            waiting = None
    if waiting or not messages:
        raise ValueError(f"query of {waiting.name} without a result" if waiting else "nobody says anything")
    offered = {capability["Task"] for capability in dialogue["Scenario"]["WizardCapabilities"]}
    offered |= {call.name for message in messages for call in message.tool_calls}
    tools = tuple(name for name in specs if name in offered)
    return Transcript(str(dialogue["DialogueID"]), str(dialogue["DialogueID"]), "star", tools, tuple(messages))


def _constraints(recorded: list[Mapping[str, str]]) -> dict[str, str | list[str]]:
    """Expressions by argument, repetitions once; a list where an argument has different ones."""
    by_name: dict[str, list[str]] = {}
    for constraint in recorded:
        for name, expression in constraint.items():
            found = by_name.setdefault(name, [])
            if _text(expression) not in found:
                found.append(expression)
    return {name: found[0] if len(found) == 1 else found for name, found in by_name.items()}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where text is expected: {str(value)[:60]}")
    return value
