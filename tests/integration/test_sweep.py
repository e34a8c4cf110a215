"""The sweep of sessions that are over, alone and beside others."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from datetime import timedelta

import anyio
import asyncpg
import pytest
import pytest_asyncio
from racing import until_someone_waits, warm_up

from factories import make_session, make_user
from kitrocket.clock import to_db
from kitrocket.engine import Engine
from kitrocket.errors import InvalidInputError
from kitrocket.maintenance import run_every
from kitrocket.models import SweepResult
from kitrocket.sessions import SessionService
from kitrocket.testing import ManualClock
from kitrocket.tokens import digest, new_token
from servers import Server

pytestmark = pytest.mark.asyncio

MILLISECOND = timedelta(milliseconds=1)
SECOND = timedelta(seconds=1)
DAY = timedelta(days=1)


@pytest.fixture
def sessions(engine: Engine, clock: ManualClock) -> SessionService:
    return SessionService(engine, clock=clock)


async def fill(engine: Engine, clock: ManualClock, *, expired: int, live: int, apart: timedelta = MILLISECOND) -> None:
    user_id = await make_user(engine)
    for prefix, count, expires_at in (("expired", expired, clock.now - DAY), ("live", live, clock.now + DAY)):
        await engine.fetch(
            "INSERT INTO sessions (id, user_id, token, expires_at, created_at)"
            " SELECT $2 || i, $1, $2 || i, $4::timestamp + i * $5::interval, $4::timestamp - interval '7 d'"
            " FROM generate_series(1, $3::integer) i",
            user_id,
            prefix,
            count,
            to_db(expires_at),
            apart,
        )


async def left(engine: Engine) -> dict[str, int]:
    rows = await engine.fetch("SELECT rtrim(id, '0123456789') AS kind, count(*) FROM sessions GROUP BY 1")
    return {row["kind"]: row["count"] for row in rows}


@pytest_asyncio.fixture
async def other(server: Server, database: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection of somebody else."""
    connection = await asyncpg.connect(server.url(database, direct=True))
    yield connection
    await connection.close()


