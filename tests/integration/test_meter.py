"""Metered calls: what they counted is recorded however they end, and what they reserved is free afterwards."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import anyio
import anyio.lowlevel
import asyncpg
import pytest

from factories import make_user
from kitrocket import KitRocket, Settings
from kitrocket.clock import from_db, to_db
from kitrocket.engine import Engine
from kitrocket.errors import (
    DatabaseUnavailableError,
    InvalidInputError,
    QuotaExceededError,
    UserNotFoundError,
)
from kitrocket.testing import ManualClock
from kitrocket.usage import UsageService, metering
from servers import Server

pytestmark = pytest.mark.asyncio(loop_scope="session")

MODEL = "m"
SECOND = timedelta(seconds=1)
TTL = timedelta(seconds=600)


@pytest.fixture
def usage(engine: Engine, clock: ManualClock) -> UsageService:
    return UsageService(engine, clock=clock)


async def rows(engine: Engine) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in await engine.fetch("SELECT id, user_id, tokens_used, model FROM usage ORDER BY id")]


async def reservations(engine: Engine) -> int:
    return int(await engine.fetchval("SELECT count(*) FROM kitrocket.usage_reservations"))


async def test_what_was_counted_is_recorded(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    user_id = await make_user(engine)
    async with usage.meter(user_id, model=MODEL, reserve=4000, limit=5000) as meter:
        meter.add(312)
        meter.add(0)
        meter.add(8)
        assert meter.count == 320
        assert meter.decision is not None
        assert (meter.decision.allowed, meter.decision.remaining) == (True, 1000)
        with pytest.raises(QuotaExceededError) as caught:
            async with usage.meter(user_id, model=MODEL, reserve=1001, limit=5000):
                raise AssertionError
        assert (caught.value.decision.reserved, caught.value.decision.retry_after) == (4000, 600)
        assert str(caught.value) == "of 5,000 tokens 0 are used and 4,000 reserved; the call would fit in 600 s"
        clock.advance(SECOND)
    assert meter.settled is not None
    assert (meter.settled.tokens, meter.settled.at, meter.settled.overrun) == (320, clock.now, 0)
    assert await rows(engine) == [(meter.settled.id, user_id, 320, MODEL)]
    assert await reservations(engine) == 0


async def test_the_providers_figure_takes_the_place_of_the_count(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    async with usage.meter(user_id, model=MODEL, reserve=10, limit=50, id="mine") as meter:
        meter.add(30)
        meter.set(25)
    assert meter.settled is not None
    assert meter.settled.overrun == 15
    assert await rows(engine) == [("mine", user_id, 25, MODEL)]


async def test_nothing_counted_gives_the_reservation_back(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    async with usage.meter(user_id, model=MODEL, reserve=10, limit=10) as meter:
        meter.add(5)
        meter.set(0)
    assert meter.settled is None
    assert (await rows(engine), await reservations(engine)) == ([], 0)


async def test_without_a_limit_nothing_is_reserved(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    async with usage.meter(user_id, model=MODEL) as meter:
        assert await reservations(engine) == 0
        meter.add(7)
    assert [row[2] for row in await rows(engine)] == [7]
    with pytest.raises(UserNotFoundError):
        async with usage.meter("nobody", model=MODEL) as meter:
            meter.add(1)
    with pytest.raises(UserNotFoundError):
        async with usage.meter("nobody", model=MODEL, reserve=1, limit=1):
            raise AssertionError


async def test_an_exception_passes_on_and_the_count_is_recorded(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    with pytest.raises(ZeroDivisionError):
        async with usage.meter(user_id, model=MODEL, reserve=10, limit=10) as meter:
            meter.add(6)
            raise ZeroDivisionError
    assert [row[2] for row in await rows(engine)] == [6]
    assert await reservations(engine) == 0


async def test_bad_counts_are_refused_and_change_nothing(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    async with usage.meter(user_id, model=MODEL) as meter:
        meter.add(5)
        for bad in (-1, 2**31 - 5, 1.0, True, "1", None):
            with pytest.raises(InvalidInputError):
                meter.add(bad)  # type: ignore[arg-type]  # that is what is refused
        for bad in (-1, 2**31, 1.0, True, "1", None):
            with pytest.raises(InvalidInputError):
                meter.set(bad)  # type: ignore[arg-type]  # as above
        assert meter.count == 5
    with pytest.raises(InvalidInputError):
        meter.add(1)
    with pytest.raises(InvalidInputError):
        usage.meter(user_id, model=MODEL, limit=10)


# -- streams ------------------------------------------------------------------------------------------------------


class Source:
    """Yields numbers, and says how it was closed."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.closed = 0
        self.numbers = iter(range(1, 6))

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        await anyio.lowlevel.checkpoint()
        number = next(self.numbers, None)
        if number is None:
            raise StopAsyncIteration
        if number == self.fails_at:
            raise ZeroDivisionError
        return number

    async def close(self) -> None:
        self.closed += 1


