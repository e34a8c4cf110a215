"""The migrations of the Studio's login tables."""

from __future__ import annotations

import anyio
import pytest
from piccolo.apps.migrations.commands.new import AutoMigrationManager

from kitrocket.admin import create_staff, migrate_studio, piccolo_migrations
from kitrocket.admin.piccolo_app import APP_CONFIG
from kitrocket.engine import Engine
from kitrocket.migrations.forwards import modules_of, run, turn

pytestmark = [pytest.mark.asyncio, pytest.mark.direct]


async def tables(engine: Engine) -> list[str]:
    rows = await engine.fetch(
        "SELECT schemaname || '.' || tablename AS name FROM pg_tables"
        " WHERE schemaname IN ('public', 'kitrocket') AND tablename <> 'migration' ORDER BY 1"
    )
    return [row["name"] for row in rows]


async def test_no_migration_is_missing() -> None:
    statements = await AutoMigrationManager().get_alter_statements(APP_CONFIG)
    assert [part for statement in statements for part in statement.statements] == []


async def test_eight_may_start_at_once(empty_database_url: str) -> None:
    applied: list[list[str]] = []

    async def start() -> None:
        async with Engine(empty_database_url, pool_size=2) as engine:
            applied.append(await migrate_studio(engine))

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(start)
    assert sorted(map(len, applied)) == [0] * 7 + [len(modules_of(piccolo_migrations))]
    async with Engine(empty_database_url) as engine:
        assert await tables(engine) == ["kitrocket.studio_sessions", "kitrocket.studio_staff"]
        await create_staff(engine, "grace")


async def test_each_step_goes_back_and_forth(empty_database_url: str) -> None:
    async with Engine(empty_database_url) as engine:
        await migrate_studio(engine)
        for _ in range(2):
            async with turn(engine, lambda _line: None) as connection:
                for module in reversed(modules_of(piccolo_migrations).values()):
                    await run(connection, APP_CONFIG.app_name, await module.forwards(), backwards=True)
            assert await tables(engine) == []
            await migrate_studio(engine)
            assert await tables(engine) == ["kitrocket.studio_sessions", "kitrocket.studio_staff"]