async def test_what_has_expired_goes_and_what_lives_stays(
    engine: Engine, sessions: SessionService, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    await fill(engine, clock, expired=10_000, live=1_000)
    # What each statement deleted, counted by the database.
    await engine.fetch("CREATE TABLE swept (number integer)")
    await engine.fetch(
        "CREATE FUNCTION count_swept() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN INSERT INTO swept SELECT count(*) FROM gone; RETURN NULL; END'"
    )
    await engine.fetch(
        "CREATE TRIGGER swept AFTER DELETE ON sessions REFERENCING OLD TABLE AS gone"
        " FOR EACH STATEMENT EXECUTE FUNCTION count_swept()"
    )
    with caplog.at_level(logging.INFO, logger="kitrocket.sessions"):
        assert await sessions.delete_expired() == SweepResult(deleted=10_000, batches=10, more=False)
        assert await sessions.delete_expired() == SweepResult(deleted=0, batches=0, more=False)
    assert await left(engine) == {"live": 1_000}
    assert await engine.fetchval("SELECT max(number) FROM swept") == 1_000
    assert [record.message for record in caplog.records] == ["swept 10000 expired sessions in 10 batches"]


@pytest.mark.parametrize("apart", [MILLISECOND, DAY / 10_000, 0 * SECOND], ids=["close", "spread", "at one instant"])
async def test_four_sweepers_delete_each_row_once(
    server: Server, database: str, clock: ManualClock, apart: timedelta
) -> None:
    results: list[SweepResult] = []

    async def sweep(service: SessionService) -> None:
        results.append(await service.delete_expired(batch_size=100))

    async with server.engine(database) as engine:
        await fill(engine, clock, expired=10_000, live=1_000, apart=apart)
        await warm_up(engine)
        service = SessionService(engine, clock=clock)
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(sweep, service)
        assert sum(result.deleted for result in results) == 10_000
        assert min(result.deleted for result in results) > 0
        assert await left(engine) == {"live": 1_000}


async def test_what_validate_refuses_by_time_goes(engine: Engine, sessions: SessionService, clock: ManualClock) -> None:
    user_id = await make_user(engine)
    for number, offset in enumerate((-SECOND, 0 * SECOND, MILLISECOND, SECOND)):
        await make_session(engine, user_id, id=f"s{number}", expires_at=clock.now + offset)
    assert (await sessions.delete_expired()).deleted == 2
    rows = await engine.fetch("SELECT id FROM sessions ORDER BY id")
    assert [row["id"] for row in rows] == ["s2", "s3"]


@pytest.mark.parametrize("tokens", ["plain", "digest+plain"])
async def test_what_another_writer_kept_beyond_the_cap_goes_too(
    engine: Engine, clock: ManualClock, tokens: str
) -> None:
    sessions = SessionService(engine, clock=clock, tokens=tokens)  # type: ignore[arg-type]
    user_id = await make_user(engine)
    dead, live = new_token(), new_token()
    await make_session(engine, user_id, token=dead, at=clock.now - 30 * DAY, expires_at=clock.now + DAY)
    await make_session(engine, user_id, token=live, at=clock.now - 30 * DAY + MILLISECOND, expires_at=clock.now + DAY)
    await make_session(engine, user_id, at=clock.now - 40 * DAY, expires_at=clock.now - DAY)
    assert await sessions.validate(dead) is None
    assert await sessions.delete_expired(limit=1) == SweepResult(deleted=1, batches=1, more=True)
    assert await sessions.delete_expired() == SweepResult(deleted=1, batches=1, more=False)
    assert await sessions.validate(live) is not None


async def test_a_limit_is_kept_and_says_whether_more_is_left(
    engine: Engine, sessions: SessionService, clock: ManualClock
) -> None:
    await fill(engine, clock, expired=250, live=10)
    assert await sessions.delete_expired(limit=120, batch_size=50) == SweepResult(deleted=120, batches=3, more=True)
    # The oldest go first.
    assert await engine.fetchval("SELECT count(*) FROM sessions WHERE id IN ('expired120', 'expired121')") == 1
    assert await sessions.delete_expired(limit=130, batch_size=50) == SweepResult(deleted=130, batches=3, more=False)
    assert await left(engine) == {"live": 10}


async def test_a_budget_is_kept_to_one_batch(engine: Engine, sessions: SessionService, clock: ManualClock) -> None:
    await fill(engine, clock, expired=250, live=10)
    spent = timedelta(0)
    assert await sessions.delete_expired(batch_size=100, budget=spent) == SweepResult(deleted=100, batches=1, more=True)
    assert await sessions.delete_expired(batch_size=150, budget=spent) == SweepResult(
        deleted=150, batches=1, more=False
    )
    assert (await sessions.delete_expired(budget=10 * SECOND)).deleted == 0


async def test_in_a_transaction_it_is_undone_with_it_and_leaves_its_settings_alone(
    engine: Engine, sessions: SessionService, clock: ManualClock
) -> None:
    await fill(engine, clock, expired=20, live=3)
    with pytest.raises(RuntimeError):
        async with engine.transaction():
            assert (await sessions.delete_expired(batch_size=5)).deleted == 20
            assert await engine.fetchval("SHOW synchronous_commit") == "on"
            raise RuntimeError
    assert await left(engine) == {"expired": 20, "live": 3}
    assert (await sessions.delete_expired(batch_size=5)).deleted == 20
    assert await engine.fetchval("SHOW synchronous_commit") == "on"


async def test_a_row_that_another_holds_is_left_for_later(
    engine: Engine,
    sessions: SessionService,
    clock: ManualClock,
    other: asyncpg.Connection[asyncpg.Record],
) -> None:
    await fill(engine, clock, expired=20, live=0)
    async with other.transaction():
        await other.execute("SELECT FROM sessions WHERE id = 'expired7' FOR UPDATE")
        with anyio.fail_after(30):
            assert (await sessions.delete_expired(batch_size=5)).deleted == 19
    assert (await sessions.delete_expired()).deleted == 1


async def test_a_sweeper_that_meets_another_goes_on_elsewhere_and_comes_back(
    engine: Engine,
    sessions: SessionService,
    clock: ManualClock,
    other: asyncpg.Connection[asyncpg.Record],
) -> None:
    await fill(engine, clock, expired=200, live=0, apart=DAY / 200)
    numbers = "SELECT substr(id, 8)::integer AS number FROM sessions ORDER BY 1"
    async with other.transaction():
        # The batch of another sweeper, which it has not committed.
        await other.execute("SELECT FROM sessions ORDER BY expires_at LIMIT 5 FOR UPDATE")
        assert await sessions.delete_expired(limit=10, batch_size=5) == SweepResult(deleted=10, batches=2, more=True)
        gone = sorted(set(range(1, 201)) - {row["number"] for row in await engine.fetch(numbers)})
        assert gone[:5] == [6, 7, 8, 9, 10]
        assert gone[5:] == list(range(gone[5], gone[5] + 5))
        assert 50 < gone[5] < 160  # one in the other's way would take 11
        assert (await sessions.delete_expired(batch_size=5)).deleted == 185
        assert [row["number"] for row in await engine.fetch(numbers)] == [1, 2, 3, 4, 5]


async def test_parts_in_which_others_hold_every_row_do_not_end_a_sweep(
    engine: Engine,
    sessions: SessionService,
    clock: ManualClock,
    other: asyncpg.Connection[asyncpg.Record],
) -> None:
    await fill(engine, clock, expired=200, live=2, apart=DAY / 200)
    free = ["expired2", "expired190", "expired198", "expired4"]  # three parts without one before it comes back to 4
    async with other.transaction():
        await other.execute("SELECT FROM sessions WHERE id <> ALL ($1) FOR UPDATE", free)
        with anyio.fail_after(30):
            assert (await sessions.delete_expired(batch_size=1)).deleted == 4
    assert (await sessions.delete_expired()).deleted == 196
    assert await left(engine) == {"live": 2}


async def test_a_row_that_is_extended_meanwhile_stays(
    engine: Engine, clock: ManualClock, other: asyncpg.Connection[asyncpg.Record]
) -> None:
    """Sweeps run while another writer extends every session: no extended one may be lost."""
    await fill(engine, clock, expired=2_000, live=0)
    sessions = SessionService(engine, clock=clock)
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(lambda: sessions.delete_expired(batch_size=20))
        rows = await other.fetch("SELECT id FROM sessions ORDER BY id DESC")
        extended: list[str] = []
        for row in rows:
            extended += [
                found["id"]
                for found in await other.fetch(
                    "UPDATE sessions SET expires_at = $2 WHERE id = $1 RETURNING id", row["id"], to_db(clock.now + DAY)
                )
            ]
    assert await engine.fetchval("SELECT count(*) FROM sessions") == len(extended)


async def hold_up(engine: Engine, condition: str) -> None:
    """Let a DELETE that begins while ``condition`` is true wait for the advisory lock 7, its snapshot taken."""
    await engine.fetch(
        "CREATE FUNCTION hold_up() RETURNS trigger LANGUAGE plpgsql AS"
        f" 'BEGIN IF {condition} THEN PERFORM pg_advisory_xact_lock(7); END IF; RETURN NULL; END'"
    )
    await engine.fetch("CREATE TRIGGER hold_up BEFORE DELETE ON sessions FOR EACH STATEMENT EXECUTE FUNCTION hold_up()")


@pytest.mark.direct
@pytest.mark.parametrize("batch_size", [1, 1000])
async def test_a_row_that_changes_after_the_statement_began_is_judged_by_what_it_is_now(
    engine: Engine,
    sessions: SessionService,
    clock: ManualClock,
    other: asyncpg.Connection[asyncpg.Record],
    batch_size: int,
) -> None:
    """The statement has its snapshot, in which the row has expired, and is held up before it looks for rows."""
    await fill(engine, clock, expired=20, live=0)
    await hold_up(engine, "true")
    await other.execute("SELECT pg_advisory_lock(7)")
    results: list[SweepResult] = []

    async def sweep() -> None:
        results.append(await sessions.delete_expired(batch_size=batch_size))

    async with anyio.create_task_group() as group:
        group.start_soon(sweep)
        await until_someone_waits(engine)
        await other.execute("UPDATE sessions SET expires_at = $1 WHERE id = 'expired7'", to_db(clock.now + DAY))
        await other.execute("UPDATE sessions SET user_agent = 'another' WHERE id IN ('expired1', 'expired9')")
        await other.execute("SELECT pg_advisory_unlock(7)")
    rows = await engine.fetch("SELECT id FROM sessions")
    assert [row["id"] for row in rows] == ["expired7"]
    assert [result.deleted for result in results] == [19]


@pytest.mark.direct
async def test_a_row_that_comes_up_behind_the_batches_goes_too(
    engine: Engine, sessions: SessionService, clock: ManualClock, other: asyncpg.Connection[asyncpg.Record]
) -> None:
    """A batch begins where the one before left off, so what is older is only found from the start again."""
    await fill(engine, clock, expired=20, live=3)
    await hold_up(engine, "(SELECT count(*) FROM sessions) = 13")
    await other.execute("SELECT pg_advisory_lock(7)")
    results: list[SweepResult] = []

    async def sweep() -> None:
        results.append(await sessions.delete_expired(batch_size=5))

    async with anyio.create_task_group() as group:
        group.start_soon(sweep)
        await until_someone_waits(engine)
        await other.execute("UPDATE sessions SET expires_at = $1 WHERE id = 'live1'", to_db(clock.now - 2 * DAY))
        await other.execute("SELECT pg_advisory_unlock(7)")
    assert await left(engine) == {"live": 2}
    assert [result.deleted for result in results] == [21]


async def test_rows_that_share_an_instant_all_go(engine: Engine, sessions: SessionService, clock: ManualClock) -> None:
    await fill(engine, clock, expired=23, live=2)
    await engine.fetch("UPDATE sessions SET expires_at = $1 WHERE id LIKE 'expired%'", to_db(clock.now))
    assert await sessions.delete_expired(batch_size=5) == SweepResult(deleted=23, batches=5, more=False)
    assert await left(engine) == {"live": 2}


async def test_it_ends_though_somebodys_trigger_keeps_rows(
    engine: Engine, sessions: SessionService, clock: ManualClock
) -> None:
    await fill(engine, clock, expired=20, live=3)
    await engine.fetch(
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN IF OLD.id IN (''expired3'', ''expired4'') THEN RETURN NULL; END IF; RETURN OLD; END'"
    )
    await engine.fetch("CREATE TRIGGER keep BEFORE DELETE ON sessions FOR EACH ROW EXECUTE FUNCTION keep()")
    with anyio.fail_after(30):
        assert (await sessions.delete_expired(batch_size=5)).deleted == 18
    assert await left(engine) == {"expired": 2, "live": 3}


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("limit", {"limit": 0}),
        ("limit", {"limit": -1}),
        ("limit", {"limit": 1.5}),
        ("batch_size", {"batch_size": 0}),
        ("batch_size", {"batch_size": True}),
        ("budget", {"budget": 10}),
        ("budget", {"budget": -SECOND}),
    ],
)
async def test_sweep_with_bad_input(
    engine: Engine, sessions: SessionService, clock: ManualClock, field: str, arguments: dict[str, object]
) -> None:
    await fill(engine, clock, expired=1, live=0)
    with pytest.raises(InvalidInputError) as raised:
        await sessions.delete_expired(**arguments)  # type: ignore[arg-type]
    assert raised.value.field == field
    assert await left(engine) == {"expired": 1}


async def test_sweeping_leaves_users_who_validate_alone(engine: Engine, clock: ManualClock) -> None:
    await fill(engine, clock, expired=3_000, live=0)
    service = SessionService(engine, clock=clock)
    token = new_token()
    await make_session(engine, await make_user(engine), id="live", token=digest(token))
    swept = anyio.Event()
    checks = 0
    async with service.coalescing(), anyio.create_task_group() as group:

        async def sweep() -> None:
            await service.delete_expired(batch_size=100)
            swept.set()

        group.start_soon(sweep)
        while not swept.is_set():
            assert await service.validate(token) is not None
            checks += 1
    assert checks > 10


async def test_in_the_background_it_sweeps_at_once_and_ends_when_cancelled(
    engine: Engine, sessions: SessionService, clock: ManualClock
) -> None:
    await fill(engine, clock, expired=1_500, live=5)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(run_every, "sweep sessions", sessions.delete_expired, timedelta(seconds=300))
            while await left(engine) != {"live": 5}:
                await anyio.lowlevel.checkpoint()
            cancelled_at = anyio.current_time()
            group.cancel_scope.cancel()
    assert anyio.current_time() - cancelled_at < 1
