"""The frozen dataclasses that cross rooms. Everything else stays inside the room that made it.

Two forms of a trajectory exist. A `Transcript` is text: what some agent said and did, in the message form of OpenAI's
chat API. A `Trajectory` (trajectory.py) is tokens: what our policy sampled and what was injected between, with the source
of every token.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Tier(enum.StrEnum):
    """How an observation was answered, from most to least faithful."""

    LIVE = "live"  # the tool itself ran
    EXACT = "exact"
    ADAPTED = "adapted"
    FUZZY = "fuzzy"
    BEST_EFFORT = "best_effort"
    MISS = "miss"  # no answer: none was recorded, or none came in time
    LOOP = "loop"  # answered by the agent loop: malformed call, unknown tool, schema violation. Always true, as live.


TIER_ORDER: tuple[Tier, ...] = (Tier.LIVE, Tier.LOOP, Tier.EXACT, Tier.ADAPTED, Tier.FUZZY, Tier.BEST_EFFORT, Tier.MISS)


def worst_tier(tiers: Sequence[Tier]) -> Tier | None:
    """The least faithful of `tiers`; None when there is none (an episode without a call)."""
    return max(tiers, key=TIER_ORDER.index, default=None)


class Kind(enum.StrEnum):
    """Where the text of an observation comes from."""

    LIVE = "live"
    RECORDED = "recorded"
    SIMULATED = "simulated"


@dataclass(frozen=True)
class ToolCall:
    """A call as the agent wrote it. `arguments` is the JSON text itself, so that calls stay byte-identical."""

    name: str
    arguments: str
    id: str = ""

    @classmethod
    def of(cls, name: str, /, **arguments: Any) -> ToolCall:
        """A call from Python values; `ToolCall.of("get_order", order_id="o-417")`."""
        return cls(name, json.dumps(arguments, ensure_ascii=False))

    def parsed(self) -> dict[str, Any]:
        """The arguments as a dict. Raises ValueError if the text is not a JSON object."""
        value = json.loads(self.arguments)
        if not isinstance(value, dict):
            raise ValueError(f"arguments of {self.name} are not a JSON object: {self.arguments[:80]!r}")
        return value


@dataclass(frozen=True)
class ToolResult:
    """What a tool answered. `content` is the text the agent reads; `error` names the type of a failure, else None."""

    content: str
    error: str | None = None


@dataclass(frozen=True)
class Message:
    """One message of OpenAI's chat form. `reasoning` is the text inside <think>, None where there is none."""

    role: str  # system | user | assistant | tool
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    error: str | None = None  # of a tool message: ToolResult.error

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning is not None:
            out["reasoning_content"] = self.reasoning
        if self.tool_calls:
            out["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in self.tool_calls
            ]
        if self.tool_call_id:
            out["tool_call_id"] = self.tool_call_id
        if self.error is not None:
            out["error"] = self.error
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Message:
        """Raises ValueError naming the field that is missing or of the wrong type."""
        role, content = data.get("role"), data.get("content")
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"message role {role!r} is none of system, user, assistant, tool")
        if content is not None and not isinstance(content, str):
            raise ValueError(f"content of a {role} message is {type(content).__name__}, expected text")
        calls = []
        for call in data.get("tool_calls") or ():
            function = call.get("function", call)
            name, arguments = function.get("name"), function.get("arguments")
            if not isinstance(name, str) or not isinstance(arguments, (str, dict)):
                raise ValueError(f"tool call without a name or arguments: {str(call)[:120]}")
            if isinstance(arguments, dict):
                arguments = json.dumps(arguments, ensure_ascii=False)
            calls.append(ToolCall(name, arguments, call.get("id") or ""))
        return cls(
            role=role,
            content=content or "",
            reasoning=data.get("reasoning_content"),
            tool_calls=tuple(calls),
            tool_call_id=data.get("tool_call_id") or "",
            error=data.get("error"),
        )


@dataclass(frozen=True)
class Effects:
    """What a call does to the world. Resources are names of state, e.g. "orders"; no reads and no writes is pure."""

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    stochastic: bool = False
    time_dependent: bool = False

    @property
    def touches(self) -> frozenset[str]:
        return frozenset(self.reads) | frozenset(self.writes)


