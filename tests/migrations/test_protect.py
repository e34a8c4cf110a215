"""Supabase's roles see nothing, whatever drizzle-kit switches off."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import asyncpg
import pytest
import pytest_asyncio
from catalogue import SEED_TABLES, fill
from supabase import ROLES, acting_as, grant_everything, roles

from kitrocket.better_auth import migrate_better_auth
from kitrocket.engine import Engine
from kitrocket.errors import MigrationError
from kitrocket.migrations import find_exposed, protect

pytestmark = [pytest.mark.asyncio, pytest.mark.direct, pytest.mark.usefixtures("turn_with_roles")]

ALL = [*SEED_TABLES, "verification", "migration"]


@pytest_asyncio.fixture
async def supabase(engine: Engine, turn_with_roles: None) -> AsyncIterator[Engine]:
    """A filled database as Supabase has it: its roles, and its grants on every table that is made."""
    await migrate_better_auth(engine)
    async with engine.direct() as connection:
        await fill(connection)
    async with roles(engine):
        await grant_everything(engine)
        yield engine


async def assert_nothing_is_read(engine: Engine) -> None:
    for role in ROLES:
        async with acting_as(engine, role) as connection:
            for table in ALL:
                for sql in (f"SELECT * FROM public.{table}", f"DELETE FROM public.{table}", f"TRUNCATE public.{table}"):
                    with pytest.raises(asyncpg.InsufficientPrivilegeError):
                        await connection.fetch(sql)
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.fetch("SELECT * FROM kitrocket.webhook_events")


async def test_protected_tables_stay_closed_when_push_switches_row_level_security_off(supabase: Engine) -> None:
    async with acting_as(supabase, "anon") as connection:
        assert await connection.fetchval("SELECT token FROM public.sessions") == "secret"
    assert len(await find_exposed(supabase)) == 2 * len(ALL)
    assert await protect(supabase)
    assert await find_exposed(supabase) == []
    await assert_nothing_is_read(supabase)
    for table in ALL:
        await supabase.fetch(f"ALTER TABLE public.{table} DISABLE ROW LEVEL SECURITY")
    await assert_nothing_is_read(supabase)
    assert await find_exposed(supabase) == [f"table {table} has no row-level security" for table in ALL]
    assert await protect(supabase)
    assert await find_exposed(supabase) == []


async def test_row_level_security_is_the_second_lock(supabase: Engine) -> None:
    await protect(supabase)
    await supabase.fetch("GRANT SELECT ON ALL TABLES IN SCHEMA public TO anon")
    async with acting_as(supabase, "anon") as connection:
        for table in ALL:
            assert await connection.fetch(f"SELECT * FROM public.{table}") == []
    assert await find_exposed(supabase) == [f"table {table} is granted to anon" for table in ALL]


async def test_the_owner_is_unaffected(supabase: Engine) -> None:
    owner = await supabase.fetchval("SELECT current_user")
    async with supabase.direct() as connection:
        # A superuser is never held up: what counts is an owner who is none.
        await connection.execute("CREATE ROLE kitrocket_test_owner NOLOGIN")
        try:
            for table in ALL:
                await connection.execute(f"ALTER TABLE public.{table} OWNER TO kitrocket_test_owner")
            await protect(supabase)
            async with acting_as(supabase, "kitrocket_test_owner") as as_owner:
                await as_owner.execute("UPDATE public.users SET name = 'Grace'")
                assert await as_owner.fetchval("SELECT name FROM public.users") == "Grace"
                assert await as_owner.fetchval("SELECT token FROM public.sessions") == "secret"
        finally:
            for table in ALL:
                await connection.execute(f"ALTER TABLE public.{table} OWNER TO {owner}")
            await connection.execute("DROP OWNED BY kitrocket_test_owner")
            await connection.execute("DROP ROLE kitrocket_test_owner")


@pytest.mark.parametrize(
    "grant",
    [
        "SELECT ON public.users TO authenticated",
        "SELECT (email) ON public.users TO anon",
        "INSERT ON public.usage TO anon",
        "TRUNCATE ON public.sessions TO authenticated",
        "REFERENCES (id) ON public.users TO anon",
        "SELECT ON public.accounts TO PUBLIC",
        "USAGE ON SCHEMA kitrocket TO anon",
        "CREATE ON SCHEMA kitrocket TO PUBLIC",
    ],
)
async def test_anything_granted_is_found_and_revoked(supabase: Engine, grant: str) -> None:
    await protect(supabase)
    await supabase.fetch(f"GRANT {grant}")
    assert len(await find_exposed(supabase)) >= 1
    await protect(supabase)
    assert await find_exposed(supabase) == []


async def test_what_comes_through_another_role_is_said(supabase: Engine) -> None:
    await supabase.fetch("CREATE ROLE kitrocket_test_group NOLOGIN")
    try:
        await supabase.fetch("GRANT SELECT ON public.users TO kitrocket_test_group")
        await supabase.fetch("GRANT kitrocket_test_group TO anon")
        with pytest.raises(MigrationError, match="table users is granted to anon"):
            await protect(supabase)
    finally:
        await supabase.fetch("DROP OWNED BY kitrocket_test_group")
        await supabase.fetch("DROP ROLE kitrocket_test_group")


async def test_a_busy_table_is_waited_for(supabase: Engine) -> None:
    async with supabase.direct() as writer:
        transaction = writer.transaction()
        await transaction.start()
        await writer.execute("UPDATE public.users SET name = 'Grace'")
        said: list[str] = []

        async with anyio.create_task_group() as group:

            async def work() -> None:
                await protect(supabase, report=said.append)

            group.start_soon(work)
            while not await supabase.fetchval(
                "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'public.users'::regclass"
            ):
                await anyio.sleep(0.01)
            await transaction.commit()
    assert said == [f"protected {table}" for table in ALL]


async def test_without_the_roles_nothing_is_changed(engine: Engine) -> None:
    assert await find_exposed(engine) == []
    assert not await protect(engine)
    assert not await engine.fetchval("SELECT bool_or(relrowsecurity) FROM pg_class")
