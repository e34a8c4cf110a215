"""Lists that are long enough for COPY, which writes all of them or nothing."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial

import anyio
import asyncpg
import pytest
from racing import together, until_someone_waits

from factories import make_usage, make_user
from kitrocket.clock import to_db
from kitrocket.engine import Engine
from kitrocket.errors import InvalidInputError, UsageConflictError, UserNotFoundError
from kitrocket.models import RecordedUsage
from kitrocket.testing import ManualClock
from kitrocket.usage import UsageService
from servers import Server

pytestmark = pytest.mark.asyncio(loop_scope="session")

COUNT = 600
KNOWN = 300


@pytest.fixture
def usage(engine: Engine, clock: ManualClock) -> UsageService:
    return UsageService(engine, clock=clock)


def entry(number: int, **values: object) -> dict[str, object]:
    return {"id": f"{number:05}", "user_id": "ada", "tokens": number, "model": f"m{number % 3}"} | values


def entries(numbers: Iterable[int] = range(COUNT)) -> list[dict[str, object]]:
    return [entry(number) for number in numbers]


async def recorded(engine: Engine) -> list[tuple[object, ...]]:
    return [tuple(row) for row in await engine.fetch("SELECT id, user_id, tokens_used, model FROM usage ORDER BY id")]


def as_recorded(some: Iterable[dict[str, object]]) -> list[tuple[object, ...]]:
    return [tuple(one.values()) for one in some]


async def is_exact(usage: UsageService) -> bool:
    return not (await usage.verify()).drift


@asynccontextmanager
async def known_in_an_open_transaction(engine: Engine) -> AsyncIterator[None]:
    """Let somebody else have recorded the call in the middle of the list, and commit it at the end."""
    open_, end = anyio.Event(), anyio.Event()

    async def other() -> None:
        async with engine.transaction():
            await make_usage(engine, "ada", id=f"{KNOWN:05}", tokens=KNOWN, model="m0")
            open_.set()
            await end.wait()

    async with anyio.create_task_group() as group:
        group.start_soon(other)
        await open_.wait()
        yield
        end.set()


@asynccontextmanager
async def waiting_for_the_known_call(usage: UsageService, engine: Engine) -> AsyncIterator[list[RecordedUsage]]:
    """Record the list until it waits for that call; what the list of answers gets then is said after the block."""
    answers: list[RecordedUsage] = []

    async def record() -> None:
        answers.append(await usage.record_many(entries()))

    async with anyio.create_task_group() as group, known_in_an_open_transaction(engine):
        group.start_soon(record)
        await until_someone_waits(engine)
        yield answers


async def test_a_long_list_is_recorded_and_summed(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    await make_user(engine, id="ada")
    some = entries()
    random.shuffle(some)
    assert await usage.record_many(some) == RecordedUsage(inserted=COUNT, duplicates=0)
    assert await recorded(engine) == as_recorded(entries())
    assert await engine.fetchval("SELECT array_agg(DISTINCT created_at) FROM usage") == [to_db(clock.now)]
    assert await usage.total("ada") == sum(range(COUNT))
    assert await is_exact(usage)


async def test_calls_of_several_times_keep_theirs(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    await make_user(engine, id="ada")
    times = [clock.now - timedelta(minutes=number % 7) for number in range(COUNT)]
    await usage.record_many([entry(number, at=at) for number, at in enumerate(times)])
    rows = await engine.fetch("SELECT created_at FROM usage ORDER BY id")
    assert [row["created_at"] for row in rows] == [to_db(at) for at in times]


async def test_known_calls_are_duplicates_and_the_others_new(usage: UsageService, engine: Engine) -> None:
    await make_user(engine, id="ada")
    await usage.record_many(entries([KNOWN]))
    assert await usage.record_many(entries()) == RecordedUsage(inserted=COUNT - 1, duplicates=1)
    assert await usage.record_many(entries()) == RecordedUsage(inserted=0, duplicates=COUNT)
    assert await recorded(engine) == as_recorded(entries())
    assert await is_exact(usage)


async def test_nothing_is_written_beside_another_call_with_one_of_the_ids(usage: UsageService, engine: Engine) -> None:
    await make_user(engine, id="ada")
    await usage.record_many([entry(KNOWN, tokens=1)])
    with pytest.raises(UsageConflictError) as caught:
        await usage.record_many(entries())
    assert caught.value.usage_id == f"{KNOWN:05}"
    assert await recorded(engine) == as_recorded([entry(KNOWN, tokens=1)])
    assert await is_exact(usage)


async def test_nothing_is_written_beside_a_call_of_an_unknown_user(usage: UsageService, engine: Engine) -> None:
    await make_user(engine, id="ada")
    with pytest.raises(UserNotFoundError) as caught:
        await usage.record_many([*entries(), entry(COUNT, user_id="nobody")])
    assert caught.value.user_id == "nobody"
    assert await recorded(engine) == []
    assert await is_exact(usage)


async def test_nothing_is_written_beside_a_bad_call(usage: UsageService, engine: Engine) -> None:
    await make_user(engine, id="ada")
    with pytest.raises(InvalidInputError) as caught:
        await usage.record_many([*entries(), entry(COUNT, tokens=-1)])
    assert caught.value.field == f"entries[{COUNT}].tokens"
    assert await recorded(engine) == []


async def test_nothing_is_written_beside_a_call_of_a_pruned_day(
    usage: UsageService, engine: Engine, clock: ManualClock
) -> None:
    await make_user(engine, id="ada")
    await usage.prune(clock.now - timedelta(days=40))
    with pytest.raises(InvalidInputError) as caught:
        await usage.record_many([*entries(), entry(COUNT, at=clock.now - timedelta(days=50))])
    assert caught.value.field == f"entries[{COUNT}].at"
    assert await recorded(engine) == []


@pytest.mark.direct
async def test_a_call_that_is_committed_meanwhile_is_seen(usage: UsageService, engine: Engine) -> None:
    await make_user(engine, id="ada")
    async with waiting_for_the_known_call(usage, engine) as answers:
        waiting = "SELECT query FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        assert str(await engine.fetchval(waiting)).startswith("COPY")
    assert answers == [RecordedUsage(inserted=COUNT - 1, duplicates=1)]
    assert await recorded(engine) == as_recorded(entries())
    assert await is_exact(usage)


async def test_cancelled_in_the_middle_it_leaves_nothing_and_its_connection_works(
    usage: UsageService, server: Server, database: str, engine: Engine, clock: ManualClock
) -> None:
    await make_user(engine, id="ada")
    async with server.engine(database, pool_size=1) as small:
        other = UsageService(small, clock=clock)
        async with known_in_an_open_transaction(engine):
            async with anyio.create_task_group() as group:
                group.start_soon(other.record_many, entries())
                await until_someone_waits(engine)
                group.cancel_scope.cancel()
            assert await small.fetchval("SELECT count(*) FROM usage") == 0
        assert await recorded(engine) == as_recorded(entries([KNOWN]))
        assert await other.record_many(entries()) == RecordedUsage(inserted=COUNT - 1, duplicates=1)
    assert await is_exact(usage)


@pytest.mark.direct
async def test_a_lost_connection_is_made_up_for(usage: UsageService, engine: Engine) -> None:
    await make_user(engine, id="ada")
    async with waiting_for_the_known_call(usage, engine) as answers:
        await engine.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
    assert answers == [RecordedUsage(inserted=COUNT - 1, duplicates=1)]
    assert await is_exact(usage)


async def test_overlapping_lists_of_eight_tasks_count_each_id_once(usage: UsageService, engine: Engine) -> None:
    await make_user(engine, id="ada")
    sent = [random.sample(range(2_000), COUNT) for _ in range(16)]
    answers = await together([partial(usage.record_many, entries(numbers)) for numbers in sent])
    assert all(isinstance(answer, RecordedUsage) for answer in answers), answers
    ids = set().union(*sent)
    assert sum(answer.inserted for answer in answers if isinstance(answer, RecordedUsage)) == len(ids)
    assert await recorded(engine) == as_recorded(entries(sorted(ids)))
    assert await is_exact(usage)


async def test_inside_a_transaction_the_callers_commit_counts(usage: UsageService, engine: Engine) -> None:
    await make_user(engine, id="ada")
    await usage.record_many(entries([KNOWN]))
    with pytest.raises(ZeroDivisionError):
        async with engine.transaction():
            assert await usage.record_many(entries()) == RecordedUsage(inserted=COUNT - 1, duplicates=1)
            raise ZeroDivisionError
    assert await recorded(engine) == as_recorded(entries([KNOWN]))
    assert await is_exact(usage)


@pytest.mark.direct
async def test_a_role_that_row_level_security_binds_can_record(
    server: Server, database: str, engine: Engine, usage: UsageService, clock: ManualClock
) -> None:
    await make_user(engine, id="ada")
    role = f"tenant_{random.randrange(10**9)}"
    async with server.engine(database, pool_size=1) as bound:
        await engine.fetch(f"CREATE ROLE {role}")
        try:
            await engine.fetch("ALTER TABLE usage ENABLE ROW LEVEL SECURITY")
            await engine.fetch(f"CREATE POLICY all_rows ON usage TO {role} USING (true) WITH CHECK (true)")
            await engine.fetch(f"GRANT SELECT, INSERT ON usage TO {role}")
            await bound.fetch(f"SET ROLE {role}")
            with pytest.raises(asyncpg.FeatureNotSupportedError):
                await bound.copy("usage", ["id"], [("a",)])
            service = UsageService(bound, clock=clock, rollup=False)
            assert await service.record_many(entries()) == RecordedUsage(inserted=COUNT, duplicates=0)
        finally:
            await bound.fetch("RESET ROLE")
            await engine.fetch("DROP POLICY IF EXISTS all_rows ON usage")
            await engine.fetch(f"DROP OWNED BY {role}")
            await engine.fetch(f"DROP ROLE {role}")
    assert await recorded(engine) == as_recorded(entries())
    assert await is_exact(usage)
