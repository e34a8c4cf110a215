"""What the environment says is what the settings are."""

from __future__ import annotations

from datetime import timedelta

import pytest
from pydantic import ValidationError

from kitrocket.settings import Settings


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("0", timedelta(0)),
        ("300", timedelta(seconds=300)),
        ("0.5", timedelta(seconds=0.5)),
        ("P7D", timedelta(days=7)),
        ("PT5M", timedelta(minutes=5)),
    ],
)
def test_a_duration_is_seconds_or_iso_8601(monkeypatch: pytest.MonkeyPatch, text: str, meant: timedelta) -> None:
    monkeypatch.setenv("KITROCKET_SESSION_SWEEP_INTERVAL", text)
    assert Settings().session_sweep_interval == meant


def test_every_duration_takes_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = [name for name, field in Settings.model_fields.items() if isinstance(field.default, timedelta)]
    for name in durations:
        monkeypatch.setenv(f"KITROCKET_{name.upper()}", "90000" if name == "session_ttl" else "60")
    assert len(durations) == 11
    assert {getattr(Settings(), name) for name in durations} == {timedelta(hours=25), timedelta(minutes=1)}


@pytest.mark.parametrize("text", ["", "soon", "-", "1,5"])
def test_what_is_no_duration_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("KITROCKET_SESSION_SWEEP_INTERVAL", text)
    with pytest.raises(ValidationError, match="session_sweep_interval"):
        Settings()


def test_none_takes_a_limit_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITROCKET_SESSION_MAX_LIFETIME", "none")
    monkeypatch.setenv("KITROCKET_SESSION_MAX_SESSIONS", "none")
    settings = Settings()
    assert settings.session_max_lifetime is None
    assert settings.session_max_sessions is None


def test_the_attempts_have_a_shorter_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings(webhook_attempts=3).webhook_max_attempts == 3  # type: ignore[call-arg]  # the other name
    for variable, value in (("KITROCKET_WEBHOOK_ATTEMPTS", 4), ("KITROCKET_WEBHOOK_MAX_ATTEMPTS", 5)):
        monkeypatch.setenv(variable, str(value))
        assert Settings().webhook_max_attempts == value


def test_lists_take_commas_or_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITROCKET_PLANS", "starter, pro")
    monkeypatch.setenv("KITROCKET_DODO_USER_KEYS", '["a", "b"]')
    settings = Settings()
    assert settings.plans == ["starter", "pro"]
    assert settings.dodo_user_keys == ["a", "b"]


def test_secrets_stay_out_of_the_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://ada:hunter2@127.0.0.1/app")
    monkeypatch.setenv("DODO_PAYMENTS_WEBHOOK_KEY", "whsec_hunter2")
    assert "hunter2" not in repr(Settings())


@pytest.mark.parametrize("variable", ["DATABASE_URL", "DATABASE_DIRECT_URL", "DODO_PAYMENTS_BASE_URL"])
def test_an_address_may_hold_a_secret_and_an_empty_one_is_none(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    assert {name.upper() for name in Settings.model_fields if name.endswith("_url")} == {
        "DATABASE_URL",
        "DATABASE_DIRECT_URL",
        "DODO_PAYMENTS_BASE_URL",
    }
    monkeypatch.setenv(variable, "https://ada:hunter2@127.0.0.1/app")
    settings = Settings()
    assert "hunter2" not in repr(settings) + settings.model_dump_json()
    found = getattr(settings, variable.lower())
    assert found.get_secret_value() == "https://ada:hunter2@127.0.0.1/app"
    monkeypatch.setenv(variable, "")
    assert getattr(Settings(), variable.lower()) is None


def test_better_auths_secrets_are_a_list_that_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITROCKET_BETTER_AUTH_SECRET", "new-secret, old-secret")
    settings = Settings()
    assert [secret.get_secret_value() for secret in settings.better_auth_secret] == ["new-secret", "old-secret"]
    assert "old-secret" not in repr(settings) + settings.model_dump_json()
    monkeypatch.setenv("KITROCKET_BETTER_AUTH_SECRET", '["a,b"]')
    assert [secret.get_secret_value() for secret in Settings().better_auth_secret] == ["a,b"]


@pytest.mark.parametrize("length", [31, 32, 33])
def test_a_secret_has_at_least_32_bytes(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setenv("KITROCKET_SECRET", "s" * length)
    if length < 32:
        with pytest.raises(ValidationError, match="at least 32 bytes") as caught:
            Settings()
        assert "sss" not in str(caught.value)
    else:
        found = Settings().secret
        assert found is not None
        assert found.get_secret_value() == "s" * length
        assert "sss" not in repr(Settings())


def test_an_empty_secret_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITROCKET_SECRET", "")
    assert Settings().secret is None


def test_how_identities_are_linked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Settings().trusted_providers, Settings().on_unverified_local) == ([], "refuse")
    monkeypatch.setenv("KITROCKET_TRUSTED_PROVIDERS", "google, apple")
    monkeypatch.setenv("KITROCKET_ON_UNVERIFIED_LOCAL", "take_over")
    assert (Settings().trusted_providers, Settings().on_unverified_local) == (["google", "apple"], "take_over")
    monkeypatch.setenv("KITROCKET_ON_UNVERIFIED_LOCAL", "merge")
    with pytest.raises(ValidationError, match="on_unverified_local"):
        Settings()
