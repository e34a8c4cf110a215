"""The engine: cancellation, lost connections, nesting, two databases, zones, replicas."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta

import anyio
import anyio.to_thread
import asyncpg
import pytest
import pytest_asyncio
from piccolo.columns import Text
from piccolo.table import Table

from kitrocket.engine import Engine
from kitrocket.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    EmailTakenError,
    InvalidInputError,
    TransactionError,
    UserNotFoundError,
)
from kitrocket.tables import Users
from servers import Server

pytestmark = pytest.mark.asyncio(loop_scope="session")

INSERT = "INSERT INTO users (id, email, name) VALUES ($1, $1 || '@example.com', 'Ada')"


class Planets(Table, tablename="planets"):
    """An application's own table."""

    name = Text(primary_key=True, default=None)


@pytest_asyncio.fixture
async def tcp_server() -> AsyncIterator[str]:
    """The address of a server that refuses TLS, as PostgreSQL without it does, and hangs up on all else."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (await reader.readexactly(8))[4:] == bytes.fromhex("04d2162f"):
            writer.write(b"N")
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def ids(engine: Engine) -> list[str]:
    return [row["id"] for row in await engine.fetch("SELECT id FROM users ORDER BY id")]


async def serves(engine: Engine, count: int) -> None:
    """Fail unless ``count`` connections of the pool work at the same time."""
    together = anyio.Event()
    arrived = 0

    async def hold() -> None:
        nonlocal arrived
        async with engine.transaction():
            assert await engine.fetchval("SELECT 1") == 1
            arrived += 1
            if arrived == count:
                together.set()
            await together.wait()

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            for _ in range(count):
                group.start_soon(hold)


async def cut_by_move_on_after(work: Callable[[], Awaitable[None]], after: float) -> None:
    with anyio.move_on_after(after):
        await work()


async def cut_by_fail_after(work: Callable[[], Awaitable[None]], after: float) -> None:
    with pytest.raises(TimeoutError):
        with anyio.fail_after(after):
            await work()


async def cut_by_task_group(work: Callable[[], Awaitable[None]], after: float) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(work)
        await anyio.sleep(after)
        group.cancel_scope.cancel()


async def cut_by_task(work: Callable[[], Awaitable[None]], after: float) -> None:
    task = asyncio.ensure_future(work())
    await asyncio.sleep(after)
    task.cancel()
    await asyncio.wait([task])


CUTS = [cut_by_move_on_after, cut_by_fail_after, cut_by_task_group, cut_by_task]


@pytest.mark.parametrize("cut", CUTS)
async def test_no_cancellation_costs_a_connection_or_keeps_a_row(
    server: Server, database: str, cut: Callable[[Callable[[], Awaitable[None]], float], Awaitable[None]]
) -> None:
    async with server.engine(database, pool_size=3) as engine:

        async def work() -> None:
            async with engine.transaction():
                await engine.fetch(INSERT, f"u{random.getrandbits(64)}")
                async with engine.transaction():
                    await engine.fetch(INSERT, f"u{random.getrandbits(64)}")
                    await engine.fetch("SELECT pg_sleep(5)")

        for _ in range(200):
            await cut(work, random.uniform(0.0, 0.01))
        await serves(engine, 3)
        assert await ids(engine) == []
        assert not engine.in_transaction()


async def test_a_cancelled_inner_block_leaves_the_outer_usable(engine: Engine) -> None:
    async with engine.transaction():
        await engine.fetch(INSERT, "outer")
        with anyio.move_on_after(0.02):
            async with engine.transaction():
                await engine.fetch(INSERT, "inner")
                await engine.fetch("SELECT pg_sleep(5)")
        await engine.fetch(INSERT, "after")
    assert await ids(engine) == ["after", "outer"]


async def test_terminated_backends_cost_no_connection(server: Server, database: str) -> None:
    async with (
        server.engine(database, pool_size=3) as engine,
        Engine(server.url(database, direct=True), pool_size=1) as killer,
    ):

        async def work() -> None:
            async with engine.transaction():
                await engine.fetch(INSERT, f"u{random.getrandbits(64)}")
                pid = await engine.fetchval("SELECT pg_backend_pid()")
                async with anyio.create_task_group() as group:
                    group.start_soon(killer.fetch, "SELECT pg_terminate_backend($1)", pid)
                await engine.fetch("SELECT pg_sleep(5)")

        for _ in range(200):
            with pytest.raises(DatabaseUnavailableError):
                await engine.retry(work)
        await serves(engine, 3)
        assert await ids(engine) == []


async def test_an_error_rolls_back_and_comes_through(engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError):
        async with engine.transaction():
            await engine.fetch(INSERT, "gone")
            raise ZeroDivisionError
    assert await ids(engine) == []


async def test_an_inner_error_caught_outside_rolls_back_the_inner_only(engine: Engine) -> None:
    async with engine.transaction():
        await engine.fetch(INSERT, "outer")
        with pytest.raises(ZeroDivisionError):
            async with engine.transaction():
                await engine.fetch(INSERT, "inner")
                raise ZeroDivisionError
        with pytest.raises(EmailTakenError):
            async with engine.transaction():
                await engine.fetch("INSERT INTO users (id, email, name) VALUES ('x', 'outer@example.com', 'Eve')")
    assert await ids(engine) == ["outer"]


async def test_swallowing_a_failed_statement_does_not_pass_for_a_commit(engine: Engine) -> None:
    with pytest.raises(TransactionError, match="nothing was committed"):
        async with engine.transaction():
            await engine.fetch(INSERT, "lost")
            with pytest.raises(asyncpg.UndefinedTableError):
                await engine.fetch("SELECT * FROM no_such_table")
    assert await ids(engine) == []
    await serves(engine, 3)


async def test_a_failing_inner_commit_leaves_the_outer_usable(engine: Engine) -> None:
    async with engine.transaction():
        await engine.fetch(INSERT, "outer")
        with pytest.raises(asyncpg.PostgresError):
            async with engine.transaction():
                with pytest.raises(asyncpg.UndefinedTableError):
                    await engine.fetch("SELECT * FROM no_such_table")
        await engine.fetch(INSERT, "after")
    assert await ids(engine) == ["after", "outer"]


async def test_a_child_task_may_not_use_the_transaction_of_its_parent(engine: Engine) -> None:
    async with engine.transaction():

        async def child() -> None:
            with pytest.raises(TransactionError, match="child tasks"):
                await engine.fetch("SELECT 1")

        async with anyio.create_task_group() as group:
            group.start_soon(child)
        assert await engine.fetchval("SELECT 1") == 1


async def test_a_task_that_outlives_the_transaction_uses_the_pool(engine: Engine) -> None:
    go = anyio.Event()
    seen: list[int] = []

    async def child() -> None:
        await go.wait()
        seen.append(await engine.fetchval("SELECT count(*)::int FROM users"))

    async with anyio.create_task_group() as group:
        async with engine.transaction():
            await engine.fetch(INSERT, "one")
            group.start_soon(child)
        go.set()
    assert seen == [1]


async def test_manual_commit_and_rollback_are_obeyed(engine: Engine) -> None:
    async with engine.transaction() as transaction:
        await engine.fetch(INSERT, "kept")
        await transaction.commit()
    async with engine.transaction() as transaction:
        await engine.fetch(INSERT, "dropped")
        await transaction.rollback()
    assert await ids(engine) == ["kept"]


async def test_piccolo_queries_and_statements_share_the_transaction(engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError):
        async with engine.transaction():
            await engine.run(
                Users.insert(Users(id="p", email="p@example.com", name="P", email_verified=None, avatar=None))
            )
            assert await ids(engine) == ["p"]
            raise ZeroDivisionError
    assert await ids(engine) == []


async def test_the_applications_own_piccolo_queries_join_when_the_engine_is_theirs(engine: Engine) -> None:
    Planets._meta.db = engine
    await Planets.create_table().run()
    with pytest.raises(ZeroDivisionError):
        async with engine.transaction():
            await Planets.insert(Planets(name="Mars")).run()
            assert await Planets.count().run() == 1
            raise ZeroDivisionError
    assert await Planets.count().run() == 0


async def test_two_engines_on_two_databases_serve_one_table(
    engine: Engine, server: Server, second_database: str
) -> None:
    async with server.engine(second_database) as other:
        await engine.fetch(INSERT, "here")
        assert await engine.run(Users.count()) == 1
        assert await other.run(Users.count()) == 0
        async with engine.transaction(), other.transaction():
            assert await engine.run(Users.count()) == 1
            assert await other.run(Users.count()) == 0


async def test_sessions_run_in_utc_whatever_the_database_says(server: Server, database: str) -> None:
    async with server.engine(database) as engine:
        await engine.fetch(f"ALTER DATABASE {database} SET timezone = 'America/New_York'")
    async with server.engine(database) as engine:
        assert await engine.fetchval("SHOW timezone") == "UTC"
        now = await engine.fetchval("SELECT localtimestamp")
        assert abs(now.replace(tzinfo=UTC) - datetime.now(UTC)) < timedelta(seconds=5)  # noqa: TID251 - the real clock is the point


@pytest.mark.direct
async def test_a_replica_is_asked_by_name_and_closed_with_the_main_engine(server: Server, database: str) -> None:
    async with Engine(server.url(database), replicas={"r": server.url(database)}) as engine:
        async with engine.transaction():
            await engine.fetch(INSERT, "uncommitted")
            assert await engine.run(Users.count()) == 1
            assert await engine.run(Users.count(), node="r") == 0
        with pytest.raises(ConfigurationError, match="no replica named 'x'"):
            await engine.fetch("SELECT 1", node="x")
        replica = engine.extra_nodes["r"]
        assert replica.pool is not None
    assert replica.pool is None
    assert engine.pool is None


async def test_constructing_an_engine_connects_to_nothing() -> None:
    engine = Engine("postgres://nobody@127.0.0.1:1/nowhere")
    with pytest.raises(DatabaseUnavailableError):
        await engine.open()
    assert engine.pool is None
    with pytest.raises(DatabaseUnavailableError):
        await engine.fetch("SELECT 1")


async def test_a_server_without_tls_is_refused_unless_the_url_allows_it(tcp_server: str) -> None:
    with pytest.raises(DatabaseUnavailableError, match="sslmode=disable"):
        await Engine(f"postgres://u@{tcp_server}/app?sslmode=verify-full").open()
    with pytest.raises(DatabaseUnavailableError, match=r"lost the connection|went away"):
        await Engine(f"postgres://u@{tcp_server}/app?sslmode=disable").open()


async def test_a_url_that_cannot_be_used_says_so() -> None:
    with pytest.raises(ConfigurationError, match="URL cannot be used"):
        await Engine("mysql://u@localhost/app").open()


async def test_an_engine_that_is_not_open_answers_too(server: Server, database: str) -> None:
    engine = server.engine(database)
    assert await engine.fetchval("SELECT 1") == 1
    async with engine.transaction():
        await engine.fetch(INSERT, "one")
    assert await ids(engine) == ["one"]


async def test_opening_twice_needs_closing_twice(server: Server, database: str) -> None:
    engine = server.engine(database)
    await engine.open()
    await engine.open()
    await engine.close()
    assert engine.pool is not None
    await engine.close()
    assert engine.pool is None
    await engine.close()


async def test_an_exhausted_pool_says_so(server: Server, database: str) -> None:
    async with (
        Engine(
            server.url(database),
            pool_size=1,
            pooler=server.pooler is not None,
        ) as engine,
        engine.transaction(),
        anyio.create_task_group() as group,
    ):
        engine._acquire_timeout = 0.05  # connecting had all its time

        async def other() -> None:
            engine.current_transaction.set(None)
            with pytest.raises(DatabaseUnavailableError, match="no connection came free") as exhausted:
                await engine.fetch("SELECT 1")
            assert isinstance(exhausted.value.__cause__, TimeoutError)

        group.start_soon(other)


async def test_a_statement_that_takes_too_long_is_cut(server: Server, database: str) -> None:
    async with Engine(
        server.url(database), command_timeout=timedelta(milliseconds=500), pooler=server.pooler is not None
    ) as engine:
        with pytest.raises(DatabaseUnavailableError):
            await engine.fetch("SELECT pg_sleep(5)")
        assert await engine.fetchval("SELECT 1") == 1


async def test_errors_are_ours_and_tell_no_secret(engine: Engine) -> None:
    await engine.fetch(INSERT, "ada")
    with pytest.raises(EmailTakenError) as taken:
        await engine.fetch("INSERT INTO users (id, email, name) VALUES ('b', 'ada@example.com', 'Eve')")
    assert isinstance(taken.value.__cause__, asyncpg.UniqueViolationError)
    assert "ada@example.com" not in f"{taken.value} {taken.value!r} {taken.value.__cause__} {taken.value.__cause__!r}"
    with pytest.raises(UserNotFoundError) as missing:
        await engine.fetch(
            "INSERT INTO sessions (id, user_id, token, expires_at) VALUES ('s', 'nobody', 'SECRET', '2030-01-01')"
        )
    assert missing.value.user_id == "nobody"
    with pytest.raises(InvalidInputError) as unstorable:
        await engine.fetch(INSERT, "SECRET\x00")
    assert "SECRET" not in f"{unstorable.value} {unstorable.value.__cause__!r}"
    with pytest.raises(InvalidInputError) as unstorable:
        await engine.fetch("SELECT $1::int", "SECRET")
    assert "SECRET" not in f"{unstorable.value} {unstorable.value.__cause__!r}"


async def test_retry_repeats_what_was_rolled_back_for_certain(engine: Engine) -> None:
    await engine.fetch(INSERT, "a")
    await engine.fetch(INSERT, "b")
    both_hold_one = anyio.Event()
    first: set[str] = set()

    async def rename(one: str, other: str) -> None:
        async def unit() -> None:
            async with engine.transaction():
                await engine.fetch("UPDATE users SET name = name || '+' WHERE id = $1", one)
                first.add(one)
                if len(first) == 2:
                    both_hold_one.set()
                await both_hold_one.wait()
                await engine.fetch("UPDATE users SET name = name || '+' WHERE id = $1", other)

        await engine.retry(unit)

    async with anyio.create_task_group() as group:
        group.start_soon(rename, "a", "b")
        group.start_soon(rename, "b", "a")
    assert [row["name"] for row in await engine.fetch("SELECT name FROM users")] == ["Ada++", "Ada++"]


async def test_retry_repeats_an_unknown_outcome_only_when_idempotent(server: Server, database: str) -> None:
    async with server.engine(database) as engine, Engine(server.url(database, direct=True), pool_size=1) as killer:
        calls = 0

        async def unit() -> str:
            nonlocal calls
            calls += 1
            async with engine.transaction():
                if calls == 1:
                    await killer.fetch(
                        "SELECT pg_terminate_backend($1)", await engine.fetchval("SELECT pg_backend_pid()")
                    )
                await engine.fetch("SELECT pg_sleep(0.01)")
            return "done"

        with pytest.raises(DatabaseUnavailableError):
            await engine.retry(unit)
        assert calls == 1
        calls = 0
        assert await engine.retry(unit, idempotent=True) == "done"
        assert calls == 2


@pytest.mark.direct
async def test_a_pool_of_dead_connections_is_survived(server: Server, database: str) -> None:
    async with (
        server.engine(database, pool_size=5) as engine,
        Engine(server.url(database, direct=True), pool_size=1) as killer,
    ):
        await serves(engine, 5)
        await killer.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid()"
        )

        async def unit() -> int:
            return int(await engine.fetchval("SELECT 1"))

        for _ in range(5):
            assert await engine.retry(unit, idempotent=True) == 1
        await serves(engine, 5)


async def test_behind_a_pooler_a_direct_connection_needs_its_own_url(server: Server, database: str) -> None:
    engine = Engine(server.url(database), pooler=True)
    with pytest.raises(ConfigurationError, match="DATABASE_DIRECT_URL"):
        async with engine.direct():
            pass
    async with Engine(
        server.url(database), direct_url=server.url(database, direct=True), pooler=True
    ).direct() as direct:
        assert await direct.fetchval("SELECT 1") == 1


async def test_a_held_connection_comes_back_after_it_was_lost(server: Server, database: str) -> None:
    async with server.engine(database) as engine, Engine(server.url(database, direct=True), pool_size=1) as killer:
        held = engine.hold()
        pid = (await held.fetch("SELECT pg_backend_pid()"))[0][0]
        await killer.fetch("SELECT pg_terminate_backend($1)", pid)

        async def unit() -> list[asyncpg.Record]:
            return await held.fetch("SELECT 1")

        assert (await engine.retry(unit, idempotent=True))[0][0] == 1
        await held.aclose()


async def test_each_event_loop_needs_an_engine_of_its_own(server: Server, database: str) -> None:
    engine = server.engine(database)

    async def in_a_first_loop() -> None:
        await engine.open()

    async def in_a_second_loop() -> None:
        with pytest.raises(ConfigurationError, match="another event loop"):
            await engine.open()
        with pytest.raises(ConfigurationError, match="another event loop"):
            await engine.fetch("SELECT 1")

    def two_loops() -> None:
        with asyncio.Runner() as first:
            first.run(in_a_first_loop())
            with asyncio.Runner() as second:
                second.run(in_a_second_loop())
            first.run(engine.close())

    await anyio.to_thread.run_sync(two_loops)
