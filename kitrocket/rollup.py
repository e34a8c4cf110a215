"""The rollup of usage, filled and repaired a day at a time, beside any number of writers.

Recomputing a day takes three steps. Keys that are missing are inserted with zeros, and that is committed: a writer can
then meet no key that we have not. Keys are locked in order: whoever wrote their calls before has committed by then, and
whoever writes them later waits. The next statement counts the calls of just these keys. Few keys at a time, so that
nobody waits long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import date, timedelta

import asyncpg

from kitrocket.engine import Engine
from kitrocket.sql import statements

#: The most keys that are locked at a time.
_KEYS_HELD = 200
#: How long a statement that reads every call may take, in seconds.
LONG = 3_600.0

_SQL = statements("rollup")


async def recompute_day(engine: Engine, day: date) -> int:
    """Make a UTC day of the rollup what its calls say, and return how many keys were wrong; in its own transactions."""
    return await engine.retry(lambda: _recompute_day(engine, day), idempotent=True)


async def _recompute_day(engine: Engine, day: date) -> int:
    for users, models in _chunks(await fetch_long(engine, _SQL["missing_keys"], day)):
        await engine.fetch(_SQL["add_keys"], day, users, models)
    wrong = 0
    for users, models in _chunks(await engine.fetch(_SQL["keys"], day)):
        async with engine.transaction():
            await engine.fetch(_SQL["lock_keys"], day, users, models)
            wrong += len(await engine.fetch(_SQL["recompute_keys"], day, users, models))
    return wrong


def _chunks(keys: Sequence[asyncpg.Record]) -> Iterator[tuple[list[str], list[str]]]:
    """Yield users and models, as many as are held at a time."""
    for start in range(0, len(keys), _KEYS_HELD):
        held = keys[start : start + _KEYS_HELD]
        yield [key["user_id"] for key in held], [key["model"] for key in held]


async def is_complete(engine: Engine) -> bool:
    """Whether the rollup covers every day; false also where there is none."""
    try:
        state = await engine.fetchrow(_SQL["state"])
    except asyncpg.UndefinedTableError:
        return False
    return state is not None and state["rollup_from"] == date.min


async def backfill(engine: Engine, *, report: Callable[[str], None] | None = None) -> int:
    """Fill the rollup from the newest day back, and return how many days it took.

    From each day on that is done, sums are read from the rollup. Killed, it goes on from there when it is run again;
    two at once do no harm. ``report`` is told a line for each day.
    """
    state = await engine.fetchrow(_SQL["state"])
    if state is None or state["rollup_from"] == date.min:
        return 0
    days = [row["day"] for row in await fetch_long(engine, _SQL["days"], state["raw_from"])]
    if days:
        # The triggers have counted whatever came to later days since they were made.
        await engine.fetch(_SQL["complete_from"], days[0] + timedelta(days=1))
    todo = [day for day in days if day < state["rollup_from"]]
    for day in todo:
        await recompute_day(engine, day)
        await engine.fetch(_SQL["complete_from"], day)
        if report is not None:
            report(f"summed the usage of {day}")
    await engine.fetch(_SQL["complete_from"], None)
    return len(todo)


async def fetch_long(engine: Engine, sql: str, *arguments: object) -> list[asyncpg.Record]:
    """Run a statement that may take longer than the engine lets others take."""

    async def unit() -> list[asyncpg.Record]:
        async with engine.transaction() as transaction:
            rows: list[asyncpg.Record] = await transaction.connection.fetch(sql, *arguments, timeout=LONG)
            return rows

    return await engine.retry(unit, idempotent=True)
