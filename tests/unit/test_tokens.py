from __future__ import annotations

import itertools
from collections import Counter
from hashlib import sha256

import pytest

from kitrocket.tokens import digest, is_possible, new_token


def test_tokens_are_32_letters_and_digits_and_never_the_same() -> None:
    tokens = {new_token() for _ in range(1_000_000)}
    assert len(tokens) == 1_000_000
    assert all(is_possible(token) for token in itertools.islice(tokens, 100_000))


def test_every_character_is_as_likely_as_another() -> None:
    drawn = Counter("".join(new_token() for _ in range(20_000)))
    assert len(drawn) == 62
    # 10,323 of each on average; without rejection sampling eight of them would stand at 12,500.
    assert min(drawn.values()) > 9_700
    assert max(drawn.values()) < 10_900


def test_a_digest_is_the_sha_256_after_a_prefix() -> None:
    token = new_token()
    assert digest(token) == "k1$" + sha256(token.encode("ascii")).hexdigest()


@pytest.mark.parametrize(
    "token",
    [
        "",
        "a" * 31,
        "a" * 33,
        "a" * 1_000_000,
        "a" * 31 + "\n",
        "a" * 32 + "\n",
        "a" * 31 + "\0",
        "a" * 31 + "é",
        "a" * 31 + "\N{ARABIC-INDIC DIGIT ONE}",
        "a" * 31 + "\ud800",
        " " + "a" * 31,
        digest("a" * 32),
    ],
)
def test_what_is_no_token_is_known_without_a_query(token: str) -> None:
    assert not is_possible(token)
