"""The switch of the trigger that puts usage into the outbox.

It stands in the database and not in a process, so that it holds for every writer. Switched off it costs nothing.
"""

from __future__ import annotations

import random

import anyio
import asyncpg

from kitrocket.engine import Engine
from kitrocket.errors import ConfigurationError, MigrationError
from kitrocket.migrations.forwards import turn
from kitrocket.sql import statements

#: How often the switch tries for its lock, and how long it pauses between, in seconds.
_ATTEMPTS, _PAUSE = 30, 0.1

_SQL = statements("export")


async def is_outbox_filled(engine: Engine) -> bool:
    """Whether calls that are recorded now are put into the outbox, whoever records them. One query."""
    return bool(await engine.fetchval(_SQL["trigger"]) == "O")


async def check_outbox(engine: Engine) -> None:
    """Raise :class:`ConfigurationError` unless usage is put into the outbox."""
    if not await is_outbox_filled(engine):
        raise ConfigurationError(
            "KITROCKET_USAGE_EXPORT_EVENT is set, but usage is not put into the outbox: run `kitrocket db migrate`"
        )


async def fill_outbox(engine: Engine, *, on: bool) -> bool:
    """Have calls put into the outbox from now on, or no longer, and return whether that was a change.

    Calls that are committed before are not touched. Needs a direct connection, and the rights of the table's owner.
    Writers of usage wait for at most a second. Raises :class:`MigrationError` when the table stays locked.
    """
    if await is_outbox_filled(engine) == on:
        return False
    switch = "ENABLE" if on else "DISABLE"
    async with turn(engine, lambda _line: None) as connection:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                await connection.execute(f"ALTER TABLE public.usage {switch} TRIGGER kitrocket_write_outbox")
            except asyncpg.LockNotAvailableError as error:
                if attempt == _ATTEMPTS:
                    raise MigrationError("the table usage stayed locked, so its outbox was not switched") from error
                await anyio.sleep(_PAUSE * random.uniform(1, 10))  # noqa: S311 - jitter is no secret
            except asyncpg.UndefinedObjectError as error:
                raise ConfigurationError(
                    "usage has no trigger for the outbox; it is in the package's migrations"
                ) from error
            else:
                return True
    raise AssertionError("the last attempt returns or raises")
