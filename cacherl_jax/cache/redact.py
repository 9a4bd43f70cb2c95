"""Secrets, taken out by rule before anything is stored.

Each is replaced by a text that names its rule, the same for all secrets of the rule: a call asked again with its secret is
redacted alike and hits. Two calls that differ in nothing but a secret are one call. Text without a secret is not touched.

The rules want a prefix or a field name that belongs to secrets. Ids, hashes, numbers of orders and cards, and words like
"token" in a sentence are not secrets. What has no known shape and stands in no telling field is not found.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from cacherl_jax.types import Message, ToolCall, ToolResult, Transcript


@dataclass(frozen=True)
class Rule:
    """pattern: a secret; its group "secret", where it has one, is the part to replace. sign: a text without which the pattern
    cannot match, in lower case: a cheap test first."""

    name: str
    sign: tuple[str, ...]
    pattern: re.Pattern[str]


def _rule(name: str, sign: str, pattern: str) -> Rule:
    return Rule(name, tuple(sign.split()), re.compile(pattern))


# A field of JSON, also inside JSON that is a string of JSON (\"password\": \"...\"), of a query string or of a shell line.
_FIELDS = (
    "password passwd passphrase pwd secret client_secret secret_key secret_access_key aws_secret_access_key private_key api_key "
    "apikey access_token auth_token refresh_token id_token bearer_token session_token"
)
_NAMES = "|".join(name.replace("_", "[_-]?") for name in sorted(_FIELDS.split(), key=len, reverse=True))

RULES: tuple[Rule, ...] = (
    _rule("private-key", "private", r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:(?!-----)[^\"])*(?:-----END [A-Z ]*PRIVATE KEY-----)?"),
    _rule("jwt", "eyj", r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"),
    _rule("aws-key", "akia asia", r"\b(?:AKIA|ASIA)[A-Z2-7]{16}\b"),
    _rule("openai-key", "sk-", r"\bsk-(?:proj-|svcacct-|admin-|ant-[a-z0-9]+-|or-v1-)?[A-Za-z0-9_-]{20,}"),
    _rule("github-token", "gh github_pat", r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{36,})"),
    _rule("gitlab-token", "glpat-", r"\bglpat-[\w-]{20,}"),
    _rule("hugging-face-token", "hf_", r"\bhf_[A-Za-z0-9]{30,}"),
    _rule("google-key", "aiza ya29.", r"\bAIza[\w-]{35}(?![\w-])|\bya29\.[\w-]{20,}"),
    _rule("slack-token", "xox xapp-", r"\bxox[abeprs]-[A-Za-z0-9-]{10,}|\bxapp-[A-Za-z0-9-]{20,}"),
    _rule("stripe-key", "_live_ _test_ whsec_", r"\b(?:[sr]k_(?:live|test)_[A-Za-z0-9]{16,}|whsec_[A-Za-z0-9]{24,})"),
    _rule("bearer-token", "bearer", r"(?i)\bbearer\s+(?P<secret>(?=[A-Za-z._~+/-]*[0-9])[\w.~+/-]{16,}=*)"),
    _rule("basic-credentials", "basic", r"(?i:authorization\W{1,8}basic)\s+(?P<secret>(?=\S*[a-z]\S*[A-Z0-9])[A-Za-z0-9+/]{8,}=*)"),
    _rule("url-credentials", "://", r"\b[A-Za-z][A-Za-z0-9+.-]{1,20}://[^\s/:@\"'\\]*:(?P<secret>[^\s/@\"'\\]+)@"),
    _rule(
        "field",
        " ".join(name.split("_")[0] for name in _FIELDS.split()),
        rf'(?i)(?<![A-Za-z])(?:{_NAMES})(?:"\s*:\s*"(?P<secret>(?:[^"\\]|\\.)+)"|"\s*:\s*(?P<number>-?[0-9][0-9.eE+-]*)'
        r'|(?P<q>\\+")\s*:\s*(?P=q)(?P<nested>.+?)(?<!\\)(?P=q))',
    ),
    _rule("parameter", "=", rf"(?i)[?&;](?:{_NAMES}|access_token|sig)=(?P<secret>[^\s&\"'\\#]+)"),
)


REDACTED = "[redacted:"  # what every replacement opens with


def replacement(rule: str) -> str:
    return f"{REDACTED}{rule}]"


def redact(text: str, found: Callable[[str], None] = lambda rule: None) -> str:
    """The text without its secrets; `found` is told the rule of each. Text that is redacted stays as it is."""
    lowered = ""
    for rule in RULES:
        lowered = lowered or text.lower()
        if any(sign in lowered for sign in rule.sign):
            text, count = rule.pattern.subn(lambda match, rule=rule: _without(match, rule.name, found), text)
            lowered = "" if count else lowered
    return text


def _without(match: re.Match[str], rule: str, found: Callable[[str], None]) -> str:
    groups = match.groupdict()
    part = next((name for name in ("secret", "number", "nested") if groups.get(name) is not None), None)
    start, end = match.span(part) if part else match.span()
    if match.string[start:end].startswith(REDACTED):
        return match[0]
    found(rule)
    text = replacement(rule)
    if part == "number":  # a text now
        text = f'"{text}"'
    return match[0][: start - match.start()] + text + match[0][end - match.start() :]


def redact_call(call: ToolCall) -> ToolCall:
    arguments = redact(call.arguments)
    return call if arguments is call.arguments else replace(call, arguments=arguments)


def redact_result(result: ToolResult) -> ToolResult:
    content = redact(result.content)
    return result if content is result.content else replace(result, content=content)


def redact_transcript(transcript: Transcript) -> Transcript:
    """Calls and results redacted, and all text between them."""
    return replace(transcript, messages=tuple(_redact_message(m) for m in transcript.messages))


def _redact_message(message: Message) -> Message:
    return replace(
        message,
        content=redact(message.content),
        reasoning=None if message.reasoning is None else redact(message.reasoning),
        tool_calls=tuple(redact_call(call) for call in message.tool_calls),
    )
