from __future__ import annotations

from datetime import UTC, datetime

import pytest
from cryptography.fernet import Fernet

from kitrocket.encryption import TokenCipher
from kitrocket.errors import ConfigurationError

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
OLD, NEW = Fernet.generate_key().decode(), Fernet.generate_key().decode()


def test_without_keys_a_token_is_stored_as_it_is() -> None:
    cipher = TokenCipher()
    assert cipher.encrypt("gho_secret", NOW) == "gho_secret"
    assert cipher.decrypt("gho_secret") == "gho_secret"


def test_with_keys_it_is_not() -> None:
    cipher = TokenCipher([NEW])
    stored = cipher.encrypt("gho_secret", NOW)
    assert stored is not None
    assert stored.startswith("f1$")
    assert "gho_secret" not in stored
    assert cipher.decrypt(stored) == "gho_secret"
    assert Fernet(NEW).extract_timestamp(stored.removeprefix("f1$")) == int(NOW.timestamp())


def test_tokens_stay_readable_when_keys_are_rotated() -> None:
    stored = TokenCipher([OLD]).encrypt("gho_secret", NOW)
    rotated = TokenCipher([NEW, OLD])
    assert rotated.decrypt(stored) == "gho_secret"
    again = rotated.encrypt("gho_secret", NOW)
    assert TokenCipher([NEW]).decrypt(again) == "gho_secret", "the first key writes"


def test_what_was_stored_before_there_were_keys_is_read() -> None:
    assert TokenCipher([NEW]).decrypt("gho_secret") == "gho_secret"


def test_no_token_stays_none() -> None:
    assert TokenCipher([NEW]).encrypt(None, NOW) is None
    assert TokenCipher([NEW]).decrypt(None) is None


@pytest.mark.parametrize("keys", [[], [NEW]])
def test_a_token_that_no_key_reads(keys: list[str]) -> None:
    stored = TokenCipher([OLD]).encrypt("gho_secret", NOW)
    with pytest.raises(ConfigurationError, match="KITROCKET_TOKEN_KEYS"):
        TokenCipher(keys).decrypt(stored)


@pytest.mark.parametrize(
    "key", ["", "short", "x" * 44, NEW[:-2], "ü" * 44], ids=["empty", "short", "too long", "cut", "no ASCII"]
)
def test_a_bad_key_is_named_by_its_setting_and_not_quoted(key: str) -> None:
    with pytest.raises(ConfigurationError, match="KITROCKET_TOKEN_KEYS") as caught:
        TokenCipher([NEW, key])
    assert not key or key not in f"{caught.value}{caught.value.__cause__}"
