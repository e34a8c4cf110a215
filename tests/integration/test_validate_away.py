"""The check of a session while the database is away: someone waits for a page, so it gives up soon."""

from __future__ import annotations

from contextlib import AsyncExitStack
from datetime import timedelta

import anyio
import pytest
from racing import together

from factories import make_user
from kitrocket.engine import Engine
from kitrocket.errors import DatabaseUnavailableError
from kitrocket.models import SessionWithUser
from kitrocket.sessions import SessionService, validation
from kitrocket.testing import ManualClock
from proxying import Proxy
from servers import Server

pytestmark = [pytest.mark.asyncio, pytest.mark.direct]

LIMIT = 0.5


@pytest.fixture
def short_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timedelta(seconds=5) == validation._DEADLINE
    monkeypatch.setattr(validation, "_DEADLINE", timedelta(seconds=LIMIT))


@pytest.mark.parametrize("coalescing", [False, True])
@pytest.mark.usefixtures("short_deadline")
async def test_it_tries_until_its_deadline_and_works_again_afterwards(
    server: Server, database: str, clock: ManualClock, coalescing: bool
) -> None:
    proxy = Proxy(server)
    async with proxy.running(), Engine(proxy.url(database)) as engine, AsyncExitStack() as stack:
        service = SessionService(engine, clock=clock)
        token = (await service.create(await make_user(engine))).token
        if coalescing:
            await stack.enter_async_context(service.coalescing())
        calls = [lambda: service.validate(token)] * 20 + [lambda: service.validate(token, refresh=False)] * 5
        assert all(isinstance(answer, SessionWithUser) for answer in await together(calls))
        await proxy.cut()
        began = anyio.current_time()
        answers = await together(calls)
        taken = anyio.current_time() - began
        assert {type(answer) for answer in answers} == {DatabaseUnavailableError}
        # Also who waits in the queue has waited once, not once for each batch before.
        assert LIMIT * 0.8 < taken < LIMIT * 4
        proxy.is_cut = False
        assert all(isinstance(answer, SessionWithUser) for answer in await together(calls))


@pytest.mark.parametrize("coalescing", [False, True])
async def test_a_short_absence_is_not_noticed(
    server: Server, database: str, clock: ManualClock, coalescing: bool
) -> None:
    proxy = Proxy(server)
    async with proxy.running(), Engine(proxy.url(database)) as engine, AsyncExitStack() as stack:
        service = SessionService(engine, clock=clock)
        token = (await service.create(await make_user(engine))).token
        if coalescing:
            await stack.enter_async_context(service.coalescing())
        await service.validate(token)
        await proxy.cut()
        answers: list[object] = []

        async def ask(*, refresh: bool) -> None:
            answers.append(await service.validate(token, refresh=refresh))

        async with anyio.create_task_group() as group:
            for refresh in [True] * 10 + [False] * 5:
                group.start_soon(lambda refresh=refresh: ask(refresh=refresh))
            while proxy.refused < 5:
                await anyio.lowlevel.checkpoint()
            proxy.is_cut = False
        assert [type(answer) for answer in answers] == [SessionWithUser] * 15


@pytest.mark.usefixtures("short_deadline")
async def test_a_database_that_does_not_answer_holds_no_one_for_long(engine: Engine, clock: ManualClock) -> None:
    service = SessionService(engine, clock=clock)
    token = (await service.create(await make_user(engine))).token
    async with service.coalescing():
        assert await service.validate(token) is not None
        async with engine.direct() as locker, locker.transaction():
            await locker.execute("LOCK users")
            with anyio.fail_after(LIMIT * 10):
                answers = await together([lambda: service.validate(token)] * 10)
        assert {type(answer) for answer in answers} == {DatabaseUnavailableError}
        assert await service.validate(token) is not None
