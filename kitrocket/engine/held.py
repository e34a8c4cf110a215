"""A connection that is kept out of the pool for a hot statement."""

from __future__ import annotations

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

    One statement at a time: the caller takes turns.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        self._prepared: dict[str, asyncpg.prepared_stmt.PreparedStatement[asyncpg.Record]] = {}
        self._closed = False

    async def fetch(self, sql: str, *arguments: Any) -> list[asyncpg.Record]:
        """Run a statement, prepared once per connection. Raises as :meth:`Engine.fetch`.

        When the call is cancelled, so is the statement; the next call waits for that, within the command time-out.
        """
        try:
            connection = self._connection
            if connection is None or connection.is_closed():
                connection = await self._connect()
            if self._engine.pooler:
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

    async def aclose(self) -> None:
        """Close the connection, for good."""
        self._closed = True
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
        connection: asyncpg.Connection[asyncpg.Record] = await self._engine.get_new_connection()
        self._connection = connection
        return connection
