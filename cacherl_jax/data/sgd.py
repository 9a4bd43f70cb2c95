"""Schema-Guided Dialogue (Rastogi et al. 2020, arXiv 1909.05855; CC BY-SA 4.0) as tools and transcripts.

A service's intents become functions "Service.Intent"; a dialogue becomes messages, in which a system turn with a service
call is an assistant message with the call, the recorded results as the tool's message, and the reply. Parameters and
results stay as recorded. Files are read in name order, compressed or not, as the upstream repository has them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from cacherl_jax.config import ConfigError
from cacherl_jax.data import recorded
from cacherl_jax.data.recorded import Recorded, find, list_records, read_schema
from cacherl_jax.types import Effects, Message, ToolCall, ToolSpec, Transcript

LICENCE = "CC BY-SA 4.0"
ATTRIBUTION = (
    "Schema-Guided Dialogue, Rastogi et al. 2020, https://github.com/google-research-datasets/dstc8-schema-guided-dialogue"
)


def read(path: Path) -> Recorded:
    """Opens a split's folder. Raises ConfigError when it holds no schema or no dialogues."""
    schema, files = find(path, "schema.json"), find(path, "dialogues_*.json")
    if not schema or not files:
        what = "dialogues_*.json" if schema else "schema.json"
        raise ConfigError(f"{path} holds no {what} (compressed or not); give the folder of one split, such as sgd/train")
    specs = _specs(read_schema(schema[0]))
    return Recorded(
        files=files,
        specs=specs,
        records=list_records("dialogue", "dialogue_id"),
        convert=lambda dialogue, _: to_transcript(dialogue, specs),
        licence=LICENCE,
        attribution=ATTRIBUTION,
        schemas=schema,
    )


def _specs(services: Sequence[Mapping[str, Any]]) -> dict[str, ToolSpec]:
    specs = {}
    for service in services:
        slots = {slot["name"]: slot for slot in service["slots"]}
        for intent in service["intents"]:
            optional = intent["optional_slots"]
            properties = {}
            for name in [*intent["required_slots"], *optional]:
                slot = slots[name]
                properties[name] = {"type": "string", "description": slot["description"]}
                if slot["is_categorical"]:
                    properties[name]["enum"] = [*slot["possible_values"], "dontcare"]
                if name in optional:
                    properties[name]["default"] = optional[name]
            parameters = {"type": "object", "properties": properties, "required": list(intent["required_slots"])}
            resource = (service["service_name"],)
            # A transaction changes the service's state, which every intent of the service may read.
            effects = Effects(reads=resource, writes=resource if intent["is_transactional"] else ())
            name = f"{service['service_name']}.{intent['name']}"
            specs[name] = ToolSpec(name, intent["description"], parameters, effects)
    return specs


def to_transcript(dialogue: Mapping[str, Any], specs: Mapping[str, ToolSpec]) -> Transcript:
    """One dialogue. Raises KeyError, TypeError or ValueError for a malformed one."""
    messages: list[Message] = []
    for turn in dialogue["turns"]:
        speaker, text = turn["speaker"], turn["utterance"]
        if not isinstance(text, str):
            raise TypeError(f"utterance is {type(text).__name__}, expected text")
        if speaker == "USER":
            messages.append(Message("user", text))
            continue
        if speaker != "SYSTEM":
            raise ValueError(f"speaker {speaker!r} is neither USER nor SYSTEM")
        called = [frame for frame in turn["frames"] if "service_call" in frame]
        if called:
            calls = []
            for i, frame in enumerate(called):
                name = f"{frame['service']}.{frame['service_call']['method']}"
                parameters = frame["service_call"]["parameters"]
                if not isinstance(parameters, dict):
                    raise TypeError(f"parameters of {name} are {type(parameters).__name__}, expected an object")
                arguments = json.dumps(parameters, ensure_ascii=False)
                calls.append(ToolCall(name, arguments, id=f"call_{len(messages)}_{i}"))
            messages.append(Message("assistant", tool_calls=tuple(calls)))
            for call, frame in zip(calls, called, strict=True):
                result = json.dumps(frame["service_results"], ensure_ascii=False)
                messages.append(Message("tool", result, tool_call_id=call.id))
        messages.append(Message("assistant", text))
    if not any(message.role == "user" for message in messages):
        raise ValueError("the user says nothing")
    services, name = dialogue["services"], dialogue["dialogue_id"]
    if not isinstance(name, str):
        raise TypeError(f"dialogue_id is {type(name).__name__}, expected text")
    tools = tuple(tool for tool in specs if tool.split(".")[0] in services)
    return Transcript(name, name, "sgd", tools, tuple(messages))


# ---- which files the published figures used --------------------------------------------------------------------------


def manifest(root: Path) -> dict[str, str]:
    """SHA-256 of the uncompressed content of every file of the splits present under `root`, by "split/name.json"."""
    return recorded.manifest(root, [path for split in ("train", "dev") for path in find(root / split, "*.json")])


def manifest_differences(root: Path) -> list[str]:
    """How the files under `root` differ from those of the published figures; empty when they are the same."""
    committed = json.loads(resources.files("cacherl_jax.data").joinpath("sgd_manifest.json").read_text())["files"]
    found = manifest(root)
    missing = [f"{name} is missing" for name in committed if name not in found]
    surplus = [f"{name} is not among the published files" for name in found if name not in committed]
    changed = [f"{name} has other content" for name in committed if name in found and found[name] != committed[name]]
    return missing + surplus + changed
