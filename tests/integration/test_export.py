"""Everything of a user as JSON, and nothing of a user any more."""

from __future__ import annotations

import json

import anyio
import pytest
from racing import warm_up

from factories import AT, make_account, make_session, make_subscription, make_usage, make_user
from kitrocket.engine import Engine
from kitrocket.errors import InvalidInputError, UserNotFoundError
from kitrocket.models import UserExport
from kitrocket.testing import ManualClock
from kitrocket.users import UserService

pytestmark = pytest.mark.asyncio

SECRETS = ["k1$stored-session-token", "gho_access", "ghr_refresh", "$argon2id$hash", "id-token"]


@pytest.fixture
def users(engine: Engine, clock: ManualClock) -> UserService:
    return UserService(engine, clock=clock)


async def make_all(engine: Engine, user_id: str) -> None:
    """Rows of a user in each of the five tables."""
    await make_session(engine, user_id, id=f"s-{user_id}", token=f"{SECRETS[0]}{user_id}", ip_address="203.0.113.7")
    await make_account(
        engine,
        user_id,
        id=f"a-{user_id}",
        access_token=SECRETS[1],
        refresh_token=SECRETS[2],
        expires_at=AT,
        password=SECRETS[3],
        provider_account_id=user_id,
    )
    await make_subscription(engine, user_id, id=f"b-{user_id}", dodo_customer_id="cus_1")
    await make_usage(engine, user_id, id=f"u-{user_id}", tokens=12, model="claude")


async def test_every_row_of_the_five_tables_and_no_secret(users: UserService, engine: Engine) -> None:
    for owner in ("ada", "eve"):
        await make_user(engine, id=owner, email=f"{owner}@example.com", email_verified=AT)
        await make_all(engine, owner)
    # Another application may have added columns, and secrets in them.
    await engine.fetch("ALTER TABLE accounts ADD COLUMN id_token text DEFAULT 'id-token'")
    export = await users.export("ada")
    noon = "2026-03-01T12:00:00+00:00"
    week = "2026-03-08T12:00:00+00:00"
    assert json.loads(export.model_dump_json()) == {
        "user": {
            "id": "ada",
            "email": "ada@example.com",
            "name": "Ada",
            "email_verified": noon,
            "avatar": None,
            "created_at": noon,
            "updated_at": noon,
        },
        "sessions": [
            {
                "id": "s-ada",
                "user_id": "ada",
                "expires_at": week,
                "ip_address": "203.0.113.7",
                "user_agent": None,
                "created_at": noon,
            }
        ],
        "accounts": [
            {
                "id": "a-ada",
                "user_id": "ada",
                "provider": "github",
                "provider_account_id": "ada",
                "expires_at": noon,
                "created_at": noon,
            }
        ],
        "subscriptions": [
            {
                "id": "b-ada",
                "user_id": "ada",
                "plan": "pro",
                "status": "active",
                "dodo_customer_id": "cus_1",
                "dodo_subscription_id": None,
                "current_period_end": None,
                "created_at": noon,
                "updated_at": noon,
            }
        ],
        "usage": [{"id": "u-ada", "user_id": "ada", "tokens_used": 12, "model": "claude", "created_at": noon}],
    }
    shown = f"{export!r} {export.model_dump_json()}"
    assert not any(secret in shown for secret in SECRETS)


async def test_all_columns_but_the_secret_ones_are_exported(users: UserService, engine: Engine) -> None:
    """A column that a migration adds to the five must be exported, or be named here as a secret."""
    await make_user(engine, id="ada")
    await make_all(engine, "ada")
    export = await users.export("ada")
    left_out = {"sessions.token", "accounts.access_token", "accounts.refresh_token", "accounts.password"}
    rows = {
        "users": export.user,
        **{part: getattr(export, part)[0] for part in UserExport.model_fields if part != "user"},
    }
    columns = await engine.fetch(
        "SELECT table_name || '.' || column_name FROM information_schema.columns"
        " WHERE table_schema = 'public' AND table_name = ANY ($1)",
        list(rows),
    )
    exported = {f"{table}.{column}" for table, row in rows.items() for column in row}
    assert {column[0] for column in columns} - exported == left_out


async def test_many_rows_oldest_first(users: UserService, engine: Engine) -> None:
    user_id = await make_user(engine)
    await engine.fetch(
        "INSERT INTO usage (id, user_id, tokens_used, model, created_at)"
        " SELECT 'u' || n, $1, n, 'm', timestamp '2026-01-01' + n * interval '1 s' FROM generate_series(5000, 1, -1) n",
        user_id,
    )
    assert [row["tokens_used"] for row in (await users.export(user_id)).usage] == list(range(1, 5001))


async def test_a_user_with_nothing(users: UserService, engine: Engine) -> None:
    export = await users.export(await make_user(engine))
    assert (export.sessions, export.accounts, export.subscriptions, export.usage) == ([], [], [], [])


async def test_an_export_is_of_one_instant(users: UserService, engine: Engine) -> None:
    """Another writer commits a row of each table at a time; none is ever seen without the others."""
    await warm_up(engine)
    user_id = await make_user(engine)
    done = anyio.Event()

    async def write() -> None:
        for number in range(60):
            async with engine.transaction():
                await make_usage(engine, user_id)
                await make_session(engine, user_id)
                await make_account(engine, user_id)
                await make_subscription(engine, user_id, status="cancelled")
                await engine.fetch("UPDATE users SET name = $2 WHERE id = $1", user_id, str(number + 1))
        done.set()

    seen: set[int] = set()
    async with anyio.create_task_group() as group:
        group.start_soon(write)
        while not done.is_set():
            export = await users.export(user_id)
            sizes = {len(rows) for rows in (export.sessions, export.accounts, export.subscriptions, export.usage)}
            assert len(sizes) == 1
            size = sizes.pop()
            seen.add(size)
            assert size == 0 or export.user["name"] == str(size)
    assert len(seen) > 5


async def test_inside_a_transaction_its_own_rows_are_exported(users: UserService, engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError):
        async with engine.transaction():
            await make_user(engine, id="ada")
            assert (await users.export("ada")).user["id"] == "ada"
            raise ZeroDivisionError


async def test_who_cannot_be_exported(users: UserService) -> None:
    with pytest.raises(UserNotFoundError):
        await users.export("nobody")
    for bad in (None, 5, "", "a\0b", "\ud800", "x" * 1_000_000):
        with pytest.raises(InvalidInputError):
            await users.export(bad)  # type: ignore[arg-type]  # on purpose


async def test_after_a_deletion_no_row_is_left(users: UserService, engine: Engine) -> None:
    for owner in ("ada", "eve"):
        await make_user(engine, id=owner)
        await make_all(engine, owner)
    gone = await users.delete("ada")
    assert (gone.sessions, gone.accounts, gone.subscriptions, gone.usage) == (1, 1, 1, 1)
    for table in ("users", "sessions", "accounts", "subscriptions", "usage"):
        rows = [row[0] for row in await engine.fetch(f"SELECT {table}::text FROM {table}")]
        assert len(rows) == 1
        assert "ada@" not in rows[0]
        assert "-ada" not in rows[0]
    with pytest.raises(UserNotFoundError):
        await users.export("ada")
