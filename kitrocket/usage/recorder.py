"""How many callers share a commit.

In a running kit, calls go into a bounded stream from which two flushers read. A flusher takes what waits and writes it
as one statement, which is one transaction; batches form while a flush runs, so that a lone caller waits for nobody.
A caller is answered after the commit, and waits while the stream is full: memory stays bounded when PostgreSQL stalls.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import Any, TypeAlias

import anyio
import asyncpg
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from kitrocket.engine import Engine, HeldConnection
from kitrocket.errors import DatabaseUnavailableError, InvalidInputError, RecorderClosedError, UsageConflictError
from kitrocket.usage.calls import Call
from kitrocket.usage.writing import Writer

#: How many flushers there are: one writes while the other gathers.
_FLUSHERS = 2
#: The most rows that one statement writes.
_BATCH = 500
#: How long leaving waits for what is in the stream, in seconds.
_DRAIN_LIMIT = 5.0

#: Runs a coroutine in a task of its own until the block is left.
Owner: TypeAlias = Callable[[Callable[[], Coroutine[Any, Any, None]]], AbstractAsyncContextManager[None]]


class _Waiting:
    """A call and the caller who waits for it. A caller who was cancelled is no longer waiting."""

    __slots__ = ("answer", "call", "in_flight", "since")

    def __init__(self, call: Call) -> None:
        loop = asyncio.get_running_loop()
        self.call = call
        self.answer: asyncio.Future[asyncpg.Record | None] = loop.create_future()
        self.since = loop.time()
        self.in_flight = False

    def settle(self, row: asyncpg.Record | None) -> None:
        """Answer with the row that was there already, or with none."""
        if row is not None and not self.call.is_recorded_as(row):
            self.fail(UsageConflictError(self.call.id))
        elif not self.answer.done():
            self.answer.set_result(row)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Recorder:
    """Group commit: open within :meth:`open`, closed for good behind it until it is opened again."""

    def __init__(self, engine: Engine, writer: Writer, *, queue_size: int, linger: timedelta) -> None:
        self._engine = engine
        self._writer = writer
        self._queue_size = queue_size
        self._linger = linger.total_seconds()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._send: MemoryObjectSendStream[_Waiting]
        self._receive: MemoryObjectReceiveStream[_Waiting]
        #: Everyone who waits, in the stream, before it or in a flush.
        self._outstanding: set[_Waiting] = set()
        self._drained = anyio.Event()

    def takes(self) -> bool:
        """Whether calls of the running task go through here; raise :class:`RecorderClosedError` when they did once."""
        if self._closed:
            raise RecorderClosedError
        # A transaction has its own connection; another event loop cannot use this one's.
        return self._loop is asyncio.get_running_loop() and not self._engine.in_transaction()

    async def record(self, call: Call) -> asyncpg.Record | None:
        """Write a call together with others, and return after the commit the row that was there already, if any.

        A caller who is cancelled before a flush took the call has recorded nothing; in a flush it may be recorded.
        """
        waiting = _Waiting(call)
        self._outstanding.add(waiting)
        try:
            try:
                self._send.send_nowait(waiting)
            except anyio.WouldBlock:
                await self._send.send(waiting)
            return await waiting.answer
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise RecorderClosedError from error
        finally:
            waiting.answer.cancel()
            self._outstanding.discard(waiting)
            if self._closed and not self._outstanding:
                self._drained.set()

    @asynccontextmanager
    async def open(self, owned: Owner) -> AsyncIterator[None]:
        """Take the calls of this event loop inside the block; leaving it writes what waits, for at most 5 s."""
        if self._loop is not None:
            yield
            return
        self._send, self._receive = anyio.create_memory_object_stream[_Waiting](self._queue_size)
        self._loop, self._closed, self._drained = asyncio.get_running_loop(), False, anyio.Event()
        async with owned(self._run):
            try:
                yield
            finally:
                self._loop, self._closed = None, True
                if self._outstanding:
                    with anyio.move_on_after(_DRAIN_LIMIT, shield=True):
                        await self._drained.wait()
                self._give_up()

    def _give_up(self) -> None:
        """Answer everyone who still waits."""
        self._loop, self._closed = None, True
        for waiting in list(self._outstanding):
            waiting.fail(
                DatabaseUnavailableError(
                    "the kit was left before PostgreSQL answered; whether the call counts is unknown"
                )
                if waiting.in_flight
                else RecorderClosedError()
            )
        self._receive.close()
        self._send.close()

    async def _run(self) -> None:
        """Flush until cancelled."""
        try:
            async with anyio.create_task_group() as group:
                for _ in range(_FLUSHERS):
                    group.start_soon(self._flush_all)
        finally:
            self._give_up()

    async def _flush_all(self) -> None:
        lane = self._engine.hold()
        try:
            while True:
                await self._flush(lane, await self._take())
        except (anyio.EndOfStream, anyio.ClosedResourceError):
            return
        finally:
            await lane.aclose()

    async def _take(self) -> list[_Waiting]:
        """Wait for a call, and return it with what waits behind it and what comes within the linger."""
        taken = [await self._receive.receive()]
        until = taken[0].since + self._linger
        while len(taken) < _BATCH:
            try:
                taken.append(self._receive.receive_nowait())
            except anyio.WouldBlock:
                if anyio.current_time() >= until:
                    break
                with anyio.CancelScope(deadline=until):
                    taken.append(await self._receive.receive())
        return taken

    async def _flush(self, lane: HeldConnection, taken: Sequence[_Waiting]) -> None:
        """Write what is still wanted. Of calls with one id the second one meets the row of the first."""
        while taken:
            batch: dict[str, _Waiting] = {}
            wanted = [waiting for waiting in taken if not waiting.answer.done()]
            again = [waiting for waiting in wanted if batch.setdefault(waiting.call.id, waiting) is not waiting]
            if batch:
                await self._write(lane, [batch[id] for id in sorted(batch)])
            taken = again

    async def _write(self, lane: HeldConnection, batch: Sequence[_Waiting]) -> None:
        """Write a batch; where a row in it cannot be stored, halve it until that row is alone with its error."""
        for waiting in batch:
            waiting.in_flight = True
        calls = [waiting.call for waiting in batch]
        try:
            there = await self._engine.retry(lambda: self._writer.flush(lane, calls), idempotent=True)
        except Exception as error:  # noqa: BLE001 - it is raised in each caller
            if len(batch) > 1 and _is_poison(error):
                middle = (len(batch) + 1) // 2
                await self._write(lane, batch[:middle])
                await self._write(lane, batch[middle:])
                return
            for waiting in batch:
                waiting.fail(error)
        else:
            for waiting in batch:
                waiting.settle(there.get(waiting.call.id))


def _is_poison(error: BaseException) -> bool:
    """Whether a row is to blame, so that the others can be written without it."""
    driver = error if isinstance(error, asyncpg.PostgresError) else error.__cause__
    if isinstance(driver, asyncpg.PostgresError):
        return (driver.sqlstate or "")[:2] in ("22", "23")
    return isinstance(error, InvalidInputError)
