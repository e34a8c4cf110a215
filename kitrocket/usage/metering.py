"""Calls that are counted while they run, and recorded however they end."""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Sequence
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import anyio

from kitrocket.clock import Clock, to_db
from kitrocket.engine import Engine
from kitrocket.errors import DatabaseUnavailableError, InvalidInputError, QuotaExceededError, TransactionError
from kitrocket.ids import new_usage_id
from kitrocket.inputs import whole_number
from kitrocket.models import Decision, Limit, SettledUsage
from kitrocket.sql import statements
from kitrocket.usage.quotas import Quotas, Reservation
from kitrocket.usage.settling import Settler
from kitrocket.usage.thresholds import Watch

#: How long a meter that is left takes to record what it counted, in seconds, whoever cancels it.
_END_LIMIT = 5.0

_SQL = statements("quotas")
_log = logging.getLogger("kitrocket.usage")
T = TypeVar("T")


class OpenMeters:
    """The meters with a reservation that run in this process, and when their reservations are to be renewed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._open: dict[str, Meter] = {}
        self._renew_at: dict[str, float] = {}
        self._opened = anyio.Event()

    def add(self, id: str, meter: Meter) -> None:
        """Renew a meter's reservation from now on."""
        self._open[id] = meter
        self._plan(id)
        self._opened.set()

    def remove(self, id: str) -> None:
        """Renew it no more."""
        self._open.pop(id, None)
        self._renew_at.pop(id, None)

    def _plan(self, id: str) -> None:
        self._renew_at[id] = anyio.current_time() + self._open[id].ttl.total_seconds() / 3

    async def renew(self, *, now: datetime) -> int:
        """Give all of them their time to live anew, with what they have counted, and return how many still had some."""
        if not self._open:
            return 0
        meters = dict(self._open)
        for id in meters:
            self._plan(id)
        rows = await self._engine.fetch(
            _SQL["renew"],
            to_db(now),
            list(meters),
            [meter.count for meter in meters.values()],
            [to_db(now + meter.ttl) for meter in meters.values()],
        )
        return len(rows)

    async def until_due(self, seconds: float) -> None:
        """Wait until a reservation is to be renewed, at most so many seconds."""
        until = anyio.current_time() + seconds
        while (left := min([until, *self._renew_at.values()]) - anyio.current_time()) > 0:
            self._opened = anyio.Event()
            with anyio.move_on_after(left):
                await self._opened.wait()


class Meter:
    """Counts a call's tokens while it runs: ``async with kit.usage.meter(...) as meter: meter.add(312)``.

    Entering reserves, where there is a limit. Leaving records the count, however the block ends; a count of zero gives
    the reservation back and records nothing. It may be entered in one task and left in another.
    """

    def __init__(
        self,
        user_id: str,
        model: str,
        *,
        id: str | None,
        tokens: int,
        limits: Sequence[Limit],
        percents: Sequence[int],
        ttl: timedelta,
        clock: Clock,
        quotas: Quotas,
        settler: Settler,
        meters: OpenMeters,
        engine: Engine,
    ) -> None:
        self.user_id = user_id
        self.model = model
        self.ttl = ttl
        #: What has been counted so far.
        self.count = 0
        #: What the reservation was granted on; ``None`` without a limit.
        self.decision: Decision | None = None
        #: What was recorded, once the block is left; ``None`` when nothing was counted.
        self.settled: SettledUsage | None = None
        self._given_id = id
        self._id = ""
        self._tokens = tokens
        self._limits = limits
        self._percents = percents
        self._clock = clock
        self._quotas = quotas
        self._settler = settler
        self._meters = meters
        self._engine = engine
        self._open = False
        self._streams: list[AsyncGenerator[Any, None]] = []

    def add(self, tokens: int) -> None:
        """Count tokens: 0 to 2^31-1, and so is the sum. Raises :class:`InvalidInputError`, also after the block."""
        self._count(whole_number("tokens", tokens) + self.count)

    def set(self, tokens: int) -> None:
        """Put the provider's final figure in the place of what was counted. Raises as :meth:`add`."""
        self._count(tokens)

    def _count(self, tokens: int) -> None:
        if not self._open:
            raise InvalidInputError("tokens", "the meter is not open, so nothing would record them", "a call inside")
        self.count = whole_number("tokens", tokens)

    def stream(self, source: AsyncIterable[T], *, tokens: Callable[[T], int]) -> AsyncGenerator[T, None]:
        """Yield what ``source`` yields and count ``tokens(item)`` of each item, before it is yielded.

        The source is closed (``aclose`` or ``close``) when it ends, when the consumer goes away, and at the latest when
        the meter is left.
        """
        stream = self._counted(source, tokens)
        self._streams.append(stream)
        return stream

    async def _counted(self, source: AsyncIterable[T], tokens: Callable[[T], int]) -> AsyncGenerator[T, None]:
        try:
            async for item in source:
                self.add(tokens(item))
                yield item
        finally:
            close = getattr(source, "aclose", None) or getattr(source, "close", None)
            if close is not None:
                with anyio.move_on_after(_END_LIMIT, shield=True):
                    answer = close()
                    if inspect.isawaitable(answer):
                        await answer

    async def __aenter__(self) -> Self:
        if self._engine.in_transaction():
            raise TransactionError("a meter must record whatever happens, so it cannot be inside a transaction")
        now = self._clock()
        self._id = self._given_id or new_usage_id(now)
        self.count, self.settled, self._streams = 0, None, []
        if self._limits:
            await self._reserve(now)
        self._open = True
        return self

    async def _reserve(self, now: datetime) -> None:
        wanted = Reservation(
            self._id, self.user_id, self.model, self._tokens, self.ttl, is_given=self._given_id is not None
        )
        try:
            self.decision = await self._quotas.reserve(wanted, self._limits, self._percents, now=now)
        except anyio.get_cancelled_exc_class():
            # It may be committed though nobody heard of it.
            await self._finish(0)
            raise
        if not self.decision.allowed:
            raise QuotaExceededError(self.decision)
        self._meters.add(self._id, self)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]:
        self._open = False
        self._meters.remove(self._id)
        try:
            await self._finish(self.count)
        except Exception:
            if error is None:
                raise
            _log.exception("usage %s of %d tokens could not be recorded", self._id, self.count)
        finally:
            for stream in self._streams:
                await stream.aclose()
        return False

    async def _finish(self, count: int) -> None:
        """Record what was counted, or give back what was reserved, whoever cancels this: both can be done twice.

        Raises :class:`DatabaseUnavailableError` when the database does not answer in time.
        """
        interrupted: BaseException | None = None
        with anyio.move_on_after(_END_LIMIT, shield=True) as limit:
            while True:
                try:
                    await self._end(count)
                    break
                except anyio.get_cancelled_exc_class() as cancelled:
                    # A task's own cancel() goes through every shield.
                    if limit.cancel_called:
                        raise
                    interrupted = cancelled
        if interrupted is not None:
            raise interrupted
        if limit.cancelled_caught:
            raise DatabaseUnavailableError(f"usage {self._id!r} of {count} tokens could not be recorded in time")

    async def _end(self, count: int) -> None:
        if count > 0:
            watch = Watch(limits=list(self._limits), percents=list(self._percents)) if self._percents else None
            call = self._settler.call(self._id, self.user_id, self.model, count, self._clock())
            reserved = self._tokens if self._limits else count
            self.settled = await self._settler.settle_call(call, reserved=reserved, watch=watch)
        elif self._limits:
            await self._settler.release(self._id)
