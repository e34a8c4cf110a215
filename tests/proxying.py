"""A way to PostgreSQL that a test can cut and mend."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import parse_qs, urlsplit

import anyio
import anyio.abc

from servers import Server


class Proxy:
    """A way to PostgreSQL that can be cut and mended."""

    def __init__(self, server: Server) -> None:
        parts = urlsplit(server.url("postgres"))
        query = parse_qs(parts.query)
        self._host = query.get("host", [parts.hostname or "localhost"])[0]
        self._target = int(query.get("port", [str(parts.port or 5432)])[0])
        self._user = query.get("user", [parts.username or "postgres"])[0]
        self._password = f":{parts.password}" if parts.password else ""
        self._streams: list[anyio.abc.AnyByteStream] = []
        self.is_cut = False
        #: How many connections it refused.
        self.refused = 0
        self.port = 0

    def url(self, database: str) -> str:
        return f"postgres://{self._user}{self._password}@127.0.0.1:{self.port}/{database}?sslmode=disable"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        self.port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with listener, anyio.create_task_group() as group:
            group.start_soon(listener.serve, self._handle)
            yield
            group.cancel_scope.cancel()

    async def cut(self) -> None:
        self.is_cut = True
        for stream in self._streams:
            await anyio.aclose_forcefully(stream)

    async def _handle(self, client: anyio.abc.SocketStream) -> None:
        async with client:
            if self.is_cut:
                self.refused += 1
                return
            server = await self._connect()
            self._streams += [client, server]
            async with server, anyio.create_task_group() as group:
                group.start_soon(self._pump, client, server, group.cancel_scope)
                group.start_soon(self._pump, server, client, group.cancel_scope)

    async def _connect(self) -> anyio.abc.SocketStream:
        if self._host.startswith("/"):
            return await anyio.connect_unix(f"{self._host}/.s.PGSQL.{self._target}")
        return await anyio.connect_tcp(self._host, self._target)

    async def _pump(
        self, source: anyio.abc.SocketStream, target: anyio.abc.SocketStream, scope: anyio.CancelScope
    ) -> None:
        try:
            async for part in source:
                await target.send(part)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
            pass
        scope.cancel()
