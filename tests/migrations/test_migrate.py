"""Migrating: many processes, two databases, backwards, under load, and after a builder was killed."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import ModuleType, SimpleNamespace

import anyio
import asyncpg
import pytest
import pytest_asyncio
from catalogue import SEED_SQL, counts, everything, fill
from piccolo.apps.migrations.auto.migration_manager import MigrationManager
from piccolo.apps.migrations.tables import Migration

from kitrocket import ddl, piccolo_migrations
from kitrocket.ddl import SEED_INDEXES, SESSIONS_USER_ID
from kitrocket.engine import Engine
from kitrocket.errors import ConfigurationError, MigrationError, SchemaMismatchError, SchemaNotMigratedError
from kitrocket.migrations import adopt, check, migrate, pending
from kitrocket.migrations.forwards import APP, applied, forwards, modules_of, run, silence, turn
from servers import Server

pytestmark = pytest.mark.asyncio

MODULES = modules_of(piccolo_migrations)


@pytest_asyncio.fixture
async def empty(empty_database_url: str) -> AsyncIterator[Engine]:
    async with Engine(empty_database_url) as engine:
        yield engine


@asynccontextmanager
async def a_writer_in_the_middle(engine: Engine, sql: str) -> AsyncIterator[None]:
    """Somebody's transaction that wrote and has not ended yet."""
    async with engine.direct() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(sql)
        try:
            yield
        finally:
            await transaction.rollback()


async def until(engine: Engine, sql: str) -> None:
    with anyio.fail_after(60):
        while not await engine.fetchval(sql):
            await anyio.lowlevel.checkpoint()


WAITING = "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
BUILDER = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'CREATE %INDEX CONC%'"


async def test_an_empty_database_is_brought_to_this_version_once(empty: Engine) -> None:
    assert await pending(empty) == list(MODULES)
    with pytest.raises(SchemaNotMigratedError) as caught:
        await check(empty)
    assert caught.value.pending == tuple(MODULES)
    assert "kitrocket db migrate" in str(caught.value)

    lines: list[str] = []
    assert await migrate(empty, report=lines.append) == list(MODULES)
    assert [line.split(" ")[0] for line in lines] == ["applied"] * len(MODULES)
    assert await migrate(empty) == []
    await check(empty)


