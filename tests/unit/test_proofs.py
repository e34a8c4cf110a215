"""Tokens that are sent by e-mail."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitrocket.errors import ConfigurationError, InvalidTokenError
from kitrocket.proofs import Proofs

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
SECRET = "0123456789abcdef0123456789abcdef"
STATE = ("$argon2id$hash", "ada@example.com")

proofs = Proofs(SECRET)


def redeem(token: str, *, purpose: Any = "reset", state: Any = STATE, now: datetime = NOW, by: Proofs = proofs) -> str:
    claim = by.read(purpose, token, now)
    by.check(claim, state)
    return claim.user_id


def encode(value: object) -> str:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(text).decode().rstrip("=")


@pytest.mark.parametrize("user_id", ["u", "user_1", "ü" * 255, "\U0001f600" * 255, '"}{', "x.y"])
def test_a_token_names_its_user(user_id: str) -> None:
    assert redeem(proofs.make("reset", user_id, STATE, NOW)) == user_id


def test_the_form_of_a_token_and_the_key_of_its_mac() -> None:
    payload, mac = proofs.make("reset", "user_1", STATE, NOW).split(".")
    claim = {"purpose": "reset", "user": "user_1", "exp": int(NOW.timestamp()) + 3600}
    assert json.loads(base64.urlsafe_b64decode(payload + "==")) == claim
    # HKDF of RFC 5869, by hand: extract without salt, expand once.
    extracted = hmac.digest(bytes(32), SECRET.encode(), "sha256")
    key = hmac.digest(extracted, b"kitrocket reset\x01", "sha256")
    covered = json.dumps([payload, *STATE], separators=(",", ":")).encode()
    assert base64.urlsafe_b64decode(mac + "=") == hmac.new(key, covered, hashlib.sha256).digest()


@pytest.mark.parametrize("late", [-1, 0, 1])
def test_a_token_is_over_after_an_hour(late: int) -> None:
    token = proofs.make("reset", "user_1", STATE, NOW)
    now = NOW + timedelta(seconds=3600 + late)
    if late < 0:
        assert redeem(token, now=now) == "user_1"
    else:
        with pytest.raises(InvalidTokenError):
            redeem(token, now=now)


def test_a_token_is_dead_after_its_state_has_changed() -> None:
    token = proofs.make("reset", "user_1", STATE, NOW)
    for state in (
        (None, STATE[1]),
        ("", STATE[1]),
        (STATE[0], "eve@example.com"),
        STATE[::-1],
        (STATE[0] + STATE[1],),
        (),
        (*STATE, None),
    ):
        with pytest.raises(InvalidTokenError):
            redeem(token, state=state)


def test_a_token_serves_one_purpose() -> None:
    token = proofs.make("verify", "user_1", STATE, NOW)
    assert redeem(token, purpose="verify") == "user_1"
    with pytest.raises(InvalidTokenError):
        redeem(token, purpose="reset")
    payload, mac = token.split(".")
    claim = json.loads(base64.urlsafe_b64decode(payload + "=="))
    with pytest.raises(InvalidTokenError):
        redeem(f"{encode(claim | {'purpose': 'reset'})}.{mac}")


def test_each_purpose_has_a_key_of_its_own() -> None:
    keys = set(proofs._keys.values())
    assert len(keys) == 2
    assert all(len(key) == 32 for key in keys)


def test_another_secret_makes_other_tokens() -> None:
    with pytest.raises(InvalidTokenError):
        redeem(Proofs(SECRET + "x").make("reset", "user_1", STATE, NOW))


def test_no_other_claim_fits_the_mac() -> None:
    payload, mac = proofs.make("reset", "user_1", STATE, NOW).split(".")
    claim = json.loads(base64.urlsafe_b64decode(payload + "=="))
    for change in ({"user": "user_2"}, {"exp": claim["exp"] + 1}, {"more": 1}):
        with pytest.raises(InvalidTokenError):
            redeem(f"{encode(claim | change)}.{mac}")
    for other in (mac[:-1], mac + "A", mac[:-1] + ("A" if mac[-1] != "A" else "B"), mac.swapcase(), "", "A" * 43):
        with pytest.raises(InvalidTokenError):
            redeem(f"{payload}.{other}")


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff",
        b"[" * 3000,
        b"1e999",
        b'{"purpose":"reset","user":"\\ud800","exp":99999999999}',
        [],
        "text",
        None,
        {"purpose": "reset", "user": "u"},
        {"purpose": "reset", "user": 5, "exp": 99999999999},
        {"purpose": "reset", "user": "", "exp": 99999999999},
        {"purpose": "reset", "user": "u", "exp": "99999999999"},
        {"purpose": "reset", "user": "u", "exp": True},
        {"purpose": "reset", "user": "u", "exp": 1e300},
        {"purpose": "reset", "user": "u", "exp": float("inf")},
        {"purpose": ["reset"], "user": "u", "exp": 99999999999},
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_payload_that_is_none(payload: object) -> None:
    with pytest.raises(InvalidTokenError):
        proofs.read("reset", f"{encode(payload)}.{'A' * 43}", NOW)


@given(st.text() | st.from_regex(r"\A[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{43}\Z"))
def test_junk_is_no_token(token: str) -> None:
    with pytest.raises(InvalidTokenError) as caught:
        redeem(token)
    assert str(caught.value) == "the token is not valid"


@pytest.mark.parametrize("token", ["x" * 1_000_000, "x" * 5000 + "." + "A" * 43, ".", "a.b.c", "a\n"], ids=len)
def test_long_and_odd_junk_is_no_token(token: str) -> None:
    with pytest.raises(InvalidTokenError):
        redeem(token)


@pytest.mark.parametrize("length", [31, 32, 33])
def test_a_secret_has_at_least_32_bytes(length: int) -> None:
    if length < 32:
        with pytest.raises(ConfigurationError) as caught:
            Proofs("s" * length)
        assert "sss" not in str(caught.value)
    else:
        Proofs("s" * length)
    Proofs("ü" * 16)


def test_without_a_secret_there_are_no_tokens() -> None:
    for call in (
        lambda: Proofs().make("reset", "u", STATE, NOW),
        lambda: Proofs().read("reset", "junk", NOW),
    ):
        with pytest.raises(ConfigurationError, match="KITROCKET_SECRET"):
            call()