@dataclass(frozen=True)
class ToolSpec:
    """A tool as the agent sees it (name, description, JSON Schema of its arguments) and what it does to the world."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    effects: Effects = Effects()

    def to_function(self) -> dict[str, Any]:
        """The form that chat templates render."""
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": dict(self.parameters)},
        }


@dataclass(frozen=True)
class Task:
    """What an agent is asked, and what a right episode looks like.

    messages: system (optional) and the first user message. followups: recorded user turns, injected one after each
    reply without a call. references: every accepted sequence of calls; ((),) for a task that needs none.
    facts: texts that a right final answer contains.
    """

    id: str
    family: str
    split: str  # train | validation | test
    tools: tuple[str, ...]
    messages: tuple[Message, ...]
    references: tuple[tuple[ToolCall, ...], ...]
    facts: tuple[str, ...] = ()
    followups: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "family": self.family,
            "split": self.split,
            "tools": list(self.tools),
            "messages": [m.to_json() for m in self.messages],
            "references": [[[c.name, c.arguments] for c in calls] for calls in self.references],
            "facts": list(self.facts),
            "followups": list(self.followups),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Task:
        return cls(
            id=data["id"],
            family=data["family"],
            split=data["split"],
            tools=tuple(data["tools"]),
            messages=tuple(Message.from_json(m) for m in data["messages"]),
            references=tuple(tuple(ToolCall(n, a) for n, a in calls) for calls in data["references"]),
            facts=tuple(data["facts"]),
            followups=tuple(data["followups"]),
        )


@dataclass(frozen=True)
class Transcript:
    """What one agent did in one task, as text. `agent` names the demonstrator (expert, stopper, wanderer, a corpus)."""

    id: str
    task_id: str
    agent: str
    tools: tuple[str, ...]
    messages: tuple[Message, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "task_id": self.task_id,
            "agent": self.agent,
            "tools": list(self.tools),
            "messages": [m.to_json() for m in self.messages],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Transcript:
        for name in ("id", "task_id", "agent", "tools", "messages"):
            if name not in data:
                raise ValueError(f"transcript without field {name!r}")
        return cls(
            id=data["id"],
            task_id=data["task_id"],
            agent=data["agent"],
            tools=tuple(data["tools"]),
            messages=tuple(Message.from_json(m) for m in data["messages"]),
        )


@dataclass(frozen=True)
class Observation:
    """A tool's answer with its provenance: what was served, from where, and how sure the server is.

    score: similarity in [0, 1] of the stored call that answered (1 for exact and live). entry: hash of the stored
    entry, "" where none. fidelity: probability in [0, 1] that this equals the tool's true answer. age: seconds from the
    entry's recording to its snapshot, None where either is unknown. shown: characters of the text that the agent read,
    where the content was cut to max_tool_tokens; None: all of it.
    """

    call: ToolCall
    result: ToolResult
    tier: Tier
    kind: Kind
    score: float = 1.0
    entry: str = ""
    fidelity: float = 1.0
    age: float | None = None
    shown: int | None = None


class ToolFailure(Exception):
    """Ends an episode: its session has no answer, and its policy is to go no further. `observation` says what was missing."""

    def __init__(self, observation: Observation) -> None:
        super().__init__(f"{observation.call.name}: {observation.result.content}")
        self.observation = observation


class ToolSession(Protocol):
    """The tools of one episode: live ones with their own state, or the cache with the episode's chain of writes.

    Calls of one turn that write nothing may come at the same time, from several threads; all others come one by one.
    """

    def execute(self, call: ToolCall, index: int) -> Observation:
        """Answers a call whose name and arguments were already checked against the tool's schema. Tool failures
        come back as results with an error type. Raises ToolFailure where the episode is to end; other exceptions are
        programming errors.

        index: the place that the answer will have among the episode's observations, so that a draw can depend on the call's
        place and not on what finished first. Calls that the loop refused and its remarks count.
        """
        ...


class ToolProvider(Protocol):
    """Opens one session an episode.

    blocking: whether an answer may take long (a network, a model, functions of users). The agent loop then makes calls in
    threads, with a timeout; else at once.
    """

    @property
    def blocking(self) -> bool: ...

    def start(self, task: Task, sample: int) -> ToolSession: ...


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows for one training step; a jax pytree (registered in train/step.py, so that this file needs no jax).

    tokens_BT int32; loss_mask_BT float32, above 0 where token t was written by the policy and is to be predicted from
    tokens < t: its weight in the loss, 1 if nothing says otherwise; segment_ids_BT int32, 0 is padding, neighbours in a row
    differ; advantages_BT float32, that of the token's episode; behavior_logprobs_BT (by what the token was drawn from),
    ref_logprobs_BT and old_logprobs_BT (by the policy before the step's first update; None: it is the present one) float32,
    aligned with tokens (entry t is the logprob of token t). Zeros and None in SFT.
    """

    tokens_BT: Any
    loss_mask_BT: Any
    segment_ids_BT: Any
    advantages_BT: Any
    behavior_logprobs_BT: Any
    ref_logprobs_BT: Any
    old_logprobs_BT: Any = None
