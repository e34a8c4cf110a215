"""The npm packages themselves and kitrocket on one database: `make test-better-auth`."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import unquote

import asyncpg
import pytest
import pytest_asyncio
from catalogue import columns, constraints, indexes
from supabase import ROLES, acting_as, grant_everything, roles

from better_auth import FOLDER, Browser, better_auth, changed_schema, environment, exported, push, require_node
from kitrocket.better_auth import SESSIONS_CREATED_AT, migrate_better_auth
from kitrocket.clock import utc_now
from kitrocket.ddl import SEED_INDEXES
from kitrocket.engine import Engine
from kitrocket.errors import EmailTakenError
from kitrocket.inputs import email, normalised_email
from kitrocket.kit import KitRocket
from kitrocket.migrations import find_exposed, protect
from kitrocket.settings import Settings

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.node,
    pytest.mark.direct,
    pytest.mark.timeout(180),
    pytest.mark.usefixtures("turn_with_roles"),
]

TESTS = Path(__file__).resolve().parents[1]
TABLES = ["users", "sessions", "accounts", "subscriptions", "usage", "verification", "migration"]
EMAIL, PASSWORD = "ada@example.com", "pässwörd-ﬁ-Å-密码-🔑"


@pytest_asyncio.fixture
async def kit(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> KitRocket:
    """kitrocket in the shared mode, by the settings that the guide exports."""
    require_node()
    await migrate_better_auth(engine)
    for name, value in exported().items():
        monkeypatch.setenv(name, value)
    return KitRocket(Settings(), engine=engine, background=False)


@pytest_asyncio.fixture
async def address(kit: KitRocket, database_url: str) -> AsyncIterator[str]:
    """Better Auth on the same database."""
    async with better_auth(database_url) as address:
        yield address


def cookies_of(kit: KitRocket, token: str, *, remember: bool = True) -> dict[str, str]:
    """What a browser keeps of the cookies that kitrocket sets."""
    pairs = [line.partition(";")[0].partition("=")[::2] for line in kit.session_cookie.write(token, remember=remember)]
    return {name: value for name, value in pairs if value}


def header_of(browser: Browser) -> str:
    return "; ".join(f"{cookie.name}={cookie.value}" for cookie in browser.client.cookies.jar)


async def test_who_signed_up_there_is_signed_in_here(kit: KitRocket, address: str) -> None:
    async with Browser(address) as browser:
        answer = await browser.post("/sign-up/email", email="Ada@Example.com", name="Ada", password=PASSWORD)
        assert answer.status_code == 200, answer.text
        assert unquote(browser.client.cookies["better-auth.session_token"]).startswith(answer.json()["token"])
        token = kit.session_cookie.read(header_of(browser))
        assert token == answer.json()["token"]
        assert kit.session_cookie.is_remembered(header_of(browser))
    found = await kit.sessions.validate(token)
    assert found is not None
    assert (found.user.email, found.user.name, found.user.email_verified) == (EMAIL, "Ada", None)
    assert found.session.user_agent == "Browser/1.0"
    assert abs(found.session.created_at - utc_now()) < timedelta(seconds=30)
    # The package reads its clock once for each of the two times.
    assert abs(found.session.expires_at - found.session.created_at - timedelta(days=7)) < timedelta(seconds=1)
    user = await kit.users.authenticate(email=EMAIL, password=PASSWORD)
    assert user == found.user
    assert await kit.users.authenticate(email=EMAIL, password=PASSWORD + "x") is None
    [account] = await kit.accounts.list(user.id)
    assert (account.provider, account.provider_account_id) == ("credential", user.id)


async def test_who_signed_up_here_signs_in_there(kit: KitRocket, address: str) -> None:
    user = await kit.users.create(email="Ada@Example.com", name="Ada", password=PASSWORD)
    async with Browser(address) as browser:
        wrong = await browser.post("/sign-in/email", email=EMAIL, password=PASSWORD + "x")
        assert wrong.status_code == 401
        answer = await browser.post("/sign-in/email", email="ADA@example.com", password=PASSWORD)
        assert answer.status_code == 200, answer.text
        assert answer.json()["user"]["id"] == user.id
        again = await browser.post("/sign-up/email", email=EMAIL, name="Other", password=PASSWORD)
        assert again.status_code == 422
    assert (await kit.sessions.validate(answer.json()["token"])) is not None


async def test_an_address_is_stored_in_one_form_by_both(kit: KitRocket, address: str, engine: Engine) -> None:
    before = [
        "ada@example.com",
        "Grace@example.com",
        "ALAN@EXAMPLE.COM",
        "barbara@Example.Com",
        "Ken+Unix@example.com",
        "dennis.ritchie@example.com",
        "D.Knuth@example.com",
        "d.e.k@example.com",
        "a@b.co",
        "X@Y.io",
        "1@example.com",
        "007@MI6.example",
        "under_score@example.com",
        "dash-ed@exa-mple.com",
        "apo'strophe@example.com",
        "Sub@mail.Dept.example.com",
        "plus+plus+plus@example.com",
        "i@example.com",
        "I.I@example.com",
        "mixedCASE123@Example.ORG",
    ]
    async with Browser(address) as browser:
        for number, text in enumerate(before):
            answer = await browser.post("/sign-up/email", email=text, name="A", password="correct horse")
            assert answer.status_code == 200, text
            stored = await engine.fetchval("SELECT email FROM users WHERE id = $1", answer.json()["user"]["id"])
            assert stored == normalised_email(text) == email("email", text)
            with pytest.raises(EmailTakenError):
                await kit.users.create(email=text.swapcase(), name="B")
            assert await engine.fetchval("SELECT count(*) FROM users") == number + 1


async def test_a_password_from_before_is_nothing_there(kit: KitRocket, address: str, engine: Engine) -> None:
    before = KitRocket(Settings(password_scheme="argon2id"), engine=engine, background=False)
    user = await before.users.create(email=EMAIL, name="Ada", password=PASSWORD)
    async with Browser(address) as browser:
        answer = await browser.post("/sign-in/email", email=EMAIL, password=PASSWORD)
        assert answer.status_code >= 400
    assert await kit.users.authenticate(email=EMAIL, password=PASSWORD) == user


async def test_a_cookie_set_here_is_a_session_there(kit: KitRocket, address: str) -> None:
    user = await kit.users.create(email=EMAIL, name="Ada", password=PASSWORD)
    issued = await kit.sessions.create(user.id, ip_address="203.0.113.7", user_agent="Elsewhere/2.0")
    async with Browser(address, cookies_of(kit, issued.token)) as browser:
        seen = await browser.session()
        assert seen is not None
        assert seen["user"]["email"] == EMAIL
        assert seen["user"]["emailVerified"] is None
        assert seen["session"]["id"] == issued.session.id
        assert seen["session"]["userAgent"] == "Elsewhere/2.0"
        assert datetime.fromisoformat(str(seen["session"]["expiresAt"])) == issued.session.expires_at
        await kit.users.mark_email_verified(user.id)
        seen = await browser.session()
        assert seen is not None
        assert seen["user"]["emailVerified"] is True
    async with Browser(address, {"better-auth.session_token": issued.token}) as browser:
        assert await browser.session() is None


async def test_what_is_revoked_here_is_over_there(kit: KitRocket, address: str) -> None:
    async with Browser(address) as browser:
        answer = await browser.post("/sign-up/email", email=EMAIL, name="Ada", password=PASSWORD)
        token = answer.json()["token"]
        found = await kit.sessions.validate(token)
        assert found is not None
        assert await browser.session() is not None
        assert await kit.sessions.revoke(found.session.id, user_id=found.user.id)
        assert await browser.session() is None
        assert await kit.sessions.validate(token) is None


async def test_what_is_revoked_there_is_over_here(kit: KitRocket, address: str) -> None:
    user = await kit.users.create(email=EMAIL, name="Ada", password=PASSWORD)
    mine, other = [(await kit.sessions.create(user.id)).token for _ in range(2)]
    async with Browser(address, cookies_of(kit, mine)) as browser:
        listed = (await browser.client.get("/list-sessions")).json()
        assert {one["token"] for one in listed} == {mine, other}
        answer = await browser.post("/revoke-other-sessions")
        assert answer.status_code == 200, answer.text
        assert await kit.sessions.validate(other) is None
        assert await kit.sessions.validate(mine) is not None
        answer = await browser.post("/sign-out")
        assert answer.status_code == 200, answer.text
        assert await kit.sessions.validate(mine) is None
        assert sorted(kit.session_cookie.clear()) == sorted(
            line for line in answer.headers.get_list("set-cookie") if "session_data" not in line
        )


async def test_either_side_extends_a_session_of_either(kit: KitRocket, address: str, engine: Engine) -> None:
    async with Browser(address) as browser:
        answer = await browser.post("/sign-up/email", email=EMAIL, name="Ada", password=PASSWORD)
        there = answer.json()["token"]
        await age(engine, timedelta(days=2))
        slid = await kit.sessions.validate(there)
        assert slid is not None
        assert slid.refreshed
        assert abs(slid.session.expires_at - utc_now() - timedelta(days=7)) < timedelta(seconds=30)
        seen = await browser.session()
        assert seen is not None
        assert datetime.fromisoformat(str(seen["session"]["expiresAt"])) == slid.session.expires_at

    user = await kit.users.create(email="grace@example.com", name="Grace")
    here = (await kit.sessions.create(user.id)).token
    await age(engine, timedelta(days=2))
    async with Browser(address, cookies_of(kit, here)) as browser:
        seen = await browser.session()
        assert seen is not None
        extended = datetime.fromisoformat(str(seen["session"]["expiresAt"]))
        assert abs(extended - utc_now() - timedelta(days=7)) < timedelta(seconds=30)
        found = await kit.sessions.validate(here)
        assert found is not None
        assert (found.session.expires_at, found.refreshed) == (extended, False)


async def age(engine: Engine, by: timedelta) -> None:
    await engine.fetch(
        "UPDATE sessions SET created_at = created_at - $1::interval, expires_at = expires_at - $1::interval", by
    )


async def test_a_session_that_is_not_remembered_is_told_by_its_second_cookie(
    kit: KitRocket, address: str, engine: Engine
) -> None:
    user = await kit.users.create(email=EMAIL, name="Ada", password=PASSWORD)
    async with Browser(address) as browser:
        answer = await browser.post("/sign-in/email", email=EMAIL, password=PASSWORD, rememberMe=False)
        assert answer.status_code == 200, answer.text
        assert not kit.session_cookie.is_remembered(header_of(browser))
        found = await kit.sessions.validate(answer.json()["token"])
        assert found is not None
        assert abs(found.session.expires_at - found.session.created_at - timedelta(days=1)) < timedelta(seconds=1)

    short = await kit.sessions.create(user.id, remember=False)
    await age(engine, timedelta(hours=12))
    for remember, kept in ((False, True), (True, False)):
        async with Browser(address, cookies_of(kit, short.token, remember=remember)) as browser:
            seen = await browser.session()
            assert seen is not None
            left = datetime.fromisoformat(str(seen["session"]["expiresAt"])) - utc_now()
            assert (left < timedelta(days=1)) is kept


async def test_a_secret_of_another_application_is_refused_by_both(kit: KitRocket, address: str) -> None:
    user = await kit.users.create(email=EMAIL, name="Ada", password=PASSWORD)
    issued = await kit.sessions.create(user.id)
    stranger = KitRocket(
        Settings(better_auth_secret=["another secret"], session_cookie_secure=False), engine=kit.engine
    )
    cookies = cookies_of(stranger, issued.token)
    assert kit.session_cookie.read("; ".join(map("=".join, cookies.items()))) is None
    async with Browser(address, cookies) as browser:
        assert await browser.session() is None


async def test_both_delete_what_the_other_made(kit: KitRocket, address: str, engine: Engine) -> None:
    async with Browser(address) as browser:
        answer = await browser.post("/sign-up/email", email=EMAIL, name="Ada", password=PASSWORD)
        await browser.post("/request-password-reset", email=EMAIL)
        gone = await kit.users.delete(answer.json()["user"]["id"])
        assert (gone.sessions, gone.accounts) == (1, 1)
        assert await browser.session() is None


async def test_the_vectors_are_still_what_the_packages_make() -> None:
    require_node()
    made = subprocess.run(
        ["node", "--input-type=module"],
        input=(TESTS / "better_auth_vectors.mjs").read_text(encoding="utf-8"),
        cwd=FOLDER,
        env=environment(""),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    stored = json.loads((TESTS / "unit" / "better_auth_vectors.json").read_text(encoding="utf-8"))
    assert json.loads(made.stdout)["cookies"] == stored["cookies"]


async def test_drizzle_sees_no_difference(kit: KitRocket, database_url: str, engine: Engine) -> None:
    async with engine.direct() as connection:
        before = await columns(connection), await constraints(connection), await indexes(connection)
        assert "No changes detected" not in push(database_url)  # row-level security, which nobody asked for before
        assert "No changes detected" in push(database_url)
        assert (await columns(connection), await constraints(connection), await indexes(connection)) == before


async def test_drizzle_keeps_what_was_protected(kit: KitRocket, database_url: str, engine: Engine) -> None:
    async with roles(engine):
        await grant_everything(engine)
        await protect(engine)
        assert "No changes detected" in push(database_url)
        assert await find_exposed(engine) == []


async def test_row_level_security_that_drizzle_switches_off_was_not_the_only_lock(
    kit: KitRocket, database_url: str, engine: Engine
) -> None:
    await kit.users.create(email=EMAIL, name="Ada", password=PASSWORD)
    async with roles(engine):
        await grant_everything(engine)
        await protect(engine)
        with changed_schema(lambda text: text.replace(".enableRLS()", "")) as folder:
            push(database_url, "--force", folder=folder)
        assert await find_exposed(engine) == [f"table {table} has no row-level security" for table in TABLES]
        for role in ROLES:
            async with acting_as(engine, role) as connection:
                for table in TABLES:
                    with pytest.raises(asyncpg.InsufficientPrivilegeError):
                        await connection.fetch(f"SELECT * FROM public.{table}")


async def test_what_drizzle_drops_the_doctor_names(kit: KitRocket, database_url: str, engine: Engine) -> None:
    def without_indexes(text: str) -> str:
        ours = re.compile(r"^ *(uniqueIndex|index)\(\"(?!verification_).*\n", re.MULTILINE)
        return ours.sub("", re.sub(r"\n +\.where", ".where", text))

    with changed_schema(without_indexes) as folder:
        push(database_url, "--force", folder=folder)
    async with engine.direct() as connection:
        assert [index.name for index in SEED_INDEXES if await index.is_valid(connection) is not None] == []
        for index in (*SEED_INDEXES, SESSIONS_CREATED_AT):
            await connection.execute(index.create)
    assert "No changes detected" in push(database_url)
