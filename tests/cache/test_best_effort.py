"""Made-up answers: shapes claim only what stored results support; a simulator's replies are kept and labelled."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from endpoint_server import Act, Server

from cacherl_jax.cache.best_effort import Simulator
from cacherl_jax.cache.lookup import CachedTools, record_transcript
from cacherl_jax.cache.store import MemoryStore, SQLiteStore
from cacherl_jax.config import CacheConfig, ConfigError, SimulatorConfig
from cacherl_jax.types import Kind, Message, Task, Tier, ToolCall, ToolSpec, Transcript

PARAMETERS = {"type": "object", "properties": {name: {} for name in ("city", "day", "unit", "page", "filter")}}
SPECS = {name: ToolSpec(name, f"The tool {name}.", PARAMETERS) for name in ("find", "other")}
TASK = Task("t", "family", "train", tuple(SPECS), (), ((),))


def store_of(*steps, name="find"):
    store, messages = MemoryStore(), []
    for arguments, result in steps:
        content = result if isinstance(result, str) else json.dumps(result)
        messages += [Message("assistant", tool_calls=(ToolCall.of(name, **arguments),)), Message("tool", content)]
    record_transcript(store, Transcript("x", "t", "a", tuple(SPECS), tuple(messages)), SPECS, "state")
    return store


def policy(best_effort, **fields):
    return dataclasses.replace(CacheConfig(), best_effort=best_effort, fuzzy_threshold=2.0, **fields)


def shaped(store, **asked):
    answer = CachedTools(store, SPECS, policy("schema"), 0).start(TASK, 0).execute(ToolCall.of("find", **asked), 0)
    if answer.tier is Tier.MISS:
        return None
    assert (answer.tier, answer.kind, answer.entry, answer.score) == (Tier.BEST_EFFORT, Kind.SIMULATED, "", 0.0)
    return json.loads(answer.result.content)


# ---- schema ----


def test_a_shape_keeps_echoes_and_constants_and_marks_the_rest_unknown():
    rows = [("Oslo", 3, "wet"), ("Rome", 25, "dry"), ("Bern", 12, "dry")]
    steps = [
        ({"city": c}, {"city": c, "unit": "C", "degrees": t, "days": [{"place": c, "sky": s}] * n})
        for n, (c, t, s) in enumerate(rows, 1)
    ]
    assert shaped(store_of(*steps), city="Kyiv") == {
        "city": "Kyiv",
        "unit": "C",
        "degrees": "unknown",
        "days": [{"place": "Kyiv", "sky": "unknown"}] * 2,  # the median length
    }


def test_a_value_seen_in_too_few_calls_is_unknown():
    step = ({"city": "Oslo"}, {"city": "Oslo", "unit": "C"})
    unknown = {"city": "unknown", "unit": "unknown"}
    assert shaped(store_of(*[step] * 5), city="Kyiv") == unknown  # five recordings of one call
    assert shaped(store_of(step, ({"city": "Rome"}, {"city": "Rome", "unit": "C"})), city="Kyiv") == unknown


def test_an_argument_that_never_varied_is_not_taken_for_a_constant_of_the_tool():
    steps = [({"unit": "C", "page": i}, {"unit": "C", "scale": "C", "size": 10, "page": i}) for i in range(3)]
    assert shaped(store_of(*steps), unit="F", page=9) == {"unit": "F", "scale": "unknown", "size": 10, "page": 9}
    both = [({"city": c, "filter": c}, {"city": c, "place": c}) for c in ("Oslo", "Rome", "Bern")]
    assert shaped(store_of(*both), city="Kyiv", filter="Lviv") == {"city": "Kyiv", "place": "unknown"}
    assert shaped(store_of(*steps), unit="C") == {"unit": "C", "scale": "C", "size": 10, "page": "unknown"}


def test_rare_fields_are_left_out_and_other_forms_outvoted():
    common = [({"page": i}, {"a": 1, "b": {"c": None}}) for i in range(4)]
    assert shaped(store_of(*common, ({"page": 5}, {"a": 1, "b": [], "rare": 1}), ({"page": 6}, "no json")), page=9) == {
        "a": 1,
        "b": {"c": None},
    }
    assert shaped(store_of(({"page": 1}, "plain text")), page=9) is None
    assert shaped(store_of(({"page": 1}, [1]), name="other"), page=9) is None
    assert shaped(store_of(*[({"filter": {"x": i}}, {"x": i}) for i in range(3)]), filter={"x": 7}) == {"x": 7}


# ---- simulator ----


def endpoint_of(*replies):
    """`replies`: texts or what else the server is to do, taken in turn, the last for ever."""
    left = list(replies)
    return Server(lambda body: left.pop(0) if len(left) > 1 else left[0])


def failing(status):
    return Act(status=status, headers={"Retry-After-Ms": "1"})


RECORDED = [({"city": "Oslo", "day": "monday"}, {"sky": "wet"}), ({"city": "Rome", "day": "friday"}, {"sky": "dry"})]


def simulated(endpoint, side, recorded=RECORDED, **fields):
    pytest.importorskip("openai", reason="the extra 'teacher' is not installed")
    config = policy("simulator", simulator=SimulatorConfig(base_url=endpoint.url, model="m", **fields))
    return CachedTools(store_of(*recorded), SPECS, config, 0, simulator=Simulator(config.simulator, side))


ASKED = ToolCall.of("find", city="Rome", day="sunday")


def test_a_simulated_reply_is_kept_and_never_called_recorded(tmp_path):
    with endpoint_of('```json\n{"sky": "grey"}\n```', '{"sky": "other"}') as endpoint:
        for _ in range(2):  # the second time from the file alone
            with SQLiteStore(tmp_path / "side.sqlite", mode="rw") as side:
                cache = simulated(endpoint, side)
                for sample in range(2):
                    answer = cache.start(TASK, sample).execute(ASKED, 0)
                    assert (answer.tier, answer.kind, answer.result.content) == (
                        Tier.BEST_EFFORT,
                        Kind.SIMULATED,
                        '{"sky": "grey"}',
                    )
                    assert (answer.score, answer.fidelity) == (0.0, 0.1)
                (entry,) = side.entries()
                assert entry.kind is Kind.SIMULATED and entry.hash == answer.entry
        assert cache.start(TASK, 0).execute(ToolCall.of("find", city="Oslo", day="monday"), 0).kind is Kind.RECORDED
        (body,) = endpoint.requests
    assert endpoint.paths == ["/v1/chat/completions"] and (body["model"], body["temperature"]) == ("m", 0)
    prompt = body["messages"][-1]["content"]
    assert "The tool find." in prompt and prompt.endswith(f"The call:\n{ASKED.arguments}\nIts result:")
    assert prompt.index('{"sky": "wet"}') < prompt.index('{"sky": "dry"}')  # the nearest stored call comes last


def test_rollouts_that_ask_the_same_at_once_get_one_reply():
    with endpoint_of('{"sky": "grey"}', *['{"sky": "other"}'] * 7) as endpoint, ThreadPoolExecutor(8) as pool:
        cache = simulated(endpoint, MemoryStore())
        assert cache.blocking
        answers = list(pool.map(lambda sample: cache.start(TASK, sample).execute(ASKED, 0), range(8)))
        assert len(endpoint.requests) == 1 and {a.result.content for a in answers} == {'{"sky": "grey"}'}


def test_a_busy_endpoint_is_asked_again():
    with endpoint_of(failing(500), failing(429), '{"sky": "grey"}') as endpoint:
        answer = simulated(endpoint, MemoryStore()).start(TASK, 0).execute(ASKED, 0)
    assert answer.result.content == '{"sky": "grey"}' and len(endpoint.requests) == 3


@pytest.mark.parametrize(
    ("reply", "problem", "fields"),
    [
        (failing(500), "HTTP status 500", {"retries": 1}),
        (failing(401), "HTTP status 401", {}),
        (Act("{}", seconds=0.6), "APITimeoutError", {"timeout": 0.1, "retries": 0}),
        (Act(raw="{}"), "the reply is no chat completion", {}),
        (Act(raw="busy"), "the reply is no chat completion", {}),
        ("  ", "the reply is empty", {}),
        (Act("{", finish="length"), "the reply is longer than 1024 tokens", {}),
        ("It is grey.", "the reply is not JSON", {}),
    ],
)
def test_a_failing_endpoint_becomes_the_miss(reply, problem, fields):
    side = MemoryStore()
    with endpoint_of(reply) as endpoint:
        cache = simulated(endpoint, side, **fields)
        answer = cache.start(TASK, 0).execute(ASKED, 0)
    assert (answer.tier, answer.kind, answer.result.error) == (Tier.MISS, Kind.SIMULATED, "cache_miss")
    assert f"the simulator failed: {problem}" in json.loads(answer.result.content)["message"]
    assert not list(side.entries())


def test_text_tools_get_text_and_an_absent_endpoint_is_a_miss():
    with endpoint_of("It is grey.") as endpoint:
        cache = simulated(endpoint, MemoryStore(), recorded=[({"city": "Oslo"}, "It is wet.")], retries=0)
        assert cache.start(TASK, 0).execute(ASKED, 0).result.content == "It is grey."
    answer = cache.start(TASK, 0).execute(ToolCall.of("find", city="Bern"), 0)
    assert answer.tier is Tier.MISS and "APIConnectionError" in answer.result.content


def test_replies_of_another_model_are_not_mixed():
    side = MemoryStore()
    with endpoint_of("{}") as endpoint:
        simulated(endpoint, side)
        with pytest.raises(ConfigError, match="holds those of 'm'"):
            Simulator(SimulatorConfig(base_url=endpoint.url, model="n"), side)