async def test_a_stream_is_counted_and_closed(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    source = Source()
    async with usage.meter(user_id, model=MODEL, reserve=100, limit=100) as meter:
        seen = [number async for number in meter.stream(source, tokens=lambda number: number * 10)]
        assert (seen, source.closed) == ([1, 2, 3, 4, 5], 1)
    assert [row[2] for row in await rows(engine)] == [150]


async def test_a_stream_that_is_left_or_fails_counts_what_came(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    left, failing = Source(), Source(fails_at=4)
    async with usage.meter(user_id, model=MODEL, id="left") as meter:
        async for number in meter.stream(left, tokens=lambda number: number):
            if number == 2:
                break
    with pytest.raises(ZeroDivisionError):
        async with usage.meter(user_id, model=MODEL, id="failing") as meter:
            async for _ in meter.stream(failing, tokens=lambda number: number):
                pass
    assert [(row[0], row[2]) for row in await rows(engine)] == [("failing", 6), ("left", 3)]
    assert (left.closed, failing.closed) == (1, 1)


async def test_an_async_generator_is_closed_with_its_meter(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    closed: list[str] = []

    async def words() -> AsyncIterator[str]:
        try:
            for word in ("one", "two"):
                yield word
        finally:
            closed.append("words")

    async with usage.meter(user_id, model=MODEL) as meter:
        stream = meter.stream(words(), tokens=len)
        assert await anext(stream) == "one"
    assert closed == ["words"]
    assert [row[2] for row in await rows(engine)] == [3]


# -- cancellation -------------------------------------------------------------------------------------------------


async def cancelled_at_random(engine: Engine, calls: int) -> None:
    """Cancel calls at random points, half of them by scopes and half by their task's own ``cancel()``."""
    user_id = await make_user(engine)
    counted: dict[str, int] = {}
    async with KitRocket(Settings(), engine=engine, background=False) as kit:

        async def call(name: str) -> None:
            async with kit.usage.meter(user_id, model=MODEL, reserve=100, limit=10**9, id=name) as meter:
                for _ in range(random.randrange(20)):
                    meter.add(1)
                    counted[name] = meter.count
                    await anyio.lowlevel.checkpoint()

        async def in_scope(name: str) -> None:
            with anyio.move_on_after(random.uniform(0, 0.1)):
                await call(name)

        async def by_itself(name: str) -> None:
            task = asyncio.ensure_future(call(name))
            for _ in range(random.randrange(3)):
                asyncio.get_running_loop().call_later(random.uniform(0, 0.1), task.cancel)
            await asyncio.wait([task])
            assert task.cancelled() or task.exception() is None

        for start in range(0, calls, 20):
            async with anyio.create_task_group() as group:
                for number in range(start, min(start + 20, calls)):
                    group.start_soon((in_scope, by_itself)[number % 2], f"{number:04}")
    assert {row[0]: row[2] for row in await rows(engine)} == counted
    assert await reservations(engine) == 0


async def test_calls_cancelled_at_random_are_all_settled(engine: Engine) -> None:
    await cancelled_at_random(engine, 40)


@pytest.mark.storm
async def test_a_thousand_calls_cancelled_at_random_are_all_settled(engine: Engine) -> None:
    await cancelled_at_random(engine, 1_000)


async def test_a_cancellation_while_it_records_is_passed_on_afterwards(
    engine: Engine, server: Server, usage: UsageService
) -> None:
    """At each of these points the task waits in the settlement, behind a lock."""
    user_id = await make_user(engine)
    database = await engine.fetchval("SELECT current_database()")
    blocker = await asyncpg.connect(server.url(database, direct=True))
    await blocker.execute("BEGIN; LOCK TABLE usage IN SHARE MODE")

    async def call() -> None:
        async with usage.meter(user_id, model=MODEL, reserve=9, limit=100) as meter:
            meter.add(9)

    task = asyncio.ensure_future(call())
    for _ in range(2):
        while not await engine.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        ):
            await anyio.lowlevel.checkpoint()
        task.cancel()
        await anyio.lowlevel.checkpoint()
    await blocker.close()
    await asyncio.wait([task])
    assert task.cancelled()
    assert [row[2] for row in await rows(engine)] == [9]
    assert await reservations(engine) == 0


async def test_a_count_that_cannot_be_recorded_is_said(
    engine: Engine,
    server: Server,
    usage: UsageService,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(metering, "_END_LIMIT", 0.05)
    user_id = await make_user(engine)
    database = await engine.fetchval("SELECT current_database()")
    blocker = await asyncpg.connect(server.url(database, direct=True))
    await blocker.execute("BEGIN; LOCK TABLE usage IN SHARE MODE")
    with pytest.raises(DatabaseUnavailableError, match="'silent' of 9 tokens"):
        async with usage.meter(user_id, model=MODEL, id="silent") as meter:
            meter.add(9)
    with pytest.raises(ZeroDivisionError):
        async with usage.meter(user_id, model=MODEL, id="loud") as meter:
            meter.add(9)
            raise ZeroDivisionError
    assert "usage loud of 9 tokens could not be recorded" in caplog.text
    await blocker.close()


# -- renewal ------------------------------------------------------------------------------------------------------


async def test_running_calls_keep_their_reservation_and_a_dead_ones_count_is_recorded(
    usage: UsageService, engine: Engine, clock: ManualClock
) -> None:
    user_id = await make_user(engine)
    other = UsageService(engine, clock=clock)
    async with usage.meter(user_id, model=MODEL, reserve=100, limit=100, id="a") as meter:
        for count in (0, 40, 80):
            meter.set(count)
            clock.advance(TTL - SECOND)
            assert (await usage.expire_reservations()).renewed == 1
            assert (await other.expire_reservations()).renewed == 0
            [row] = await engine.fetch("SELECT used, expires_at FROM kitrocket.usage_reservations")
            assert (row["used"], from_db(row["expires_at"])) == (count, clock.now + TTL)
        # Nobody renews it any more, as if this process had died.
        clock.advance(TTL)
        assert (await other.expire_reservations()).recorded == 1
        assert [row[2] for row in await rows(engine)] == [80]
        assert (await usage.expire_reservations()).renewed == 0
        meter.set(95)
    assert [(row[0], row[2]) for row in await rows(engine)] == [("a", 80), ("a.late", 15)]
    assert (await usage.expire_reservations()).renewed == 0


async def test_an_expired_reservation_is_not_renewed(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    """Others may have been admitted in its place."""
    user_id = await make_user(engine)
    async with usage.meter(user_id, model=MODEL, reserve=100, limit=100) as meter:
        meter.add(1)
        clock.advance(TTL)
        assert (await usage.reserve(user_id, tokens=100, model=MODEL, limit=100)).allowed
        assert (await usage.expire_reservations()).renewed == 0


async def test_renewal_is_due_at_a_third_of_the_shortest_time_to_live(engine: Engine) -> None:
    usage = UsageService(engine)
    user_id = await make_user(engine)
    start = anyio.current_time()
    await usage.renewal_due(0.01)
    assert anyio.current_time() - start >= 0.01

    async def call() -> None:
        async with usage.meter(user_id, model=MODEL, reserve=1, limit=100, ttl=SECOND):
            await anyio.sleep_forever()

    async with anyio.create_task_group() as group:
        group.start_soon(call)
        with anyio.fail_after(30):
            await usage.renewal_due(60)
        assert anyio.current_time() - start >= 1 / 3
        group.cancel_scope.cancel()


async def test_a_running_kit_records_what_expired(engine: Engine, clock: ManualClock) -> None:
    user_id = await make_user(engine)
    usage = UsageService(engine, clock=clock)
    await usage.reserve(user_id, tokens=10, model=MODEL, limit=10, id="a")
    await engine.fetch("UPDATE kitrocket.usage_reservations SET used = 4, expires_at = $1", to_db(clock.now - SECOND))
    async with KitRocket(Settings(), engine=engine, clock=clock):
        with anyio.fail_after(30):
            while await rows(engine) == []:
                await anyio.sleep(0.01)
    assert await rows(engine) == [("a", user_id, 4, MODEL)]
