"""Totals as they change: who records says so with one NOTIFY a flush, and who watches reads again.

One connection listens for all watchers of a service. There is no task: asyncpg calls back when something is heard or
the connection is lost, and the watchers themselves connect again. On each connection LISTEN comes first and the reading
after it, so nothing falls between; and what is never heard is read sooner or later all the same.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Self

import anyio
import asyncpg

from kitrocket.engine import Engine
from kitrocket.errors import ConfigurationError, DatabaseError, TransactionError
from kitrocket.sql import statements
from kitrocket.usage.writing import Source

CHANNEL = "kitrocket_usage"
#: A payload is shorter than this, in bytes; PostgreSQL says so.
_PAYLOAD_LIMIT = 8_000
#: How often a watcher reads though it heard nothing, with a connection that listens and without one, in seconds.
_EVERY, _EVERY_UNHEARD = 10.0, 1.0
#: The shortest time between two readings of a watcher, in seconds: a busy user is not read at every flush.
_SPACING = 0.1
#: How long closing the connection may take, in seconds.
_CLOSE_LIMIT = 5.0
_FAULTS = (DatabaseError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError)

_SQL = statements("usage")
_log = logging.getLogger("kitrocket.usage")


class _Seat:
    """A watcher's place: whose total it watches, and whether something was heard."""

    __slots__ = ("heard", "is_over", "user_id")

    def __init__(self, user_id: str) -> None:
        self.user_id = user_id
        self.heard = anyio.Event()
        self.is_over = False


class Live:
    """Tells watchers of other processes and of this one, if it is on, and lets them listen."""

    def __init__(self, engine: Engine, *, is_on: bool) -> None:
        self._engine = engine
        self._is_on = is_on
        #: False once the engine said that no direct connection is to be had.
        self._is_possible = is_on
        self._seats: set[_Seat] = set()
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        self._connecting = anyio.Lock()

    async def announce(self, source: Source, user_ids: Iterable[str]) -> None:
        """Say that these users' totals changed; in a transaction, once it is committed.

        Outside of one a failure is logged and no more: what was recorded is recorded.
        """
        if not self._is_on:
            return
        try:
            await source.fetch(_SQL["announce"], CHANNEL, _payload(user_ids))
        except _FAULTS as error:
            if self._engine.in_transaction():
                raise
            _log.warning("watchers were not told of new usage: %s", type(error).__name__)

    def seat(self, user_id: str) -> _Seat:
        """Return a place for a watcher of this user. It is given back to :meth:`leave`, or :meth:`aleave`."""
        seat = _Seat(user_id)
        self._seats.add(seat)
        return seat

    def leave(self, seat: _Seat) -> None:
        """Take a place back; the last one cuts the connection."""
        seat.is_over = True
        self._seats.discard(seat)
        if not self._seats and self._connection is not None:
            connection, self._connection = self._connection, None
            connection.terminate()

    async def aleave(self, seat: _Seat) -> None:
        """Take a place back; the last one closes the connection."""
        seat.is_over = True
        self._seats.discard(seat)
        if not self._seats:
            await self._close()

    async def listen(self) -> bool:
        """Listen, if that is possible, and say whether it is."""
        if not self._is_possible:
            return False
        async with self._connecting:
            if self._connection is not None and not self._connection.is_closed():
                return True
            try:
                connection = await self._engine.connect_direct()
            except ConfigurationError:
                self._is_possible = False
                return False
            except _FAULTS:
                return False
            self._connection = connection
            connection.add_termination_listener(self._lost)
            try:
                await connection.add_listener(CHANNEL, self._heard)
            except _FAULTS:
                return False
            finally:
                if not self._seats:
                    await self._close()
        for seat in self._seats:
            seat.heard.set()
        return True

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """End what is watched when the block is left."""
        try:
            yield
        finally:
            for seat in self._seats:
                seat.is_over = True
                seat.heard.set()
            self._seats.clear()
            await self._close()

    async def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with anyio.move_on_after(_CLOSE_LIMIT, shield=True), suppress(*_FAULTS):
                await connection.close()
            connection.terminate()

    def _lost(self, connection: object) -> None:
        if connection is self._connection:
            self._connection = None
            for seat in self._seats:
                seat.heard.set()

    def _heard(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        users = None if payload == "*" else set(json.loads(str(payload)))
        for seat in self._seats:
            if users is None or seat.user_id in users:
                seat.heard.set()


class Watch:
    """A user's total, again and again: ``async for total in kit.usage.watch(user_id)``.

    It gives the newest total at once and then whenever it has become another one; who is slow misses those between. It
    ends when the kit is left, and when a wait for the next value is cancelled. Leaving the loop leaves no connection
    and no task behind; ``async with`` and :meth:`aclose` do so at a certain point.
    """

    def __init__(self, live: Live, engine: Engine, user_id: str, read: Callable[[], Awaitable[int]]) -> None:
        self._live = live
        self._engine = engine
        self._read = read
        self._user_id = user_id
        self._seat: _Seat | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._total: int | None = None
        self._read_at = 0.0
        self._is_closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        if self._is_closed:
            raise StopAsyncIteration
        if self._engine.in_transaction():
            raise TransactionError("a transaction does not see what others commit; watch outside of it")
        if self._seat is None:
            self._seat, self._loop = self._live.seat(self._user_id), asyncio.get_running_loop()
        seat = self._seat
        try:
            while not seat.is_over:
                is_listening = await self._live.listen()
                if self._total is not None and not seat.heard.is_set():
                    await self._wait(seat, _EVERY if is_listening else _EVERY_UNHEARD)
                    # The connection may have been lost.
                    await self._live.listen()
                total = await self._read_anew(seat)
                if total is not None and total != self._total:
                    self._total = total
                    return total
        except BaseException:
            await self.aclose()
            raise
        await self.aclose()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End it. A second time does nothing."""
        self._is_closed = True
        seat, self._seat = self._seat, None
        if seat is not None:
            await self._live.aleave(seat)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # Whoever breaks out of the loop drops it, in whatever thread the collector runs.
        seat, loop = getattr(self, "_seat", None), getattr(self, "_loop", None)
        if seat is not None and loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._live.leave, seat)

    async def _wait(self, seat: _Seat, seconds: float) -> None:
        with anyio.move_on_after(self._read_at + seconds - anyio.current_time()):
            await seat.heard.wait()

    async def _read_anew(self, seat: _Seat) -> int | None:
        """Read the total; ``None`` when it could not be read because it is over."""
        if self._total is not None:
            await anyio.sleep(max(0.0, self._read_at + _SPACING - anyio.current_time()))
        # Before the reading: what is heard during it is read again.
        seat.heard = anyio.Event()
        self._read_at = anyio.current_time()
        try:
            return await self._read()
        except Exception:
            if seat.is_over:
                return None
            raise


def _payload(user_ids: Iterable[str]) -> str:
    payload = json.dumps(sorted(set(user_ids)), ensure_ascii=False, separators=(",", ":"))
    return payload if len(payload.encode()) < _PAYLOAD_LIMIT else "*"
