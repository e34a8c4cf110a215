"""Group commit in a running kit: who shares a commit, who gets which error, and what leaving and cancelling leave."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import asyncpg
import pytest
from racing import together

from factories import make_user
from kitrocket import KitRocket, Settings
from kitrocket.clock import utc_now
from kitrocket.engine import Engine
from kitrocket.errors import (
    DatabaseUnavailableError,
    InvalidInputError,
    RecorderClosedError,
    UsageConflictError,
    UserNotFoundError,
)
from kitrocket.models import UsageRecord
from kitrocket.usage import UsageService, recorder
from kitrocket.usage.calls import Call
from servers import Server

pytestmark = pytest.mark.asyncio(loop_scope="session")


def running(engine: Engine, **settings: Any) -> KitRocket:
    return KitRocket(Settings(**settings), engine=engine, background=False)


@asynccontextmanager
async def stalled(
    engine: Engine, server: Server, kit: KitRocket, user_id: str, group: anyio.abc.TaskGroup
) -> AsyncIterator[None]:
    """A block in which no row can be written, and in which both flushers already wait with a row each."""
    database = await engine.fetchval("SELECT current_database()")
    blocker = await asyncpg.connect(server.url(database, direct=True))
    try:
        await blocker.execute("BEGIN")
        await blocker.execute("LOCK TABLE usage IN SHARE MODE")
        for name in ("stalled-1", "stalled-2"):
            group.start_soon(call(kit, user_id, name))
            await until_waiting(engine, int(name[-1]))
        yield
    finally:
        await blocker.close()


async def until_waiting(engine: Engine, count: int) -> None:
    """Return once so many statements on this database wait for a lock."""
    while count > await engine.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    ):
        await anyio.lowlevel.checkpoint()


def counting(kit: KitRocket, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The list to which each batch of the kit's writer adds how many rows it had."""
    sizes: list[int] = []
    flush = kit.usage._writer.flush

    async def counted(lane: Any, calls: Sequence[Call]) -> dict[str, asyncpg.Record]:
        sizes.append(len(calls))
        return await flush(lane, calls)

    monkeypatch.setattr(kit.usage._writer, "flush", counted)
    return sizes


async def ids(engine: Engine) -> list[str]:
    return [row["id"] for row in await engine.fetch("SELECT id FROM usage ORDER BY id")]


def call(kit: KitRocket, user_id: str, id: str | None = None, tokens: int = 1) -> Callable[[], Any]:
    return lambda: kit.usage.record(user_id, tokens=tokens, model="m", id=id)


async def queued(kit: KitRocket, count: int) -> None:
    """Return once so many calls are in the queue."""
    while len(kit.usage._recorder._queue) < count:
        await anyio.lowlevel.checkpoint()


