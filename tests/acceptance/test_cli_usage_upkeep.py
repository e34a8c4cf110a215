"""``kitrocket usage verify``, ``rebuild`` and ``prune`` on a terminal, stopped by Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest
from racing import until_someone_waits
from terminals import Terminal

from factories import make_usage, make_user
from kitrocket.engine import Engine

pytestmark = [pytest.mark.asyncio, pytest.mark.direct]

DAYS = [datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2, 3)]


@asynccontextmanager
async def locked(engine: Engine, statement: str) -> AsyncIterator[None]:
    async with engine.direct() as connection, connection.transaction():
        await connection.execute(statement)
        yield


@pytest.mark.parametrize(
    ("command", "lock", "seen", "remark"),
    [
        (("verify",), "LOCK TABLE kitrocket.usage_daily", "comparing", "Stopped: nothing was changed."),
        (
            ("rebuild", "--since", "2026-01-01"),
            "SELECT FROM kitrocket.usage_daily WHERE day = '2026-01-01' FOR UPDATE",
            "2/3",
            "Stopped: the days that are done are right; run it again for the others.",
        ),
    ],
    ids=["verify", "rebuild"],
)
async def test_ctrl_c_stops_it_and_says_how_things_are(
    engine: Engine, database_url: str, command: tuple[str, ...], lock: str, seen: str, remark: str
) -> None:
    await make_user(engine, id="ada")
    for day in DAYS:
        await make_usage(engine, "ada", at=day)
    async with locked(engine, lock):
        running = Terminal("usage", *command, url=database_url)
        await until_someone_waits(engine)
        running.process.send_signal(signal.SIGINT)
        code, screen = await running.ended()
    assert code == 130, screen
    assert seen in screen
    assert screen.splitlines()[-1] == remark
    assert "Traceback" not in screen


async def test_pruning_shows_how_far_it_is(engine: Engine, database_url: str) -> None:
    await make_user(engine, id="ada")
    for day in DAYS:
        await make_usage(engine, "ada", at=day, model="\x1b[31mred")
    await engine.fetch("UPDATE kitrocket.usage_daily SET tokens = 9 WHERE day = '2026-01-03'")
    code, screen = await Terminal(
        "usage", "prune", "--before", "2026-01-03", "--batch-size", "1", url=database_url
    ).ended()
    assert code == 0, screen
    assert "2/2" in screen
    assert screen.splitlines()[-1] == "Deleted 2 call(s); they are kept from 2026-01-03 on."
    code, screen = await Terminal("usage", "verify", url=database_url).ended()
    assert code == 1
    assert r"2026-01-03 ada \x1b[31mred: 9 tokens of 1 call(s) are summed, 1 of 1 are there" in screen
