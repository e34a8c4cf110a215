"""The opt-in app of what Better Auth wants."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
from catalogue import columns, counts, everything, fill

import factories
from kitrocket.better_auth import APP, SESSIONS_CREATED_AT, migrate_better_auth, piccolo_migrations
from kitrocket.engine import Engine
from kitrocket.kit import KitRocket
from kitrocket.migrations import adopt, migrate
from kitrocket.migrations.forwards import modules_of, run, turn
from kitrocket.testing import ManualClock

pytestmark = [pytest.mark.asyncio, pytest.mark.direct]

IDS = list(modules_of(piccolo_migrations))
WANTED = {
    ("accounts", "updated_at", "timestamp without time zone", False),
    ("accounts", "id_token", "text", False),
    ("accounts", "scope", "text", False),
    ("accounts", "refresh_token_expires_at", "timestamp without time zone", False),
    ("sessions", "updated_at", "timestamp without time zone", False),
    ("verification", "id", "text", True),
    ("verification", "identifier", "text", True),
    ("verification", "value", "text", True),
    ("verification", "expires_at", "timestamp without time zone", True),
    ("verification", "created_at", "timestamp without time zone", False),
    ("verification", "updated_at", "timestamp without time zone", False),
}


async def added(engine: Engine, before: list[tuple[object, ...]]) -> set[tuple[object, ...]]:
    async with engine.direct() as connection:
        rows = [row for row in await columns(connection) if row not in before]
    assert all(row[8] is None for row in rows), "a default"
    return {(row[0], row[2], row[3], row[4]) for row in rows}


async def backwards(engine: Engine) -> None:
    async with turn(engine, lambda _line: None) as connection:
        for module in reversed(modules_of(piccolo_migrations).values()):
            await run(connection, APP, await module.forwards(), backwards=True)


async def test_it_adds_what_better_auth_wants_and_takes_it_back(engine: Engine) -> None:
    async with engine.direct() as connection:
        before, all_before = await columns(connection), await everything(connection)
        await fill(connection)
        rows = await counts(connection)
    for _ in range(2):
        assert await migrate_better_auth(engine) == IDS
        assert await migrate_better_auth(engine) == []
        assert await added(engine, before) == WANTED
        async with engine.direct() as connection:
            assert await SESSIONS_CREATED_AT.is_valid(connection)
            assert await counts(connection) == rows
        await backwards(engine)
        async with engine.direct() as connection:
            assert await everything(connection) == all_before
            assert await counts(connection) == rows


async def test_what_drizzle_made_already_stays(engine: Engine) -> None:
    await engine.fetch("ALTER TABLE sessions ADD COLUMN updated_at timestamp")
    await engine.fetch("ALTER TABLE accounts ADD COLUMN scope text")
    await engine.fetch(
        "CREATE TABLE public.verification (id text PRIMARY KEY, identifier text NOT NULL, value text NOT NULL,"
        " expires_at timestamp NOT NULL, created_at timestamp, updated_at timestamp)"
    )
    await engine.fetch("INSERT INTO public.verification VALUES ('v1', 'reset', 'secret', '2030-01-01')")
    async with engine.direct() as connection:
        before = await columns(connection)
    assert await migrate_better_auth(engine) == IDS
    assert {row[:2] for row in await added(engine, before)} == {
        ("accounts", "updated_at"),
        ("accounts", "id_token"),
        ("accounts", "refresh_token_expires_at"),
    }
    assert await engine.fetchval("SELECT value FROM verification") == "secret"


async def test_a_database_with_it_is_still_adopted(engine: Engine) -> None:
    await migrate_better_auth(engine)
    await engine.fetch("DROP TABLE migration")
    said: list[str] = []
    await adopt(engine, report=said.append)
    assert "sessions.updated_at is not the seed's and stays as it is" in said
    assert await migrate_better_auth(engine) == IDS
    assert await migrate(engine) == []


async def test_eight_may_start_at_once(database_url: str) -> None:
    applied: list[list[str]] = []

    async def start() -> None:
        async with Engine(database_url, pool_size=2) as engine:
            applied.append(await migrate_better_auth(engine))

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(start)
    assert sorted(map(len, applied)) == [0] * 7 + [len(IDS)]


async def test_piccolos_own_command_applies_it(empty_database_url: str, engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "piccolo_conf.py").write_text(
        "from piccolo.conf.apps import AppRegistry\n"
        "from kitrocket import Engine\n"
        "DB = Engine()\n"
        'APP_REGISTRY = AppRegistry(apps=["kitrocket.piccolo_app", "kitrocket.better_auth.piccolo_app"])\n'
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PICCOLO", "KITROCKET"))}
    environment["DATABASE_URL"] = empty_database_url

    def piccolo(*arguments: str) -> None:
        done = subprocess.run(
            [str(Path(sys.executable).parent / "piccolo"), "migrations", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    async with engine.direct() as connection:
        without = await everything(connection)
    piccolo("forwards", "all")
    async with Engine(empty_database_url) as other:
        assert await migrate(other) == []
        assert await migrate_better_auth(other) == []
        piccolo("backwards", APP, "all", "--auto_agree")
        async with other.direct() as connection:
            assert await everything(connection) == without
        assert await migrate_better_auth(other) == IDS


async def test_the_index_finds_sessions_past_their_cap(engine: Engine) -> None:
    await migrate_better_auth(engine)
    user = await factories.make_user(engine)
    await engine.fetch(
        "INSERT INTO sessions (id, user_id, token, expires_at, created_at)"
        " SELECT 's' || n, $1, 't' || n, '2030-01-01', '2026-01-01'::timestamp + n * interval '1 second'"
        " FROM generate_series(1, 5000) n",
        user,
    )
    await engine.fetch("ANALYZE sessions")
    plan = await engine.fetch(
        "EXPLAIN SELECT id FROM sessions WHERE created_at <= '2026-01-01 00:00:10' ORDER BY created_at LIMIT 1000"
    )
    assert "sessions_created_at_idx" in "\n".join(row[0] for row in plan)


async def test_kitrocket_writes_beside_the_new_columns(engine: Engine, clock: ManualClock) -> None:
    await migrate_better_auth(engine)
    kit = KitRocket(engine=engine, clock=clock, background=False)
    user = await kit.users.create(email="ada@example.com", name="Ada", password="correct horse")
    issued = await kit.sessions.create(user.id)
    assert await kit.sessions.validate(issued.token) is not None
    assert await engine.fetchval("SELECT updated_at FROM sessions") is None
    assert await engine.fetchval("SELECT updated_at FROM accounts") is None
