"""Secrets: found by shape or field, replaced alike, and never seen where there is none."""

import json

import pytest

from cacherl_jax.cache.redact import RULES, redact, redact_call
from cacherl_jax.types import ToolCall

# Made up, and cut in two so that no scanner of repositories takes them for real ones.
KEY = "sk-" + "proj-Ab1Cd2Ef3Gh4Ij5Kl6Mn7Op8"
JWT = "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"
PEM = "-----BEGIN RSA PRIVATE" + " KEY-----\nMIIEpAIBAAKCAQEA\nabc+/=\n-----END RSA PRIVATE KEY-----"
SECRETS = [
    ("openai-key", f"use {KEY} now", KEY),
    ("openai-key", "sk-" + "ant-api03-" + "a1B2" * 10, "a1B2" * 10),
    ("jwt", f'{{"cookie": "{JWT}"}}', JWT),
    ("private-key", PEM, "MIIEpAIBAAKCAQEA"),
    ("private-key", json.dumps({"file": PEM}), "MIIEpAIBAAKCAQEA"),
    ("private-key", PEM[:60], "MIIEpAIBAAK"),  # cut off
    ("aws-key", "AKIA" + "IOSFODNN7EXAMPLE", "IOSFODNN7EXAMPLE"),
    ("github-token", "ghp_" + "a1B2c3D4e5" * 4, "a1B2c3D4e5"),
    ("gitlab-token", "glpat-" + "a1B2c3D4e5F6g7H8i9J0", "a1B2c3"),
    ("hugging-face-token", "hf_" + "aBcDeFgHiJ" * 4, "aBcDeFgHiJ"),
    ("google-key", "AIza" + "SyA1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q", "SyA1b2C3"),
    ("slack-token", "xoxb-" + "1234567890-abcdefghij", "abcdefghij"),
    ("stripe-key", "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc", "4eC39Hq"),
    ("bearer-token", '{"header": "Authorization: Bearer abc123def456ghi789jkl"}', "abc123def456ghi789jkl"),
    ("basic-credentials", "Authorization: Basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
    ("url-credentials", "postgres://ann:hunter2@db.example.org/x", "hunter2"),
    ("field", '{"user": "ann", "password": "hunter2"}', "hunter2"),
    ("field", '{"Client-Secret": "a \\"quoted\\" one"}', "quoted"),
    ("field", '{"pwd":1234}', "1234"),
    ("field", json.dumps({"body": '{"api_key": "hunter2"}'}), "hunter2"),
    ("parameter", "https://example.org/a?b=1&access_token=hunter2&c=3", "hunter2"),
]


@pytest.mark.parametrize(("rule", "text", "secret"), SECRETS, ids=[f"{r}-{i}" for i, (r, _, _) in enumerate(SECRETS)])
def test_a_secret_is_replaced_by_the_name_of_its_rule(rule, text, secret):
    found = []
    clean = redact(text, found.append)
    assert secret not in clean and f"[redacted:{rule}]" in clean
    assert found == [rule]
    assert redact(clean, found.append) == clean and found == [rule]
    if text.startswith("{"):
        assert json.loads(clean).keys() == json.loads(text).keys()  # still the JSON it was


def test_every_rule_is_tried():
    assert {rule.name for rule in RULES} == {name for name, _, _ in SECRETS}


@pytest.mark.parametrize(
    "text",
    [
        '{"order_id": "#W6067464", "tracking": "674931187716", "sha256": "' + "0a1b" * 16 + '"}',
        '{"payment_id": "credit_card_4421486", "booking": "HATHAT", "uuid": "123e4567-e89b-12d3-a456-426614174000"}',
        '{"next_page_token": "CAUQAA", "token": "abc", "secret_santa": "Ann", "passwords": ["x"], "password": ""}',
        '{"password": {"type": "string"}, "passenger": "Ann", "key": "C minor", "api_key_required": "yes"}',
        "The bearer of good news paid in tokens; authorization: basic training at https://example.org:8080/a@b",
        "the password is asked for, ask-me-anything-about-everything-you-like, risk-averse-portfolio-management-2024",
        "mailto:ann@example.org https://example.org/?q=a:b@c",
    ],
)
def test_what_is_no_secret_is_not_touched(text):
    assert redact(text) is text


def test_two_secrets_of_a_call_and_its_other_arguments():
    def call(key, city):
        return ToolCall.of("f", api_key=key, city=city, url=f"https://u:{key}@x.org")

    assert redact_call(call("k1", "Oslo")) == redact_call(call("k2", "Oslo")) != redact_call(call("k1", "Rome"))
    plain = ToolCall.of("f", city="Oslo")
    assert redact_call(plain) is plain


def test_a_long_text_without_secrets_costs_little():
    text = json.dumps([{"sha": "0a1b" * 16, "url": "https://example.org/a", "basic": "authorization"}] * 10_000)
    assert redact(text) == text
