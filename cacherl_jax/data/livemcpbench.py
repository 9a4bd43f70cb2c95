"""LiveMCPBench (Mo et al. 2025, arXiv 2508.01780; Apache-2.0): runs of an agent on real MCP servers, as tools and transcripts.

The agent has two tools, which the transcripts name: `route` finds tools, `execute-tool` calls one of a server. Their
definitions are inferred from the recordings. The servers' own tools are among the specs as "SERVER.TOOL".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cacherl_jax.config import ConfigError
from cacherl_jax.data.recorded import Recorded, Report, find, infer_specs, list_records, pair_results, read_schema
from cacherl_jax.types import Message, ToolSpec, Transcript

LICENCE = "Apache-2.0"
ATTRIBUTION = "LiveMCPBench, Mo et al. 2025 (arXiv 2508.01780), https://github.com/icip-cas/LiveMCPBench"


def read(path: Path) -> Recorded:
    """Opens the folder with trajectories_*.json and tools.json, or upstream's repository with baseline/output/*.json and
    tools/LiveMCPTool/tools.json. Raises ConfigError naming what is absent."""
    files = find(path, "trajectories_*.json") or find(path / "baseline" / "output", "*.json")
    schemas = find(path, "tools.json") or find(path / "tools" / "LiveMCPTool", "tools.json")
    if not files or not schemas:
        what = "tools.json or tools/LiveMCPTool/tools.json" if files else "trajectories_*.json or baseline/output/*.json"
        raise ConfigError(f"{path} holds no {what} (compressed or not); give the folder of LiveMCPBench")
    tools: dict[str, ToolSpec] = {}
    corpus = Recorded(
        files=files,
        specs={},
        records=_runs,
        convert=lambda record, report: to_transcript(record, tuple(tools), report),
        licence=LICENCE,
        attribution=ATTRIBUTION,
        schemas=schemas,
    )
    tools |= infer_specs(corpus.transcripts())
    corpus.specs = _server_specs(schemas[0]) | tools
    return corpus


def _runs(file: Path) -> Iterator[tuple[str, tuple[str, Any]]]:
    """The runs of a file, each with the name of the agent: "claude-sonnet-4"."""
    agent = file.name.removesuffix(".gz").removesuffix(".json").removeprefix("trajectories_")
    for name, record in list_records("run", "task_id")(file):
        yield name, (agent, record)


def to_transcript(record: tuple[str, Mapping[str, Any]], tools: tuple[str, ...], report: Report) -> Transcript:
    """One agent's run. Raises KeyError, TypeError or ValueError for a malformed one."""
    agent, run = record
    messages = []
    for message in map(Message.from_json, run["messages"]):
        messages.append(replace(message, error=_error(message.content)) if message.role == "tool" else message)
    return Transcript(f"{agent}/{run['task_id']}", run["task_id"], agent, tools, pair_results(messages, report))


def _error(content: str) -> str | None:
    """The type of a failure that the client wrote into the text."""
    if content == "Tool call timed out.":
        return "timeout"
    return "tool_error" if content.endswith("isError=True") else None


def _server_specs(file: Path) -> dict[str, ToolSpec]:
    specs = {}
    try:
        for entry in read_schema(file):
            for server, listed in entry["tools"].items():
                for tool in listed["tools"]:
                    name = f"{server}.{tool['name']}"
                    specs[name] = ToolSpec(name, tool["description"] or "", tool["inputSchema"])
    except (LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is no list of MCP servers' tools: {type(error).__name__} {error}") from error
    return specs
