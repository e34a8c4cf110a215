"""A connection that is kept out of the pool for a hot statement."""

from __future__ import annotations

import asyncio
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

    One statement at a time: the caller takes turns. The engine's command time-out holds here too, but is kept by one
    timer in all rather than one per statement, which would cost a tenth of the statement; it cuts the connection.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        self._prepared: dict[str, asyncpg.prepared_stmt.PreparedStatement[asyncpg.Record]] = {}
        self._named = True
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._busy_since: float | None = None

    async def fetch(self, sql: str, *arguments: Any) -> list[asyncpg.Record]:
        """Run a statement, prepared once per connection. Raises as :meth:`Engine.fetch`.

        When the call is cancelled, so is the statement; the next call waits for that, within the command time-out.
        """
        try:
            connection = self._connection
            if connection is None or connection.is_closed():
                connection = await self._connect()
            self._busy_since = asyncio.get_running_loop().time()
            if self._timer is None:
                self._cut_if_late()
            if not self._named:
                return await connection.fetch(sql, *arguments)
            prepared = self._prepared.get(sql)
            if prepared is None:
                prepared = self._prepared[sql] = await connection.prepare(sql)
            return await prepared.fetch(*arguments)
        except Exception as error:
            # A statement that a schema change has outdated is prepared again.
            self._prepared.clear()
            raise_ours(error)
            raise
        finally:
            self._busy_since = None

    async def aclose(self) -> None:
        """Close the connection, for good."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        connection, self._connection = self._connection, None
        self._prepared.clear()
        if connection is not None:
            with anyio.move_on_after(END_LIMIT, shield=True), suppress(asyncpg.InterfaceError, OSError):
                await connection.close()
            if not connection.is_closed():
                connection.terminate()

    async def _connect(self) -> asyncpg.Connection[asyncpg.Record]:
        self._prepared.clear()
        if self._closed:
            raise ConfigurationError("this connection was closed")
        # Behind a pooler each statement may meet another server connection, which does not know the prepared ones.
        self._named = not self._engine.pooler
        connection: asyncpg.Connection[asyncpg.Record] = await self._engine.get_new_connection(timed=False)
        self._connection = connection
        return connection

    def _cut_if_late(self) -> None:
        """Cut a connection whose statement takes too long; look again when the present one will have."""
        self._timer = None
        if self._connection is None or self._busy_since is None:
            return
        loop = asyncio.get_running_loop()
        rest = self._busy_since + self._engine.command_timeout - loop.time()
        if rest > 0:
            self._timer = loop.call_later(rest, self._cut_if_late)
        else:
            self._connection.terminate()
