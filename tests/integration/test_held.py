"""A connection held for a hot statement keeps the command time-out by itself."""

from __future__ import annotations

from datetime import timedelta

import anyio
import pytest

from kitrocket.engine import Engine
from kitrocket.errors import ConfigurationError, DatabaseUnavailableError
from servers import Server

pytestmark = pytest.mark.asyncio


async def test_a_statement_that_takes_too_long_is_cut_off(server: Server, database: str) -> None:
    async with Engine(
        server.url(database), pooler=server.pooler is not None, command_timeout=timedelta(milliseconds=500)
    ) as engine:
        held = engine.hold()
        with anyio.fail_after(30), pytest.raises(DatabaseUnavailableError):
            await held.fetch("SELECT pg_sleep(30)")
        # It connects anew, and what is quick is left alone however often the timer looks.
        start = anyio.current_time()
        while anyio.current_time() - start < 1.1:
            assert (await held.fetch("SELECT 1"))[0][0] == 1
        await held.aclose()


async def test_a_cancelled_statement_does_not_hold_up_the_next(server: Server, database: str) -> None:
    async with server.engine(database) as engine:
        held = engine.hold()
        assert (await held.fetch("SELECT 1"))[0][0] == 1
        with anyio.move_on_after(0.05):
            await held.fetch("SELECT pg_sleep(30)")
        with anyio.fail_after(30):
            assert (await held.fetch("SELECT 1"))[0][0] == 1
        await held.aclose()


async def test_it_stays_closed(server: Server, database: str) -> None:
    async with server.engine(database) as engine:
        held = engine.hold()
        await held.fetch("SELECT 1")
        await held.aclose()
        with pytest.raises(ConfigurationError):
            await held.fetch("SELECT 1")
