"""Rendering against the official template and tokenizer; episodes whose mask is the policy's own words; parsing."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacherl_jax.text import chat
from cacherl_jax.text.chat import MalformedCall
from cacherl_jax.text.tokenizer import CONTROL, train_tokenizer
from cacherl_jax.trajectory import Source
from cacherl_jax.types import Message, ToolCall, ToolSpec, Transcript

SPEC = ToolSpec(
    "get_order",
    "Looks an order up, été.",
    {"type": "object", "properties": {"order_id": {"type": "string"}}, "required": ["order_id"]},
)
CALL = ToolCall("get_order", '{"order_id": "o417"}')
CONVERSATION = (
    Message("system", "Be brief."),
    Message("user", "Where is o417?"),
    Message("assistant", "Let me look.", reasoning="The id is given.", tool_calls=(CALL, CALL)),
    Message("tool", '[{"status": "shipped"}]'),
    Message("tool", ""),
    Message("assistant", "It was shipped.", reasoning="The result says so."),
    Message("user", "  \nThanks! "),
    Message("assistant", "You're welcome."),
)
# A result that a user's message holds, and thinking blocks that stand in the content.
UNUSUAL = (
    Message("user", "Where is it?"),
    Message("assistant", "<think>\n\nThe id is given.\n</think>\n\nLet me look.", tool_calls=(CALL,)),
    Message("user", "<tool_response>\nshipped\n</tool_response>"),
    Message("assistant", "so: <think>Shipped.</think> or </think>\nIt was shipped.", tool_calls=(CALL,)),
    Message("tool", "shipped"),
    Message("assistant", "It was shipped.</think>", reasoning=""),
)


@pytest.fixture(scope="module")
def tok():
    texts = ["Where is order o417? It was shipped. The id is given by the user. status shipped"] * 3
    return train_tokenizer(texts, chat.template_runs([SPEC]), 420)


@pytest.mark.parametrize("thinking_model", [False, True], ids=["plain", "thinking"])
def test_official_rendering_equals_the_template(official, qwen_tokenizer, thinking_model):
    beginnings = [c[:n] for c in (CONVERSATION, CONVERSATION[1:], UNUSUAL) for n in range(1, len(c) + 1)]
    for messages, tools, prompt in itertools.product(beginnings, ([], [SPEC]), (False, True)):
        dicts, functions = [m.to_json() for m in messages], [t.to_function() for t in tools]
        expected = official.text(dicts, functions, thinking_model=thinking_model, prompt=prompt)
        options = {"thinking_model": thinking_model, "add_generation_prompt": prompt}
        assert chat.render_official(messages, tools, **options) == expected
        if messages[0] != UNUSUAL[0]:  # whose content spells control tokens, which are never made of content
            assert chat.official_ids(qwen_tokenizer, messages, tools, **options) == qwen_tokenizer.encode(expected)


def test_golden_tokenizations(shared_data, qwen_tokenizer):
    golden = json.loads((shared_data / "qwen3-tokenizer" / "golden_tokenization_llamacpp.json").read_text())
    assert len(golden) == 43
    for case in golden:
        assert qwen_tokenizer.encode(case["text"]) == case["ids"]
        assert qwen_tokenizer.encode_content(case["text"]) == case["ids"]


def test_first_turn_of_an_episode_is_the_official_rendering(tok):
    pieces = chat.opening(tok, CONVERSATION[:2], [SPEC]) + chat.generation_prompt(tok)
    expected = chat.render_official(CONVERSATION[:2], [SPEC], thinking_model=True, add_generation_prompt=True)
    assert [i for _, ids, _ in pieces for i in ids] == tok.encode(expected)


def test_mask_covers_exactly_the_assistants_own_tokens(tok):
    transcript = Transcript("x", "t", "a", ("get_order",), CONVERSATION)
    tokens_T, sampled_T, segments = chat.transcript_tokens(tok, transcript, {"get_order": SPEC}, 64)
    assert len(tokens_T) == len(sampled_T) == segments[-1].stop
    assert all(a.stop == b.start for a, b in itertools.pairwise(segments))
    said = [tok.decode(tokens_T[s.start : s.stop]) for s in segments if s.source is Source.SAMPLED]
    call = f'<tool_call>\n{{"name": "get_order", "arguments": {CALL.arguments}}}\n</tool_call>'
    assert said == [
        f"The id is given.\n</think>\n\nLet me look.\n{call}\n{call}<|im_end|>",
        "The result says so.\n</think>\n\nIt was shipped.<|im_end|>",
        "\n</think>\n\nYou're welcome.<|im_end|>",
    ]
    assert sampled_T.sum() == sum(s.stop - s.start for s in segments if s.source is Source.SAMPLED)
    for s in segments:  # the stop token is sampled, the newline after it is not
        if s.source is Source.SAMPLED:
            assert tokens_T[s.stop - 1] == tok.im_end
            assert s.stop == len(tokens_T) or tok.decode(tokens_T[s.stop : s.stop + 1]) == "\n"
    assert [s.observation for s in segments if s.source is Source.TOOL] == [0, 1]


@pytest.mark.parametrize("control", CONTROL)
def test_content_cannot_forge_control_tokens(tok, control):
    text = f"a{control}b{control}"
    ids = tok.encode_content(text)
    assert tok.decode(ids) == text and tok.id(control) not in ids
    ((_, tool_ids, _),) = chat.tool_results(tok, [text])
    assert tool_ids.count(tok.im_end) == 1 and text in tok.decode(tool_ids)


def test_long_results_are_cut_in_tokens_on_whole_characters(tok):
    ((_, ids, _),) = chat.tool_results(tok, [chat.cut(tok, "é" * 100_001, 63)])
    assert len(ids) < 80 and "\ufffd" not in tok.decode(ids)
    assert chat.cut(tok, "short", 63) == "short"


def test_runs_that_one_token_spells_do_not_escape_the_cut(qwen_tokenizer):
    for character in " -=":
        assert len(qwen_tokenizer.encode_content(chat.cut(qwen_tokenizer, character * 100_000, 64))) <= 64


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=30).filter(
    lambda s: not any(c in s for c in CONTROL)
)
json_values = st.recursive(st.none() | st.booleans() | st.integers() | words, lambda x: st.lists(x, max_size=3), max_leaves=5)


@settings(max_examples=200, deadline=None)
@given(words, words, st.lists(st.dictionaries(words, json_values, max_size=3), max_size=3), st.booleans())
def test_a_turn_that_is_rendered_parses_back(tok, reasoning, content, arguments, ascii_only):
    import unicodedata

    calls = tuple(ToolCall("get_order", json.dumps(a, ensure_ascii=ascii_only)) for a in arguments)
    message = Message("assistant", content, reasoning=reasoning, tool_calls=calls)
    ((_, ids, _),) = chat.assistant_turn(tok, message)
    turn = chat.parse_turn(tok.decode(ids))

    def normal(text):  # the tokenizer composes characters, as Qwen's does; the template's newlines are stripped
        return unicodedata.normalize("NFC", text).strip("\n")

    assert turn.thinking_closed and turn.reasoning == normal(reasoning)
    assert turn.content == (normal(content) if content.strip() else "")
    assert [(c.name, c.arguments) for c in turn.calls] == [(c.name, unicodedata.normalize("NFC", c.arguments)) for c in calls]


OPEN, CLOSE = "</think>\n\n<tool_call>\n", "\n</tool_call><|im_end|>"


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', '{"a": 1}'),
        ('{"name":"f","arguments":{"a":1}}', '{"a":1}'),
        ('{"arguments": {"a": "}{\\"</tool_call>"}, "name": "f"}', '{"a": "}{\\"</tool_call>"}'),
        ('{"name": "f", "arguments": {"a": 1e3, "b": 1.0, "c": -0}}', '{"a": 1e3, "b": 1.0, "c": -0}'),
        ('{"name": "f", "arguments": {"a": "\\u00e9"}}', '{"a": "\\u00e9"}'),
        ('{"name": "f", "arguments": {"a": {"b": [{}]}}}', '{"a": {"b": [{}]}}'),
    ],
)
def test_calls_keep_the_text_of_their_arguments(body, arguments):
    turn = chat.parse_turn(f"why\n{OPEN}{body}{CLOSE}")
    assert turn.calls == (ToolCall("f", arguments),) and turn.content == ""


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("not json", "no JSON object"),
        ('{"name": "f", "arguments": {"a": 1}', "expected , or }"),
        ('{"name": "f"}', "arguments"),
        ('{"name": "f", "arguments": [1]}', "not an object"),
        ('{"name": 3, "arguments": {}}', "name"),
        ('{"name": "f", "arguments": {"a": 1, "a": 2}}', "twice"),
        ('{"name": "f", "name": "g", "arguments": {}}', "twice"),
        ('{"name": "f", "arguments": {}, "x": 1}', "unexpected field"),
        ('{"name": "f", "arguments": {}} trailing', "</tool_call>"),
        ("[" * 100_000, "object"),
        ('{"name": "f", "arguments": ' + "[" * 100_000, ""),
    ],
)
def test_malformed_calls_are_data(body, problem):
    (call,) = chat.parse_turn(f"{OPEN}{body}{CLOSE}").calls
    assert isinstance(call, MalformedCall) and problem in call.problem


def test_turns_with_several_parts():
    good = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    turn = chat.parse_turn(f"r\n</think>\n\nfirst\n{good}\n{good}\nafter<|im_end|>")
    assert turn.content == "first\nafter" and turn.calls == (ToolCall("f", "{}"),) * 2 and not turn.leaked
    inside = chat.parse_turn(f"I will {good} now<|im_end|>")
    assert not inside.thinking_closed and inside.calls == () and inside.content == ""
    assert chat.parse_turn("a</think>b</think>c").leaked and chat.parse_turn("a</think><think>").leaked
    assert chat.parse_turn("</think>\n\n").content == "" and chat.parse_turn("").calls == ()
