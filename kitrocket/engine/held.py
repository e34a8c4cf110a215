"""A connection that is kept out of the pool for a hot statement."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import asyncpg

from kitrocket.engine.transaction import END_LIMIT
from kitrocket.engine.translation import raise_ours
from kitrocket.errors import ConfigurationError

if TYPE_CHECKING:
    from kitrocket.engine.engine import Engine


class HeldConnection:
    """One connection of its own, kept for a hot statement; it reconnects after it was lost.

    One statement at a time: the caller takes turns. ``timeout``, in seconds, is kept by one timer in all, since one per
    statement would cost a tenth of it: a statement that takes between once and twice as long is cut off.
    """

    def __init__(self, engine: Engine, timeout: float) -> None:
        self._engine = engine
        self._timeout = timeout
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        #: SQL → what runs it on the present connection.
        self._runs: dict[str, Callable[..., Awaitable[list[asyncpg.Record]]]] = {}
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        #: How many statements began, and how many had when the timer last looked.
        self._begun = 0
        self._seen = 0
        self._busy = False

    async def fetch(self, sql: str, *arguments: Any) -> list[asyncpg.Record]:
        """Run a statement, prepared once per connection. Raises as :meth:`Engine.fetch`.

        When the call is cancelled, so is the statement; the next call waits for that, within the time-out.
        """
        self._begun += 1
        self._busy = True
        try:
            return await (self._runs.get(sql) or await self._prepare(sql))(*arguments)
        except Exception as error:
            # A statement that a schema change has outdated is prepared again.
            self._runs.clear()
            raise_ours(error)
            raise
        finally:
            self._busy = False

    async def aclose(self) -> None:
        """Close the connection, for good."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        connection, self._connection = self._connection, None
        self._runs.clear()
        if connection is not None:
            with anyio.move_on_after(END_LIMIT, shield=True), suppress(asyncpg.InterfaceError, OSError):
                await connection.close()
            if not connection.is_closed():
                connection.terminate()

    async def _prepare(self, sql: str) -> Callable[..., Awaitable[list[asyncpg.Record]]]:
        connection = self._connection
        if connection is None or connection.is_closed():
            if self._closed:
                raise ConfigurationError("this connection was closed")
            self._connection = connection = await self._engine.get_new_connection(timed=False)
            connection.add_termination_listener(lambda _connection: self._runs.clear())
        if self._timer is None:
            self._watch()
        if self._engine.pooler:
            # Each statement may meet another server connection, which does not know the prepared ones.
            return functools.partial(connection.fetch, sql)
        self._runs[sql] = (await connection.prepare(sql)).fetch
        return self._runs[sql]

    def _watch(self) -> None:
        """Cut the connection if its statement is the one that ran a whole time-out ago; look again after another."""
        if self._connection is None or self._connection.is_closed():
            self._timer = None
            return
        if self._busy and self._begun == self._seen:
            self._connection.terminate()
        self._seen = self._begun
        self._timer = asyncio.get_running_loop().call_later(self._timeout, self._watch)
