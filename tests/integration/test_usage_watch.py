"""Totals as they change: at once where recording tells of them, soon in any case, and nothing left behind."""

from __future__ import annotations

import ast
import asyncio
import gc
import re
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import anyio
import anyio.lowlevel
import pytest

from factories import make_usage, make_user
from kitrocket import KitRocket, Settings
from kitrocket.engine import Engine
from kitrocket.errors import InvalidInputError, TransactionError
from kitrocket.testing import ManualClock
from kitrocket.usage import UsageService, watching
from kitrocket.usage.watching import Watch
from servers import Server

pytestmark = pytest.mark.asyncio(loop_scope="session")

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "watch.md"
MODEL = "claude-sonnet-4-20250514"
LISTENERS = """
SELECT pid FROM pg_stat_activity
 WHERE datname = current_database() AND query LIKE 'LISTEN%' AND pid <> pg_backend_pid()
"""


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    with anyio.fail_after(30):
        while not await condition():
            await anyio.lowlevel.checkpoint()


async def listeners(engine: Engine) -> list[int]:
    return [row["pid"] for row in await engine.fetch(LISTENERS)]


async def nobody_listens(engine: Engine) -> bool:
    return await listeners(engine) == []


@pytest.fixture
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not heard is as good as never read."""
    monkeypatch.setattr(watching, "_EVERY", 1000.0)
    monkeypatch.setattr(watching, "_EVERY_UNHEARD", 1000.0)


async def test_every_way_to_record_is_heard_within_a_second(engine: Engine, clock: ManualClock, seldom: None) -> None:
    user_id, other = await make_user(engine), await make_user(engine)
    async with (
        KitRocket(Settings(usage_live=True), engine=engine, clock=clock, background=False) as kit,
        kit.usage.watch(user_id) as totals,
        kit.usage.watch(other) as others,
    ):
        assert [await anext(totals), await anext(others)] == [0, 0]
        waits = []
        entry = {"user_id": user_id, "tokens": 10, "model": MODEL}

        async def in_a_transaction() -> None:
            async with kit.transaction():
                await kit.usage.record(user_id, tokens=10, model=MODEL)

        alone = UsageService(engine, clock=clock, live=True)
        for number, write in enumerate(
            (
                lambda: kit.usage.record(user_id, tokens=10, model=MODEL),
                lambda: kit.usage.record_many([entry]),
                in_a_transaction,
                lambda: alone.record(user_id, tokens=10, model=MODEL),
                lambda: kit.usage.record_many(
                    [entry, *({"user_id": other, "tokens": 1, "model": MODEL} for _ in range(30))]
                ),
            ),
            start=1,
        ):
            await write()
            committed = anyio.current_time()
            with anyio.fail_after(30):
                assert await anext(totals) == 10 * number
            waits.append(anyio.current_time() - committed)
        assert max(waits) <= 1
        assert await anext(others) == 30
        assert len(await listeners(engine)) == 1
        # Who is slow gets the newest one alone.
        for _ in range(20):
            await kit.usage.record(user_id, tokens=1, model=MODEL)
        assert await anext(totals) == 70
    await until(lambda: nobody_listens(engine))


async def test_a_listener_that_is_killed_listens_again_and_misses_nothing(
    engine: Engine, clock: ManualClock, seldom: None
) -> None:
    user_id = await make_user(engine)
    usage = UsageService(engine, clock=clock, live=True)
    seen: list[int] = []

    async def follow() -> None:
        async for total in usage.watch(user_id):
            seen.append(total)
            if total == 110:
                return

    async with anyio.create_task_group() as group:
        group.start_soon(follow)
        killed: set[int] = set()
        for _ in range(10):
            await usage.record(user_id, tokens=10, model=MODEL)

            async def one_is_new() -> bool:
                return bool(set(await listeners(engine)) - killed)

            await until(one_is_new)
            for pid in await listeners(engine):
                await engine.fetch("SELECT pg_terminate_backend($1)", pid)
                killed.add(pid)
            # While nobody listens.
            await make_usage(engine, user_id, tokens=1)
        assert len(killed) >= 10
        group.cancel_scope.deadline = anyio.current_time() + 60
    assert seen[-1] == 110
    assert seen == sorted(set(seen))
    await until(lambda: nobody_listens(engine))


async def test_what_is_committed_between_two_connections_is_read(
    engine: Engine, clock: ManualClock, seldom: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_id = await make_user(engine)
    usage = UsageService(engine, clock=clock, live=True)
    connect, gate, arrived = engine.connect_direct, anyio.Event(), anyio.Event()

    async def late() -> object:
        arrived.set()
        await gate.wait()
        return await connect()

    async with usage.watch(user_id) as totals, anyio.create_task_group() as group:
        assert await anext(totals) == 0
        monkeypatch.setattr(engine, "connect_direct", late)
        [pid] = await listeners(engine)

        async def next_is(total: int) -> None:
            with anyio.fail_after(30):
                assert await anext(totals) == total

        group.start_soon(next_is, 7)
        await engine.fetch("SELECT pg_terminate_backend($1)", pid)
        await arrived.wait()
        await make_usage(engine, user_id, tokens=7)
        gate.set()


async def test_leaving_leaves_no_connection_and_no_task(engine: Engine, clock: ManualClock) -> None:
    user_id = await make_user(engine)
    usage = UsageService(engine, clock=clock, live=True)
    tasks = len(asyncio.all_tasks())

    async for _ in usage.watch(user_id):
        break
    await until(lambda: nobody_listens(engine))

    with pytest.raises(ZeroDivisionError):
        async for _ in usage.watch(user_id):
            assert await listeners(engine)
            raise ZeroDivisionError
    await until(lambda: nobody_listens(engine))

    async def follow(watch: Watch, first: anyio.Event) -> None:
        async for _ in watch:
            first.set()

    for _ in range(3):
        first = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(follow, usage.watch(user_id), first)
            group.start_soon(follow, usage.watch(user_id), anyio.Event())
            await first.wait()
            group.cancel_scope.cancel()
        await until(lambda: nobody_listens(engine))
    # At any point of the first value, too.
    for delay in (0.0, 0.001, 0.003, 0.01):
        with anyio.move_on_after(delay):
            await follow(usage.watch(user_id), anyio.Event())
        await until(lambda: nobody_listens(engine))

    watch = usage.watch(user_id)
    assert await anext(watch) == 0
    await watch.aclose()
    await watch.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(watch)
    # Dropped while another one watches, it takes only its own place.
    stays, goes = usage.watch(user_id), usage.watch(user_id)
    assert [await anext(stays), await anext(goes)] == [0, 0]
    del goes
    gc.collect()
    await anyio.lowlevel.checkpoint()
    await usage.record(user_id, tokens=1, model=MODEL)
    assert await anext(stays) == 1
    await stays.aclose()
    await until(lambda: nobody_listens(engine))
    assert len(asyncio.all_tasks()) == tasks


async def test_it_ends_when_the_kit_is_left(engine: Engine, clock: ManualClock) -> None:
    user_id = await make_user(engine)
    seen: list[int] = []

    async def follow(watch: Watch, first: anyio.Event) -> None:
        async for total in watch:
            seen.append(total)
            first.set()

    first = anyio.Event()
    kit = KitRocket(Settings(usage_live=True), engine=engine, clock=clock, background=False)
    async with anyio.create_task_group() as group, kit:
        group.start_soon(follow, kit.usage.watch(user_id), first)
        await first.wait()
    assert seen == [0]


async def test_without_a_connection_that_listens_it_reads_every_second(
    server: Server, engine: Engine, database: str, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_EVERY", 1000.0)
    user_id = await make_user(engine)
    async with Engine(server.url(database), pooler=True) as pooled:
        for usage in (UsageService(pooled, clock=clock, live=True), UsageService(engine, clock=clock)):
            before = await usage.total(user_id)
            async with usage.watch(user_id) as totals:
                assert await anext(totals) == before
                await make_usage(engine, user_id, tokens=7)
                began = anyio.current_time()
                assert await anext(totals) == before + 7
                assert anyio.current_time() - began <= 1.5
                assert await nobody_listens(engine)


async def test_what_nobody_tells_of_is_read_every_ten_seconds(
    engine: Engine, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (watching._EVERY, watching._EVERY_UNHEARD) == (10, 1)
    monkeypatch.setattr(watching, "_EVERY", 0.2)
    user_id = await make_user(engine)
    usage = UsageService(engine, clock=clock, live=True)
    async with usage.watch(user_id, since=clock() - timedelta(hours=1)) as totals:
        assert await anext(totals) == 0
        await make_usage(engine, user_id, tokens=7, at=clock() - timedelta(minutes=1))
        assert await anext(totals) == 7
        # The window moves on.
        async with usage.watch(user_id) as sliding:
            assert await anext(sliding) == 7
            clock.advance(timedelta(days=30))
            assert await anext(sliding) == 0


async def test_it_refuses_what_cannot_work(engine: Engine, clock: ManualClock) -> None:
    usage = UsageService(engine, clock=clock)
    with pytest.raises(InvalidInputError):
        usage.watch("")
    with pytest.raises(InvalidInputError):
        await anext(usage.watch("ada", tz="Mars/Base"))
    async with engine.transaction():
        with pytest.raises(TransactionError):
            await anext(usage.watch("ada"))
    assert await anext(usage.watch("nobody")) == 0


async def test_the_blocks_of_the_page_run(
    engine: Engine, clock: ManualClock, capsys: pytest.CaptureFixture[str]
) -> None:
    user_id = await make_user(engine)
    usage = UsageService(engine, clock=clock, live=True)
    names: dict[str, object] = {"kit": SimpleNamespace(usage=usage), "user": SimpleNamespace(id=user_id)}
    await usage.record(user_id, tokens=150, model=MODEL)
    blocks = re.findall(r"^```python fragment\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        await eval(compile(block, str(PAGE), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
    assert names["first"] == 150
    assert capsys.readouterr().out == "150\n"


async def test_a_payload_names_users_while_it_is_short_enough() -> None:
    assert watching._payload(["b", "a", "b"]) == '["a","b"]'
    assert len(watching._payload(["x" * 7995]).encode()) == 7999
    assert watching._payload(["x" * 7996]) == "*"
    assert watching._payload(["ü" * 3998]) == "*"
