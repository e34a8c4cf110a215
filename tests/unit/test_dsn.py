"""From a URL to connection arguments: TLS, poolers, UTC."""

from __future__ import annotations

import shutil
import ssl
from pathlib import Path

import certifi
import pytest

from kitrocket.engine.dsn import connection_arguments, is_transaction_pooler
from kitrocket.errors import ConfigurationError

LOCAL = [
    "postgres://u:p@localhost/app",
    "postgres://u:p@127.0.0.1:5432/app",
    "postgres://u:p@[::1]:5432/app",
    "postgres:///app?host=/run/postgresql",
    "postgres://u@%2Frun%2Fpostgresql/app",
]
REMOTE = [
    "postgres://u:p@db.example.com/app",
    "postgresql://u:p@db.example.com:5432/app",
    "postgres://u:p@localhost:5432,db.example.com:5432/app",
    "postgres:///app?host=db.example.com",
]


@pytest.mark.parametrize("url", LOCAL)
def test_a_local_host_is_spoken_to_as_the_driver_likes(url: str) -> None:
    assert "ssl" not in connection_arguments(url, pooler=False)


@pytest.mark.parametrize("url", REMOTE)
def test_another_host_must_prove_who_it_is(url: str) -> None:
    context = connection_arguments(url, pooler=False)["ssl"]
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


@pytest.mark.parametrize("url", REMOTE)
@pytest.mark.parametrize("word", ["sslmode=disable", "sslmode=require", "sslmode=verify-ca&sslrootcert=/ca.pem"])
def test_the_url_has_the_last_word_on_tls(url: str, word: str) -> None:
    joint = "&" if "?" in url else "?"
    assert "ssl" not in connection_arguments(f"{url}{joint}{word}", pooler=False)


def test_full_verification_without_an_authority_trusts_what_the_system_trusts() -> None:
    assert connection_arguments("postgres://localhost/app?sslmode=verify-full", pooler=False)["ssl"].check_hostname


def test_an_authority_in_the_url_is_the_one_that_is_trusted(tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    url = f"postgres://db.example.com/app?sslrootcert={authority}"
    with pytest.raises(ConfigurationError, match="cannot be read"):
        connection_arguments(url, pooler=False)
    shutil.copy(certifi.where(), authority)
    assert connection_arguments(url, pooler=False)["ssl"].verify_mode is ssl.CERT_REQUIRED


def test_every_connection_speaks_utc_and_says_who_it_is() -> None:
    settings = connection_arguments("postgres://localhost/app", pooler=False)["server_settings"]
    assert settings == {"timezone": "UTC", "application_name": "kitrocket"}


def test_behind_a_pooler_statements_are_not_cached_and_nothing_else_is_set() -> None:
    arguments = connection_arguments("postgres://localhost/app", pooler=True)
    assert arguments["statement_cache_size"] == 0
    assert set(arguments["server_settings"]) <= {"timezone", "application_name"}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (None, False),
        ("postgres://u:6543@db.example.com:5432/app", False),
        ("postgres://u:p@aws-0.pooler.supabase.com:6543/postgres", True),
        ("postgres:///app?host=h&port=6543", True),
    ],
)
def test_supabases_transaction_pooler_is_known_by_its_port(url: str | None, expected: bool) -> None:
    assert is_transaction_pooler(url) is expected