async def test_nothing_is_printed(empty: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    await migrate(empty)
    assert capsys.readouterr() == ("", "")


PROGRAM = """
import asyncio, json, sys
from kitrocket.engine import Engine
from kitrocket.migrations import check, migrate, pending

async def main():
    engine = Engine(sys.argv[1])
    await pending(engine)
    print("ready", flush=True)
    sys.stdin.readline()
    done = await migrate(engine)
    await check(engine)
    print(json.dumps(done))

asyncio.run(main())
"""


async def test_eight_processes_may_migrate_at_once(empty: Engine, empty_database_url: str) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, empty_database_url], text=True, **pipes) for _ in range(8)
    ]
    for process in processes:
        assert await anyio.to_thread.run_sync(process.stdout.readline) == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    ends = [await anyio.to_thread.run_sync(process.communicate) for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, ends
    done = [json.loads(output) for output, _ in ends]
    assert sorted(map(len, done)) == [0] * 7 + [len(MODULES)]
    assert await applied(empty, APP) == set(MODULES)


async def test_many_migrators_in_one_process_take_turns(empty: Engine) -> None:
    done: list[list[str]] = []

    async def one() -> None:
        done.append(await migrate(empty))

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(one)
    assert sorted(map(len, done)) == [0] * 7 + [len(MODULES)]


async def test_two_databases_are_migrated_in_one_process_at_once(empty: Engine, server: Server) -> None:
    name = await server.direct.create()
    try:
        async with Engine(server.url(name, direct=True)) as other, anyio.create_task_group() as group:
            group.start_soon(migrate, empty)
            group.start_soon(migrate, other)
        async with Engine(server.url(name, direct=True)) as other:
            await check(other)
            await check(empty)
            await other.fetch("INSERT INTO users (id, email, name) VALUES ('u', 'e', 'n')")
            assert await empty.fetchval("SELECT count(*) FROM users") == 0
    finally:
        await server.direct.drop(name)


async def test_behind_a_pooler_the_direct_url_is_used(empty_database_url: str) -> None:
    nowhere = "postgres://nobody@127.0.0.1:1/none"
    async with Engine(empty_database_url, direct_url=nowhere, pooler=True) as engine:
        with pytest.raises(Exception, match="cannot be reached"):
            await migrate(engine)
    async with Engine(empty_database_url, pooler=True) as engine:
        with pytest.raises(ConfigurationError, match="DATABASE_DIRECT_URL"):
            await migrate(engine)
    async with Engine(empty_database_url, direct_url=empty_database_url, pooler=True) as engine:
        assert await migrate(engine) == list(MODULES)


async def test_every_step_goes_back_and_forth_with_rows(empty: Engine) -> None:
    states: list[dict[str, object]] = []
    rows: dict[str, int] | None = None
    async with turn(empty, silence) as connection:
        for number in range(len(MODULES)):
            states.append(await everything(connection))
            await forwards(connection, APP, dict(list(MODULES.items())[: number + 1]), silence)
            if number == 0:
                await fill(connection)
                rows = await counts(connection)
        states.append(await everything(connection))

        for number, module in reversed(list(enumerate(MODULES.values()))):
            if number:
                await run(connection, APP, await module.forwards(), backwards=True)
                assert await everything(connection) == states[number], module.DESCRIPTION
                assert await counts(connection) == rows
                await run(connection, APP, await module.forwards())
                assert await everything(connection) == states[number + 1], module.DESCRIPTION
            await run(connection, APP, await module.forwards(), backwards=True)
        assert await everything(connection) == states[0]
        assert await applied(connection, APP) == set()
        assert await forwards(connection, APP, MODULES, silence) == list(MODULES)
        assert await everything(connection) == states[-1]


async def test_the_steps_of_a_migration_are_piccolos() -> None:
    steps = re.findall(r"self\.(_run_\w+)\(backwards", inspect.getsource(MigrationManager.run))
    assert re.findall(r"manager\.(_run_\w+)\(backwards", inspect.getsource(run)) == list(dict.fromkeys(steps))


async def test_a_history_that_the_application_moved_is_kept_there(
    empty: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Migration._meta, "schema", "kitrocket")
    assert await migrate(empty) == list(MODULES)
    assert await empty.fetchval("SELECT to_regclass('public.migration')") is None
    assert await empty.fetchval("SELECT count(*) FROM kitrocket.migration") == len(MODULES)
    assert await migrate(empty) == []
    await check(empty)


def module_that(work: Callable[[], Awaitable[None]], *, transaction: bool = True) -> ModuleType:
    async def forwards() -> MigrationManager:
        manager = MigrationManager(migration_id="9999", app_name=APP, wrap_in_transaction=transaction)
        manager.add_raw(work)
        return manager

    return SimpleNamespace(ID="9999", DESCRIPTION="a test's own", forwards=forwards)  # type: ignore[return-value]  # has what a module has


async def test_a_failing_migration_is_named_and_leaves_nothing(empty: Engine) -> None:
    await migrate(empty)

    async def fail() -> None:
        await ddl.execute("CREATE TABLE half (id text)")
        await ddl.execute("INSERT INTO users (id, email, name) VALUES ('u', NULL, 'secret name')")

    async with turn(empty, silence) as connection:
        with pytest.raises(MigrationError, match=r"9999 \(a test's own\) failed: null value in column") as caught:
            await forwards(connection, APP, {**MODULES, "9999": module_that(fail)}, silence)
    assert "secret name" not in str(caught.value)
    assert isinstance(caught.value.__cause__, asyncpg.NotNullViolationError)
    assert await empty.fetchval("SELECT to_regclass('half')") is None
    await check(empty)


async def test_duplicates_stop_the_migration_before_it_starts(empty: Engine) -> None:
    async with turn(empty, silence) as connection:
        first = dict(list(MODULES.items())[:3])
        await forwards(connection, APP, first, silence)
        await fill(connection)
        await connection.execute("INSERT INTO users (id, email, name) VALUES ('u2', 'ADA@example.com', 'Ada')")
        before = await everything(connection)
    with pytest.raises(SchemaMismatchError) as caught:
        await migrate(empty)
    assert caught.value.differences == (
        "users: one e-mail address in different letter case stands in several rows, ids 'u1', 'u2'",
    )
    assert "example.com" not in str(caught.value).lower()
    async with empty.direct() as connection:
        assert await everything(connection) == before
    assert await applied(empty, APP) == set(first)


async def test_a_duplicate_that_slips_in_during_the_build_leaves_no_index(empty: Engine) -> None:
    async with turn(empty, silence) as connection:
        await forwards(connection, APP, dict(list(MODULES.items())[:5]), silence)
        await fill(connection)
    errors: list[BaseException] = []

    async def migrating() -> None:
        try:
            await migrate(empty)
        except SchemaMismatchError as error:
            errors.append(error)

    async with anyio.create_task_group() as group, a_writer_in_the_middle(empty, "UPDATE users SET name = 'x'"):
        group.start_soon(migrating)
        await until(empty, WAITING)
        await empty.fetch("INSERT INTO users (id, email, name) VALUES ('u2', 'ada@EXAMPLE.com', 'Ada')")
    assert "ids 'u1', 'u2'" in str(errors[0])
    assert await empty.fetchval("SELECT to_regclass('users_lower_email_idx')") is None


async def test_an_index_left_by_a_killed_build_is_repaired(empty: Engine) -> None:
    async with turn(empty, silence) as connection:
        await forwards(connection, APP, dict(list(MODULES.items())[:3]), silence)
        await fill(connection)
    errors: list[BaseException] = []

    async def migrating() -> None:
        try:
            await migrate(empty)
        except MigrationError as error:
            errors.append(error)

    async with (
        anyio.create_task_group() as group,
        a_writer_in_the_middle(empty, "UPDATE sessions SET ip_address = 'x'"),
    ):
        group.start_soon(migrating)
        await until(empty, WAITING)
        await empty.fetch(f"SELECT pg_terminate_backend(pid) FROM ({BUILDER}) b")
        await until(empty, f"SELECT NOT EXISTS ({BUILDER})")
    assert "indexes of sessions" in str(errors[0])
    valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'sessions_expires_at_idx'::regclass"
    assert await empty.fetchval(valid) is False
    await migrate(empty)
    assert await empty.fetchval(valid) is True


async def test_a_build_that_stands_is_kept(empty: Engine) -> None:
    await migrate(empty)
    oid = "SELECT 'sessions_user_id_idx'::regclass::oid"
    before = await empty.fetchval(oid)
    async with turn(empty, silence) as connection:
        with ddl.lending(connection):
            await SESSIONS_USER_ID.build()
    assert await empty.fetchval(oid) == before


async def test_a_build_gives_up_on_an_endless_transaction_and_can_be_repeated(
    empty: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ddl, "BUILD_LOCK_TIMEOUT", "100ms")
    async with turn(empty, silence) as connection:
        await forwards(connection, APP, dict(list(MODULES.items())[:3]), silence)
        await fill(connection)
    async with a_writer_in_the_middle(empty, "UPDATE sessions SET ip_address = 'x'"):
        with pytest.raises(MigrationError, match="lock timeout"):
            await migrate(empty)
    monkeypatch.undo()
    await migrate(empty)
    async with empty.direct() as connection:
        assert [await index.is_valid(connection) for index in SEED_INDEXES] == [True] * len(SEED_INDEXES)


async def test_a_cancelled_build_ends_soon_and_can_be_repeated(empty: Engine) -> None:
    async with turn(empty, silence) as connection:
        await forwards(connection, APP, dict(list(MODULES.items())[:3]), silence)
        await fill(connection)
    async with a_writer_in_the_middle(empty, "UPDATE sessions SET ip_address = 'x'"):
        async with anyio.create_task_group() as group:
            group.start_soon(migrate, empty)
            await until(empty, WAITING)
            begun = anyio.current_time()
            group.cancel_scope.cancel()
        assert anyio.current_time() - begun < 5
    await migrate(empty)
    await check(empty)


async def test_a_build_makes_no_writer_wait(empty: Engine) -> None:
    async with turn(empty, silence) as connection:
        await forwards(connection, APP, dict(list(MODULES.items())[:3]), silence)
        await fill(connection)
    async with (
        anyio.create_task_group() as group,
        a_writer_in_the_middle(empty, "UPDATE sessions SET ip_address = 'x' WHERE id = 's1'"),
    ):
        group.start_soon(migrate, empty)
        await until(empty, WAITING)
        with anyio.fail_after(1):
            await empty.fetch(
                "INSERT INTO sessions (id, user_id, token, expires_at) VALUES ('s2', 'u1', 't', '2030-01-01')"
            )
    await check(empty)


async def test_a_lock_that_makes_writers_wait_is_given_up_within_a_second_and_tried_again(empty: Engine) -> None:
    async with empty.direct() as connection:
        await connection.execute(SEED_SQL)
        await fill(connection)
    async with (
        anyio.create_task_group() as group,
        a_writer_in_the_middle(empty, "UPDATE users SET name = 'x' WHERE id = 'u1'"),
    ):
        group.start_soon(adopt, empty)
        await until(empty, WAITING)
        begun = anyio.current_time()
        with anyio.fail_after(30):
            await empty.fetch("INSERT INTO users (id, email, name) VALUES ('u2', 'e', 'n')")
        assert anyio.current_time() - begun <= 1.3
    await check(empty)
