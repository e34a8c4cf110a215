from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from kitrocket import inputs
from kitrocket.errors import InvalidInputError

# What Better Auth stores for an ASCII address: `email.toLowerCase()`.
ADDRESSES = [
    ("ada@example.com", "ada@example.com"),
    ("Ada@Example.com", "ada@example.com"),
    ("ADA@EXAMPLE.COM", "ada@example.com"),
    ("a.d.a@example.com", "a.d.a@example.com"),
    ("ada+spam@example.com", "ada+spam@example.com"),
    ("Ada.Lovelace+X@Mail.Example.co.uk", "ada.lovelace+x@mail.example.co.uk"),
    ("x@y", "x@y"),
    ("_@example.com", "_@example.com"),
    ("1234567890@example.com", "1234567890@example.com"),
    ("O'Brien@example.com", "o'brien@example.com"),
    ("a!#$%&'*+/=?^_`{|}~-Z@example.com", "a!#$%&'*+/=?^_`{|}~-z@example.com"),
    ("ada@SUB.example.com", "ada@sub.example.com"),
    ("ada@xn--BCHER-kva.example", "ada@xn--bcher-kva.example"),
    ("ada@192.0.2.1", "ada@192.0.2.1"),
    ("Ada@[IPv6:2001:DB8::1]", "ada@[ipv6:2001:db8::1]"),
    ("ada@localhost", "ada@localhost"),
    ("A-B-C@Example-One.com", "a-b-c@example-one.com"),
    ("Q@example.museum", "q@example.museum"),
    ("user%Host@Example.com", "user%host@example.com"),
    ("Z" * 64 + "@example.com", "z" * 64 + "@example.com"),
]


BAD_ADDRESSES = [
    *("", " ", "@", "ada", "ada@", "@example.com", "a@b@c"),
    *(f"a{character}b@example.com" for character in (" ", "\u00a0", "\t", "\x7f", "\x85", "\0", "\ud800")),
    *("x" * 243 + "@example.com", "x" * 1_000_000),
    *(None, 1, b"ada@example.com", ["ada@example.com"]),
]


@pytest.mark.parametrize(("typed", "stored"), ADDRESSES)
def test_ascii_addresses_are_stored_as_better_auth_stores_them(typed: str, stored: str) -> None:
    assert inputs.email("email", typed) == stored


def test_an_address_is_stripped_and_composed() -> None:
    decomposed = unicodedata.normalize("NFD", "Zoë@example.com")
    assert inputs.email("email", f" \t{decomposed}\n") == "zoë@example.com"


@pytest.mark.parametrize("typed", ["J\u030c@example.com", "\u0130@example.com", "ΑΣ@example.com", "Å@example.com"])
def test_normalising_twice_changes_nothing(typed: str) -> None:
    once = inputs.normalised_email(typed)
    assert inputs.normalised_email(once) == once == unicodedata.normalize("NFC", once)


def test_dots_and_plus_signs_are_not_folded() -> None:
    assert inputs.email("email", "a.b@example.com") != inputs.email("email", "ab@example.com")
    assert inputs.email("email", "a+b@example.com") != inputs.email("email", "a@example.com")


@pytest.mark.parametrize("bad", BAD_ADDRESSES, ids=lambda bad: ascii(bad)[:20])
def test_a_bad_address_is_refused(bad: object) -> None:
    with pytest.raises(InvalidInputError) as caught:
        inputs.email("email", bad)
    assert caught.value.field == "email"


def test_the_value_itself_is_not_in_the_error() -> None:
    with pytest.raises(InvalidInputError) as caught:
        inputs.email("email", "very private@example.org")
    assert "private" not in f"{caught.value!s} {caught.value!r}"


def test_the_longest_address() -> None:
    assert len(inputs.email("email", "x" * 242 + "@example.com")) == 254


def test_text_at_its_limits() -> None:
    assert inputs.text("name", "x" * 200, max=200) == "x" * 200
    assert inputs.text("name", "", max=200, min=0) == ""
    for bad in ("", "x" * 201, "a\0b", "\udfff", None, 5, b"x", True):
        with pytest.raises(InvalidInputError):
            inputs.text("name", bad, max=200)


def test_a_pattern_must_match_the_whole_text() -> None:
    pattern = re.compile("[a-z]+")
    assert inputs.text("provider", "github", max=64, pattern=pattern) == "github"
    for bad in ("github\n", "GitHub", "git hub"):
        with pytest.raises(InvalidInputError):
            inputs.text("provider", bad, max=64, pattern=pattern)


@pytest.mark.parametrize("value", ["x", "x" * 255, "üñí", "a b"])
def test_an_identifier(value: str) -> None:
    assert inputs.identifier("user_id", value) == value


def test_an_instant_comes_back_in_utc() -> None:
    berlin = timezone(timedelta(hours=2))
    answer = inputs.instant("at", datetime(2026, 7, 1, 14, tzinfo=berlin))
    assert answer == datetime(2026, 7, 1, 12, tzinfo=UTC)
    assert answer.tzinfo is UTC


@pytest.mark.parametrize(
    ("check", "bad"),
    [
        (inputs.identifier, ""),
        (inputs.identifier, "x" * 256),
        (inputs.identifier, None),
        (inputs.instant, datetime(2026, 7, 1)),  # noqa: DTZ001 - a naive datetime is what is refused
        (inputs.instant, "2026-07-01T00:00:00Z"),
        (inputs.instant, datetime.max.replace(tzinfo=timezone(timedelta(hours=-5)))),
        (inputs.instant, None),
        (inputs.duration, 5),
        (inputs.duration, timedelta(seconds=-1)),
        (inputs.duration, timedelta.max),
        (inputs.whole_number, True),
        (inputs.whole_number, 1.0),
        (inputs.whole_number, "1"),
        (inputs.whole_number, -1),
        (inputs.whole_number, 2_147_483_648),
        (inputs.whole_number, float("nan")),
        (inputs.flag, 1),
        (inputs.flag, None),
        (inputs.secret, b"token"),
        (inputs.secret, None),
    ],
)
def test_bad_values_are_one_error_that_says_what_would_be_right(
    check: Callable[[str, object], Any], bad: object
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        check("argument", bad)
    assert caught.value.field == "argument"
    assert caught.value.problem
    assert caught.value.expected


def test_good_values_come_back() -> None:
    assert inputs.duration("ttl", timedelta(days=7)) == timedelta(days=7)
    assert inputs.whole_number("tokens", 2_147_483_647) == 2_147_483_647
    assert inputs.flag("refresh", False) is False
    assert inputs.secret("token", "\0\ud800" * 10) == "\0\ud800" * 10
