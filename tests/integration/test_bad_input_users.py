"""Junk for every argument of every public method of users and accounts: a typed error or nothing, and no change."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
import pytest_asyncio
from cryptography.fernet import Fernet
from hypothesis import example, given, settings
from hypothesis import strategies as st

from factories import AT, make_account, make_session, make_user
from kitrocket import KitRocket, Settings
from kitrocket.accounts import AccountService
from kitrocket.engine import Engine
from kitrocket.errors import InvalidInputError, KitRocketError
from kitrocket.models import RefreshedTokens
from kitrocket.testing import ManualClock
from kitrocket.tokens import digest
from kitrocket.users import UserService

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("cheap_hashes")]

ADA, PASSWORD, TOKEN = "ada", "correct horse", "T" * 32
NEVER = timedelta(days=1)


async def refresh(refresh_token: str) -> RefreshedTokens:
    return RefreshedTokens(access_token="new")


#: Each public method with arguments that it takes. A name with a dot is a method of a service.
CALLS: dict[str, dict[str, Any]] = {
    "users.create": {"email": "new@example.com", "name": "New", "password": PASSWORD, "avatar": "a.png", "id": "new"},
    "users.get": {"user_id": ADA},
    "users.get_by_email": {"email": "ada@example.com"},
    "users.get_with_subscription": {"user_id": ADA},
    "users.update": {"user_id": ADA, "name": "Ada L.", "avatar": "b.png"},
    "users.mark_email_verified": {"user_id": ADA, "email": "ada@example.com"},
    "users.export": {"user_id": ADA},
    "users.delete": {"user_id": ADA},
    "users.authenticate": {"email": "ada@example.com", "password": PASSWORD},
    "users.authenticating": {"email": "ada@example.com", "password": PASSWORD},
    "users.change_password": {
        "user_id": ADA,
        "current": PASSWORD,
        "new": "battery staple",
        "keep": TOKEN,
        "revoke": "others",
    },
    "users.change_email": {"user_id": ADA, "email": "new@example.com", "keep": TOKEN, "revoke": "all"},
    "users.request_verification": {"email": "ada@example.com"},
    "users.verify_email": {"token": "verification"},
    "users.request_password_reset": {"email": "ada@example.com"},
    "users.reset_password": {"token": "reset", "new": "battery staple", "revoke": "all"},
    "accounts.link": {
        "user_id": ADA,
        "provider": "google",
        "provider_account_id": "7",
        "access_token": "a",
        "refresh_token": "r",
        "expires_at": AT,
        "keep": TOKEN,
        "revoke": "others",
    },
    "accounts.list": {"user_id": ADA},
    "accounts.unlink": {"user_id": ADA, "account_id": "github-account", "keep": TOKEN, "revoke": "all"},
    "accounts.sign_in": {
        "provider": "google",
        "provider_account_id": "7",
        "email": "ada@example.com",
        "email_verified": True,
        "name": "Ada",
        "avatar": "a.png",
        "access_token": "a",
        "refresh_token": "r",
        "expires_at": AT,
    },
    "accounts.access_token": {"user_id": ADA, "provider": "github", "refresh": refresh, "leeway": timedelta(0)},
    "sign_in": {
        "email": "ada@example.com",
        "password": PASSWORD,
        "ip_address": "203.0.113.7",
        "user_agent": "Firefox",
        "remember": True,
    },
}

#: What is accepted instead of the text (or other type) that an argument is meant to be.
OPTIONAL = {"password", "avatar", "id", "keep", "name", "expires_at", "email", "access_token", "refresh_token"}
OPTIONAL |= {"ip_address", "user_agent"}

#: Arguments that are presented secrets: junk in them is ordinary absence.
PRESENTED = {
    *(
        (name, field)
        for name in ("users.authenticate", "users.authenticating", "sign_in")
        for field in ("email", "password")
    ),
    *(("users.change_password", field) for field in ("current", "keep")),
    ("users.change_email", "keep"),
    ("users.verify_email", "token"),
    ("users.reset_password", "token"),
}

SCRIPTS = "aZ09 @.-_$'\"\\/%;\n\tÀßéΩλЖяאبのかな漢字한글ไทยदेव\u0301\u200b\u202e\ufeff\ufffd😀\U0001d49c"
TEXTS = st.text(st.characters(), max_size=300) | st.text(SCRIPTS, max_size=300)
JUNK = (
    TEXTS
    | st.builds("{}@{}".format, TEXTS, TEXTS)
    | st.sampled_from(["others", "credential", "github", ADA, TOKEN, "ada@example.com"])
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.binary(max_size=50)
    | st.lists(TEXTS, max_size=2)
    | st.dictionaries(TEXTS, TEXTS, max_size=1)
    | st.datetimes()
    | st.timedeltas()
)


async def test_no_public_method_is_forgotten() -> None:
    public = {
        f"{name}.{method}"
        for name, service in (("users", UserService), ("accounts", AccountService))
        for method, _ in inspect.getmembers(service, inspect.isfunction)
        if not method.startswith("_")
    }
    assert set(CALLS) == public | {"sign_in"}
    for name, arguments in CALLS.items():
        owner: Any = UserService if name.startswith("users") else AccountService
        method = getattr(owner if "." in name else KitRocket, name.rpartition(".")[2])
        assert set(arguments) == set(inspect.signature(method).parameters) - {"self"}


async def dump(engine: Engine) -> list[str]:
    rows = await engine.fetch(
        "SELECT users::text FROM users UNION ALL SELECT accounts::text FROM accounts"
        " UNION ALL SELECT sessions::text FROM sessions"
    )
    return sorted(row[0] for row in rows)


class RolledBackError(Exception):
    """Ends a transaction whose changes were legitimate."""


def call_of(kit: KitRocket, name: str, arguments: dict[str, Any]) -> Callable[[], Awaitable[object]]:
    owner, _, method = name.rpartition(".")
    function = getattr(getattr(kit, owner) if owner else kit, method)
    if method != "authenticating":
        return partial(function, **arguments)

    async def enter() -> object:
        async with function(**arguments) as user:
            return user

    return enter


async def try_junk(kit: KitRocket, name: str, good: dict[str, Any], field: str, junk: object) -> None:
    """One call with junk in one argument, in a transaction that is rolled back."""
    before = await dump(kit.engine)
    error: KitRocketError | None = None
    answer: object = None
    try:
        async with kit.engine.transaction():
            try:
                answer = await call_of(kit, name, good | {field: junk})()
            except KitRocketError as caught:
                error = caught
            if error is not None or answer in (None, False, []):
                assert await dump(kit.engine) == before, f"{name} changed something and says nothing of it"
            raise RolledBackError
    except RolledBackError:
        pass
    if isinstance(error, InvalidInputError):
        assert error.field == field, name
        assert not ((name, field) in PRESENTED and isinstance(junk, str)), f"{name} tells junk in {field} from absence"
        assert not (isinstance(junk, str) and len(junk) > 300 and junk in f"{error} {error!r}")
    is_of_its_type = type(junk) is type(good[field]) or (junk is None and field in OPTIONAL)
    assert is_of_its_type or isinstance(error, InvalidInputError), f"{name} took {field} for something"


def examples(function: Any) -> Any:
    """The junk that must always be tried."""
    for junk in (
        *("", " ", "\0", "a\0b", "\ud800", "\udfff@example.com", "x" * 1_000_000, "é" * 200_000, "@", "a@b@c"),
        *(
            "Ada\n",
            "\u0430d\u0430@example.com",
            "\u202eadmin",
            "' OR 1=1 --",
            "x" * 256,
            "x" * 254 + "@x",
            "none",
            "all",
        ),
        *(None, True, 0, -1, 2**70, 1.5, float("nan"), b"ada", ["ada"], {}, datetime(2026, 3, 1), -NEVER, object()),  # noqa: DTZ001 - naive on purpose
        *(datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC), timedelta.max, refresh),
    ):
        function = example(junk=junk)(function)
    return function


@examples
@settings(max_examples=12)
@given(junk=JUNK)
async def test_junk_in_any_argument_changes_nothing(bench: KitRocket, junk: object) -> None:
    tokens = {
        "users.verify_email": await bench.users.request_verification("ada@example.com"),
        "users.reset_password": await bench.users.request_password_reset("ada@example.com"),
    }
    for name, arguments in CALLS.items():
        good = arguments | ({"token": tokens[name]} if name in tokens else {})
        for field in good:
            await try_junk(bench, name, good, field, junk)


@pytest.fixture
def bench(engine: Engine, clock: ManualClock) -> KitRocket:
    return KitRocket(
        Settings(secret="s" * 32, token_keys=[Fernet.generate_key().decode()], on_unverified_local="take_over"),
        engine=engine,
        clock=clock,
        background=False,
    )


@pytest_asyncio.fixture(autouse=True)
async def _rows(engine: Engine, cheap_hashes: Any) -> None:
    await make_user(engine, id=ADA, email="ada@example.com", avatar="a.png")
    await make_account(engine, ADA, provider="credential", password=cheap_hashes.hash(PASSWORD))
    await make_account(
        engine, ADA, id="github-account", access_token="old", refresh_token="r", expires_at=AT + timedelta(hours=1)
    )
    await make_session(engine, ADA, token=digest(TOKEN))
    await make_session(engine, ADA)