async def test_callers_share_commits_and_each_gets_its_own_answer(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = [await make_user(engine) for _ in range(5)]
    async with running(engine) as kit:
        sizes = counting(kit, monkeypatch)
        answers = await together([call(kit, users[number % 5], f"id-{number}", number) for number in range(300)])
    assert sum(sizes) == 300
    assert len(sizes) < 30
    assert [
        (answer.id, answer.user_id, answer.tokens, answer.duplicate)
        for answer in answers
        if isinstance(answer, UsageRecord)
    ] == [(f"id-{number}", users[number % 5], number, False) for number in range(300)]
    assert len(await ids(engine)) == 300


async def test_half_of_a_crowd_records_again_while_the_other_half_is_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_id = await make_user(engine)
    async with running(engine) as kit:
        events: list[str] = []
        flush = kit.usage._writer.flush

        async def told(lane: Any, calls: Sequence[Call]) -> dict[str, asyncpg.Record]:
            events.append(f"{len(calls)} written")
            return await flush(lane, calls)

        async def twice() -> None:
            await kit.usage.record(user_id, tokens=1, model="m")
            events.append("answered")
            await kit.usage.record(user_id, tokens=1, model="m")

        monkeypatch.setattr(kit.usage._writer, "flush", told)
        await together([twice] * 64)
    assert events == ["64 written", *["answered"] * 32, "32 written", *["answered"] * 32, "32 written"]


async def test_a_loop_that_closes_between_the_halves_leaves_nobody_in_doubt(engine: Engine) -> None:
    user_id = await make_user(engine)
    async with running(engine) as kit:

        async def one() -> UsageRecord:
            record = await kit.usage.record(user_id, tokens=1, model="m")
            for task in asyncio.all_tasks():  # what a closing loop does to them
                if task.get_name().endswith("Recorder._flush_all"):
                    task.cancel()
            return record

        answers = await together([one] * 64)
    assert [answer for answer in answers if not isinstance(answer, UsageRecord)] == []
    assert len(await ids(engine)) == 64


async def test_an_answer_comes_after_the_commit(engine: Engine, server: Server) -> None:
    user_id = await make_user(engine)
    database = await engine.fetchval("SELECT current_database()")
    async with running(engine) as kit, server.engine(database) as outside:

        async def one() -> None:
            record = await kit.usage.record(user_id, tokens=1, model="m")
            assert await outside.fetchval("SELECT count(*)::int FROM usage WHERE id = $1", record.id) == 1

        assert await together([one] * 50) == [None] * 50


async def test_a_lone_caller_does_not_wait_for_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    user_id = await make_user(engine)
    async with running(engine) as kit:
        sizes = counting(kit, monkeypatch)
        for _ in range(5):
            await kit.usage.record(user_id, tokens=1, model="m")
    assert sizes == [1] * 5


async def test_with_a_linger_calls_wait_for_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    user_id = await make_user(engine)
    async with running(engine, usage_linger=timedelta(seconds=0.3)) as kit:
        sizes = counting(kit, monkeypatch)
        start = anyio.current_time()
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(call(kit, user_id))
                await anyio.lowlevel.checkpoint()
        assert anyio.current_time() - start >= 0.3
        assert sum(sizes) == 20
        assert len(sizes) <= 2  # one of each flusher
        sizes.clear()
        await together([call(kit, user_id)] * 1_000)
        assert sizes == [500, 500]


@pytest.mark.parametrize("known", [False, True])
async def test_calls_with_one_id_in_one_batch(engine: Engine, server: Server, known: bool) -> None:
    user_id = await make_user(engine)
    calls = [(user_id, "a", 1), (user_id, "a", 1), (user_id, "a", 2)]
    async with running(engine) as kit:
        if known:
            await kit.usage.record(user_id, tokens=1, model="m", id="a")
        found = await batched(engine, server, kit, user_id, [call(kit, *one) for one in calls])
    first, second, third = found
    assert isinstance(first, UsageRecord)
    assert isinstance(second, UsageRecord)
    assert (first.duplicate, second.duplicate) == (known, True)
    assert isinstance(third, UsageConflictError)
    assert await engine.fetchval("SELECT sum(tokens_used)::int FROM usage WHERE id = 'a'") == 1


async def batched(
    engine: Engine, server: Server, kit: KitRocket, user_id: str, calls: Sequence[Callable[[], Any]]
) -> list[object]:
    """Make calls that one flusher takes at once, and return what each answered or raised."""
    found: list[object] = []

    async def all_at_once() -> None:
        found.extend(await together(calls))

    async with anyio.create_task_group() as group, stalled(engine, server, kit, user_id, group):
        group.start_soon(all_at_once)
        await queued(kit, len(calls))
    return found


async def test_a_row_that_cannot_be_stored_fails_alone(
    engine: Engine, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_id = await make_user(engine)
    async with running(engine) as kit:
        calls = [call(kit, user_id, f"id-{number:03}") for number in range(500)]
        calls[random.randrange(500)] = call(kit, "nobody", "bad")
        sizes = counting(kit, monkeypatch)
        found = await batched(engine, server, kit, user_id, calls)
    assert sizes[:3] == [1, 1, 500]
    assert len(sizes) - 2 <= 19
    [error] = [answer for answer in found if not isinstance(answer, UsageRecord)]
    assert isinstance(error, UserNotFoundError)
    assert error.user_id == "nobody"
    assert len(await ids(engine)) == 499 + 2


async def test_bad_input_never_reaches_the_queue(engine: Engine) -> None:
    async with running(engine) as kit:
        with pytest.raises(InvalidInputError):
            await kit.usage.record("ada", tokens=-1, model="m")
        assert len(kit.usage._recorder._queue) == 0


async def test_what_is_cancelled_in_the_queue_is_not_recorded(engine: Engine, server: Server) -> None:
    user_id = await make_user(engine)
    async with (
        running(engine) as kit,
        anyio.create_task_group() as group,
        stalled(engine, server, kit, user_id, group),
        anyio.create_task_group() as impatient,
    ):
        for number in range(20):
            impatient.start_soon(call(kit, user_id, f"impatient-{number}"))
        await queued(kit, 20)
        group.start_soon(call(kit, user_id, "patient"))
        await queued(kit, 21)
        impatient.cancel_scope.cancel()
    assert await ids(engine) == ["patient", "stalled-1", "stalled-2"]


async def test_what_is_cancelled_in_a_flush_can_be_sent_again(engine: Engine, server: Server) -> None:
    user_id = await make_user(engine)
    async with running(engine) as kit:
        async with anyio.create_task_group() as group, stalled(engine, server, kit, user_id, group):
            group.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
        answers = [await kit.usage.record(user_id, tokens=1, model="m", id=f"stalled-{number}") for number in (1, 2)]
    assert [answer.id for answer in answers] == ["stalled-1", "stalled-2"]
    assert await ids(engine) == ["stalled-1", "stalled-2"]


async def test_random_cancellations_lose_nothing_that_was_acknowledged(engine: Engine) -> None:
    user_id = await make_user(engine)
    acknowledged: set[str] = set()
    async with running(engine) as kit:

        async def one(number: int) -> None:
            with anyio.move_on_after(random.uniform(0, 0.02)):
                await kit.usage.record(user_id, tokens=1, model="m", id=f"{number:04}")
                acknowledged.add(f"{number:04}")

        async with anyio.create_task_group() as group:
            for number in range(1_000):
                group.start_soon(one, number)
                if number % 10 == 0:
                    await anyio.lowlevel.checkpoint()
        assert not kit.usage._recorder._outstanding
        assert (await kit.usage.record(user_id, tokens=1, model="m")).duplicate is False
    assert acknowledged <= set(await ids(engine))


async def test_callers_wait_while_the_queue_is_full(engine: Engine, server: Server) -> None:
    user_id = await make_user(engine)
    async with running(engine, usage_queue_size=10) as kit:
        waits = kit.usage._recorder
        async with anyio.create_task_group() as group, stalled(engine, server, kit, user_id, group):
            for _ in range(100):
                group.start_soon(call(kit, user_id))
            while waits._places.statistics().tasks_waiting < 90:
                await anyio.lowlevel.checkpoint()
                assert len(waits._queue) <= 10
            assert len(waits._queue) == 10
        assert len(await ids(engine)) == 102


@pytest.mark.direct
async def test_lost_connections_lose_nothing_and_count_nothing_twice(engine: Engine) -> None:
    user_id = await make_user(engine)
    answers: list[UsageRecord] = []
    async with running(engine) as kit:

        async def caller(number: int) -> None:
            answers.extend(
                [
                    await kit.usage.record(user_id, tokens=1, model="m", id=f"{number}-{index // 2}")
                    for index in range(60)
                ]
            )

        async with anyio.create_task_group() as group:
            for number in range(16):
                group.start_soon(caller, number)
            for _ in range(10):
                await engine.fetch(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
                await anyio.sleep(0.01)
    assert len(answers) == 16 * 60
    assert Counter(await ids(engine)) == Counter(f"{number}-{index}" for number in range(16) for index in range(30))


@pytest.mark.parametrize("count", [1, 20])
async def test_a_batch_whose_answer_was_lost_counts_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    user_id = await make_user(engine)
    lost: list[int] = []
    async with running(engine) as kit:
        flush = kit.usage._writer.flush

        async def lose(lane: Any, calls: Sequence[Call]) -> dict[str, asyncpg.Record]:
            there = await flush(lane, calls)
            if len(lost) < 3:
                lost.append(len(calls))
                raise DatabaseUnavailableError("the connection was lost") from ConnectionResetError()
            return there

        monkeypatch.setattr(kit.usage._writer, "flush", lose)
        records = await together([call(kit, user_id)] * count)
        assert not any(record.duplicate for record in records if isinstance(record, UsageRecord))
        assert sorted(record.id for record in records if isinstance(record, UsageRecord)) == await ids(engine)
    assert len(lost) == 3
    assert len(await ids(engine)) == count
    assert (await kit.usage.verify()).drift == 0


async def test_leaving_writes_what_waits_and_refuses_what_comes(engine: Engine, server: Server) -> None:
    user_id = await make_user(engine)
    before = asyncio.all_tasks()
    kit = running(engine)
    await kit.__aenter__()
    async with anyio.create_task_group() as group, stalled(engine, server, kit, user_id, group):
        for number in range(20):
            group.start_soon(call(kit, user_id, f"{number:02}"))
        await queued(kit, 20)
        group.start_soon(kit.__aexit__, None, None, None)
        while not kit.usage._recorder._closed:
            await anyio.lowlevel.checkpoint()
        with pytest.raises(RecorderClosedError):
            await kit.usage.record(user_id, tokens=1, model="m", id="late")
    assert len(await ids(engine)) == 22
    assert asyncio.all_tasks() - before == set()
    with pytest.raises(RecorderClosedError):
        await kit.usage.record(user_id, tokens=1, model="m")
    async with kit:
        await kit.usage.record(user_id, tokens=1, model="m", id="again")


async def test_leaving_does_not_wait_for_ever(engine: Engine, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_DRAIN_LIMIT", 0.1)
    user_id = await make_user(engine)
    before = asyncio.all_tasks()
    kit = running(engine, usage_queue_size=5)
    await kit.__aenter__()
    found: list[object] = []

    async def one(number: int) -> None:
        found.extend(await together([call(kit, user_id, f"{number}")]))

    database = await engine.fetchval("SELECT current_database()")
    blocker = await asyncpg.connect(server.url(database, direct=True))
    async with anyio.create_task_group() as group:
        await blocker.execute("BEGIN; LOCK TABLE usage IN SHARE MODE")
        for number in range(2):
            group.start_soon(one, number)
            await until_waiting(engine, number + 1)
        for number in range(2, 10):
            group.start_soon(one, number)
        await queued(kit, 5)
        with anyio.fail_after(30):
            await kit.__aexit__(None, None, None)
    await blocker.close()
    assert Counter(type(error) for error in found) == {DatabaseUnavailableError: 2, RecorderClosedError: 8}
    assert asyncio.all_tasks() - before == set()


ABANDONED = """
import asyncio, os
from kitrocket import KitRocket, Settings

async def work():
    kit = KitRocket(Settings(database_url=os.environ["URL"], database_pooler=True), background=False)
    await kit.__aenter__()
    user = await kit.users.create(email="ada@example.com", name="Ada")
    print((await kit.usage.record(user.id, tokens=1, model="m")).id, flush=True)
    others = [asyncio.ensure_future(kit.usage.record(user.id, tokens=1, model="m")) for _ in range(50)]
    await asyncio.sleep(0)

asyncio.run(work())
"""


async def test_a_loop_that_closes_under_the_kit_hangs_nobody(engine: Engine, database_url: str) -> None:
    """The block is never left: ``asyncio.run`` cancels the tasks that it finds."""
    with anyio.fail_after(60):
        found = await anyio.run_process([sys.executable, "-c", ABANDONED], env={**os.environ, "URL": database_url})
    assert b"Traceback" not in found.stderr
    assert found.stdout.decode().strip() in await ids(engine)


async def test_inside_a_transaction_it_is_written_at_once_on_the_callers_connection(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_id = await make_user(engine)
    async with running(engine) as kit:
        with pytest.raises(ZeroDivisionError):
            async with kit.transaction():
                await kit.usage.record(user_id, tokens=1, model="m")
                assert await ids(engine) != []
                raise ZeroDivisionError
        assert await ids(engine) == []


async def test_a_service_alone_writes_each_call_by_itself(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    user_id = await make_user(engine)
    usage = UsageService(engine, clock=utc_now)
    before = asyncio.all_tasks()
    await usage.record(user_id, tokens=1, model="m")
    assert asyncio.all_tasks() == before
    assert len(await ids(engine)) == 1
