"""How the statement that validates a token is run: alone, or for all who wait as one.

A round trip costs more than the statement. So with :meth:`Validator.coalescing` there are two lanes, each a
connection of its own. Who finds a lane free runs alone at once. Who doesn't waits, and when a lane comes free
the first in the queue runs one statement for the queue, or for half of it when the other lane has less to do. There
is no task and no timer: under light load nothing is delayed, and the heavier the load the larger the batches.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any, Protocol, TypeVar

import anyio
import asyncpg

from kitrocket.engine import Engine, Fault, HeldConnection, fault_of
from kitrocket.errors import DatabaseUnavailableError
from kitrocket.sql import statements

T = TypeVar("T")

_SQL = statements("sessions")
_ONE, _MANY, _LOOK_UP = _SQL["validate"], _SQL["validate_many"], _SQL["look_up"]

#: How many statements are in flight before callers begin to wait for each other.
_LANES = 2
#: The most callers that one statement answers.
_BATCH = 256
#: How many callers a lane answers before it leaves some for the other.
_SHARE_MIN = 4
#: How long a caller waits for a database that is away, all in all: someone waits for a page. On the held connections a
#: statement that takes twice as long is cut off.
_DEADLINE = timedelta(seconds=5)
#: How long leaving waits for the callers that are still to be answered, in seconds.
_DRAIN_LIMIT = 5.0


class _Source(Protocol):
    async def fetch(self, sql: str, *arguments: Any) -> list[asyncpg.Record]: ...


class _Caller:
    """Someone who waits: for an answer, or for a lane, which makes it the one that runs the next batch."""

    __slots__ = ("answer", "began", "forms", "lane", "now", "woken")

    def __init__(self, forms: Sequence[str], now: datetime) -> None:
        self.forms = forms
        self.now = now
        loop = asyncio.get_running_loop()
        self.began = loop.time()
        self.woken: asyncio.Future[None] = loop.create_future()
        self.lane: HeldConnection | None = None
        self.answer: asyncpg.Record | Exception | None = None

    def wake(self) -> None:
        if not self.woken.done():
            self.woken.set_result(None)


class Validator:
    """Finds the row of a presented token, sliding its expiry when that is due."""

    def __init__(
        self, engine: Engine, *, ttl: timedelta, update_age: timedelta, max_lifetime: timedelta | None
    ) -> None:
        self._engine = engine
        self._policy = (ttl, update_age, max_lifetime)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._free: list[HeldConnection] = []
        self._waiting: deque[_Caller] = deque()
        #: How many callers the statements in flight are for.
        self._asked = 0
        self._idle = anyio.Event()

    async def find(self, forms: Sequence[str], now: datetime) -> asyncpg.Record | None:
        """Return the row of a live session, or ``None``.

        ``forms`` are what the token may be stored as, the preferred one first; ``now`` is naive UTC.
        """
        # A transaction has its own connection; another event loop cannot use this one's.
        if self._loop is not asyncio.get_running_loop() or self._engine.in_transaction():
            return await self._ask(self._engine, forms, now)
        if not self._free:
            return await self._queue(_Caller(forms, now))
        lane = self._free.pop()
        self._asked += 1
        try:
            return await self._ask(lane, forms, now)
        finally:
            self._asked -= 1
            self._pass_on(lane)

    async def look_up(self, forms: Sequence[str], now: datetime, *, node: str | None) -> asyncpg.Record | None:
        """Return the row of a live session, or ``None``; only read, perhaps on a replica."""
        ttl, _, max_lifetime = self._policy

        async def ask() -> asyncpg.Record | None:
            return await self._engine.fetchrow(_LOOK_UP, forms, now, ttl, max_lifetime, node=node)

        try:
            return await ask()
        except Exception as error:  # noqa: BLE001 - raised there, or done again
            return await self._again(error, ask)

    @asynccontextmanager
    async def coalescing(self) -> AsyncIterator[None]:
        """Coalesce the calls of this event loop inside the block. It may be left from another task."""
        if self._loop is not None:
            yield
            return
        lanes = [self._engine.hold(timeout=_DEADLINE) for _ in range(_LANES)]
        self._loop, self._free, self._idle = asyncio.get_running_loop(), list(lanes), anyio.Event()
        try:
            yield
        finally:
            self._loop = None
            if len(self._free) == _LANES:
                self._idle.set()
            with anyio.move_on_after(_DRAIN_LIMIT, shield=True):
                await self._idle.wait()
            self._free = []
            for lane in lanes:
                await lane.aclose()

    async def _ask(
        self, source: _Source, forms: Sequence[str], now: datetime, began: float | None = None
    ) -> asyncpg.Record | None:
        if len(forms) > 1:
            return _first(await self._ask_many(source, [(form, now) for form in forms], began), forms, now)
        try:
            rows = await source.fetch(_ONE, forms[0], now, *self._policy)
        except Exception as error:  # noqa: BLE001 - raised there, or done again
            rows = await self._again(error, lambda: source.fetch(_ONE, forms[0], now, *self._policy), began)
        return rows[0] if rows else None

    async def _ask_many(
        self, source: _Source, asked: Sequence[tuple[str, datetime]], began: float | None = None
    ) -> dict[tuple[str, datetime], asyncpg.Record]:
        unique = list(dict.fromkeys(asked))
        forms, instants = [form for form, _ in unique], [instant for _, instant in unique]
        try:
            rows = await source.fetch(_MANY, forms, instants, *self._policy)
        except Exception as error:  # noqa: BLE001 - raised there, or done again
            rows = await self._again(error, lambda: source.fetch(_MANY, forms, instants, *self._policy), began)
        return {(row["asked_token"], row["asked_instant"]): row for row in rows}

    async def _again(self, error: Exception, unit: Callable[[], Awaitable[T]], began: float | None = None) -> T:
        """Run again what failed, if that can help, until the deadline of who ``began`` to wait then."""
        if fault_of(error) is Fault.NEVER or self._engine.in_transaction():
            raise error
        waited = 0.0 if began is None else anyio.current_time() - began
        left = _DEADLINE.total_seconds() - waited
        if left <= 0:
            raise error
        try:
            with anyio.fail_after(left):
                # Sliding twice to the same instant is sliding once, so an unknown outcome may be tried again.
                return await self._engine.retry(unit, idempotent=True, deadline=timedelta(seconds=left))
        except TimeoutError:
            raise DatabaseUnavailableError(f"PostgreSQL did not answer within {left:.1f} s") from error

    async def _queue(self, caller: _Caller) -> asyncpg.Record | None:
        self._waiting.append(caller)
        try:
            await caller.woken
            if caller.lane is not None:
                await self._lead(caller.lane, caller)
        finally:
            if caller.lane is not None:
                # Those whom the batch answered may ask again at once: they run first, and go together.
                asyncio.get_running_loop().call_soon(self._pass_on, caller.lane)
        if isinstance(caller.answer, Exception):
            raise caller.answer
        return caller.answer

    async def _lead(self, lane: HeldConnection, leader: _Caller) -> None:
        """Run one statement for ``leader`` and for those who wait: this lane's share of all who want an answer.

        Without the share one lane answers a crowd each time, and the other the same caller again and again.
        """
        batch = [leader]
        share = min(_BATCH, max(_SHARE_MIN, (1 + len(self._waiting) + self._asked) // _LANES))
        while self._waiting and len(batch) < share:
            caller = self._waiting.popleft()
            if not caller.woken.done():
                batch.append(caller)
        self._asked += len(batch)
        try:
            await self._answer(lane, batch)
        except BaseException:
            # The leader was cancelled; the others were not, and the next of them leads.
            self._waiting.extendleft(reversed(batch[1:]))
            raise
        finally:
            self._asked -= len(batch)

    async def _answer(self, lane: HeldConnection, batch: list[_Caller]) -> None:
        try:
            if len(batch) == 1:
                batch[0].answer = await self._ask(lane, batch[0].forms, batch[0].now, batch[0].began)
            else:
                asked = [(form, caller.now) for caller in batch for form in caller.forms]
                found = await self._ask_many(lane, asked, batch[0].began)
                for caller in batch:
                    caller.answer = _first(found, caller.forms, caller.now)
        except Exception as error:  # noqa: BLE001 - it is raised in each caller
            for caller in batch:
                caller.answer = error
        for caller in batch[1:]:
            caller.wake()

    def _pass_on(self, lane: HeldConnection) -> None:
        """Give a lane to the first who waits, who then runs a batch with it."""
        while self._waiting:
            caller = self._waiting.popleft()
            if not caller.woken.done():
                caller.lane = lane
                caller.wake()
                return
        self._free.append(lane)
        if self._loop is None and len(self._free) == _LANES:
            self._idle.set()


def _first(
    found: dict[tuple[str, datetime], asyncpg.Record], forms: Sequence[str], now: datetime
) -> asyncpg.Record | None:
    return next((found[form, now] for form in forms if (form, now) in found), None)
