"""How many callers share a commit.

In a running kit, calls go into a bounded queue that two flushers empty. A flusher takes what waits and writes it as one
statement, which is one transaction; batches form while a flush runs, so that a lone caller waits for nobody. A caller
is answered after the commit, and waits while the queue is full: memory stays bounded when PostgreSQL stalls.

The queue is a deque and a future, not a stream of anyio's: that costs a lone caller a third of its statement.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import Any, TypeAlias

import anyio
import asyncpg

from kitrocket.engine import Engine, Fault, HeldConnection, fault_of
from kitrocket.errors import DatabaseUnavailableError, InvalidInputError, RecorderClosedError, UsageConflictError
from kitrocket.usage.calls import Call
from kitrocket.usage.watching import Live
from kitrocket.usage.writing import Writer

#: How many flushers there are: one writes while the other gathers.
_FLUSHERS = 2
#: The most rows that one statement writes.
_BATCH = 500
#: The smallest batch whose callers are answered in two halves: two statements cost more than one.
_SPLIT_FROM = 24
#: How long leaving waits for what is in the queue, in seconds.
_DRAIN_LIMIT = 5.0

#: Runs a coroutine in a task of its own until the block is left.
Owner: TypeAlias = Callable[[Callable[[], Coroutine[Any, Any, None]]], AbstractAsyncContextManager[None]]


class _Waiting:
    """A call and the caller who waits for it. A caller who was cancelled is no longer waiting."""

    __slots__ = ("answer", "call", "in_flight", "since")

    def __init__(self, call: Call, loop: asyncio.AbstractEventLoop) -> None:
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

    def __init__(self, engine: Engine, writer: Writer, live: Live, *, queue_size: int, linger: timedelta) -> None:
        self._engine = engine
        self._writer = writer
        self._live = live
        self._queue_size = queue_size
        self._linger = linger.total_seconds()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        #: What no flusher has taken yet, and the places that are free there.
        self._queue: deque[_Waiting] = deque()
        self._places = anyio.Semaphore(queue_size)
        #: The flushers that have nothing to do. The last one is woken first: its connection is warm.
        self._idle: list[asyncio.Future[None]] = []
        #: Everyone who waits, in the queue, before it or in a flush.
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
        waiting = _Waiting(call, asyncio.get_running_loop())
        self._outstanding.add(waiting)
        try:
            try:
                self._places.acquire_nowait()
            except anyio.WouldBlock:
                await self._places.acquire()
            self._queue.append(waiting)
            self._wake()
            return await waiting.answer
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
        self._queue, self._places, self._idle = deque(), anyio.Semaphore(self._queue_size), []
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
        for waiting in self._outstanding:
            waiting.fail(
                DatabaseUnavailableError(
                    "the kit was left before PostgreSQL answered; whether the call counts is unknown"
                )
                if waiting.in_flight
                else RecorderClosedError()
            )
        self._queue.clear()
        for _ in range(self._places.statistics().tasks_waiting):
            self._places.release()

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
                left = taken = await self._take()
                while left:
                    batch, left = _distinct(left)
                    if batch:
                        await self._write(lane, batch)
                await self._live.announce(lane, (waiting.call.user_id for waiting in taken))
        finally:
            await lane.aclose()

    def _wake(self) -> None:
        """Let a flusher look at the queue, if one has nothing to do."""
        while self._idle:
            woken = self._idle.pop()
            if not woken.done():
                woken.set_result(None)
                return

    async def _woken(self) -> None:
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._idle.append(woken)
        try:
            await woken
        finally:
            if woken in self._idle:
                self._idle.remove(woken)

    async def _take(self) -> list[_Waiting]:
        """Wait for a call, and return it with what waits behind it and what comes within the linger."""
        taken: list[_Waiting] = []
        while not taken:
            if not self._queue:
                await self._woken()
            self._gather(taken)
        if self._linger:
            with anyio.CancelScope(deadline=taken[0].since + self._linger):
                while len(taken) < _BATCH:
                    await self._woken()
                    self._gather(taken)
        return taken

    def _gather(self, taken: list[_Waiting]) -> None:
        """Add to a batch what waits, and leave the rest to the other flusher."""
        while self._queue and len(taken) < _BATCH:
            waiting = self._queue.popleft()
            self._places.release()
            if not waiting.answer.done():
                taken.append(waiting)
        if self._queue:
            self._wake()

    async def _write(self, lane: HeldConnection, batch: Sequence[_Waiting]) -> None:
        """Write a batch and answer everyone in it."""
        for waiting in batch:
            waiting.in_flight = True
        calls = [waiting.call for waiting in batch]
        # As few steps as can be: a lone caller waits for each of them.
        try:
            there = await self._writer.flush(lane, calls)
        except Exception as error:  # noqa: BLE001 - it is raised in each caller
            await self._write_again(lane, batch, error)
        else:
            if len(batch) >= _SPLIT_FROM and self._idle:
                await self._answer_in_halves(batch, there)
            else:
                _answer(batch, there)

    async def _write_again(self, lane: HeldConnection, batch: Sequence[_Waiting], error: Exception) -> None:
        """Write calls again when their outcome is unknown or they were rolled back for certain.

        Where a row cannot be stored, the batch is halved until that row is alone with its error.
        """
        calls = [waiting.call for waiting in batch]
        if fault_of(error) is not Fault.NEVER:
            try:
                there = await self._engine.retry(lambda: self._writer.flush(lane, calls), idempotent=True)
            except Exception as another:  # noqa: BLE001 - as above
                error = another
            else:
                _answer(batch, there)
                return
        if len(batch) > 1 and _is_poison(error):
            middle = (len(batch) + 1) // 2
            await self._write(lane, batch[:middle])
            await self._write(lane, batch[middle:])
            return
        for waiting in batch:
            waiting.fail(error)

    async def _answer_in_halves(self, batch: Sequence[_Waiting], there: Mapping[str, asyncpg.Record]) -> None:
        """Answer half of a crowd, and the others once those have run.

        What the first half records next is then written while the second is answered: without that a crowd that
        records again and again keeps Python and PostgreSQL waiting for each other.
        """
        middle = len(batch) // 2
        try:
            _answer(batch[:middle], there)
            await asyncio.sleep(0)
        finally:
            _answer(batch[middle:], there)


def _answer(batch: Sequence[_Waiting], there: Mapping[str, asyncpg.Record]) -> None:
    for waiting in batch:
        waiting.settle(there.get(waiting.call.id))


def _distinct(left: Sequence[_Waiting]) -> tuple[list[_Waiting], list[_Waiting]]:
    """Part those who still wait into some whose ids differ, in their order, and those who come after them.

    Of calls with one id the second one meets the row of the first.
    """
    batch: dict[str, _Waiting] = {}
    rest = [
        waiting
        for waiting in left
        if not waiting.answer.done() and batch.setdefault(waiting.call.id, waiting) is not waiting
    ]
    return [batch[id] for id in sorted(batch)], rest


def _is_poison(error: BaseException) -> bool:
    """Whether a row is to blame, so that the others can be written without it."""
    driver = error if isinstance(error, asyncpg.PostgresError) else error.__cause__
    if isinstance(driver, asyncpg.PostgresError):
        return (driver.sqlstate or "")[:2] in ("22", "23")
    return isinstance(error, InvalidInputError)
