"""Calls that race each other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import anyio

from kitrocket.engine import Engine


async def together(calls: Sequence[Callable[[], Awaitable[object]]]) -> list[object]:
    """Start all calls at once, and return what each answered or raised, in their order."""
    answers: list[object] = [None] * len(calls)

    async def one(index: int) -> None:
        try:
            answers[index] = await calls[index]()
        except Exception as error:  # noqa: BLE001 - the test looks at every one of them
            answers[index] = error

    async with anyio.create_task_group() as group:
        for index in range(len(calls)):
            group.start_soon(one, index)
    return answers


async def until_someone_waits(engine: Engine) -> None:
    """Return once a statement on this database waits for a lock."""
    while not await engine.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    ):
        # A transaction keeps to the connections that it saw first, and the one that waits may be newer.
        await engine.fetchval("SELECT pg_stat_clear_snapshot()")


async def warm_up(engine: Engine) -> None:
    """Connect all that the pool may hold, so that calls which start together run together."""
    connections = [await engine.acquire() for _ in range(engine._pool_size)]
    for connection in connections:
        await engine.give_back(connection)
