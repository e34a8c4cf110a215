"""Facts about Piccolo and asyncpg that the code relies on: when one changes, this says so before a user does."""

from __future__ import annotations

import pytest
from piccolo.columns.defaults.timestamp import TimestampNow

from kitrocket.engine import Engine
from kitrocket.tables import NewId, Sessions, Users, UtcNow

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_default_made_in_python_leaves_no_trace_in_the_ddl() -> None:
    ddl = "\n".join(str(statement) for statement in Users.create_table().ddl)
    assert '"id" TEXT PRIMARY KEY NOT NULL DEFAULT null' in ddl
    assert "NewId" not in ddl
    assert repr(NewId()) == "NewId()"
    assert len(Users(email="a@b.c", name="A").id) == 32


async def test_our_clock_stands_in_for_piccolos_local_time() -> None:
    assert issubclass(UtcNow, TimestampNow)
    assert UtcNow().postgres == "now()"
    assert UtcNow().python().tzinfo is None


async def test_piccolo_knows_which_columns_are_secret() -> None:
    assert [column._meta.name for column in Sessions._meta.secret_columns] == ["token"]


async def test_update_answers_an_empty_list_so_rows_are_counted_by_returning(engine: Engine) -> None:
    await engine.fetch("INSERT INTO users (id, email, name) VALUES ('a', 'a@example.com', 'A')")
    change = Users.update({Users.name: "B"}).where(Users.id == "a")
    assert await engine.run(change) == []
    assert await engine.run(change.returning(Users.id)) == [{"id": "a"}]


async def test_the_driver_sends_a_float_as_an_integer_silently(engine: Engine) -> None:
    assert await engine.fetchval("SELECT $1::int", 1.5) == 1
    assert await engine.fetchval("SELECT $1::int", True) == 1


async def test_a_released_dirty_connection_is_rolled_back_though_reset_does_nothing(engine: Engine) -> None:
    assert engine.pool is not None
    async with engine.pool.acquire() as connection:
        await connection.execute("BEGIN")
        await connection.execute("CREATE TABLE left_behind ()")
    assert await engine.fetchval("SELECT to_regclass('left_behind')") is None
