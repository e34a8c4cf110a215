"""How a reservation ends: settled as a call, released, or expired."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

import asyncpg

from kitrocket.clock import from_db, to_db
from kitrocket.engine import Engine
from kitrocket.errors import ReservationNotFoundError
from kitrocket.models import SettledUsage
from kitrocket.sql import statements
from kitrocket.tables import UsageReservations
from kitrocket.usage.calls import LATE_AFTER, Call
from kitrocket.usage.limits import quotas
from kitrocket.usage.quotas import Quotas
from kitrocket.usage.sums import Sums
from kitrocket.usage.thresholds import Thresholds, Watch
from kitrocket.usage.writing import Writer

#: What stands behind a call's id in the id of the row that adds what came after its reservation had expired.
LATE = ".late"
#: How long an expired reservation with nothing used is remembered, so that its call can still be settled.
_GRACE = timedelta(days=1)
#: How many expired reservations a transaction takes.
_BATCH = 500

_SQL = statements("quotas")
_USAGE = statements("usage")

#: Writes a call and returns, once it is committed, the row that was there already, if any.
Record = Callable[[Call], Awaitable[asyncpg.Record | None]]


class Settler:
    """Ends reservations. The primary key of ``usage`` lets each become one row, whoever is first."""

    def __init__(
        self,
        engine: Engine,
        record: Record,
        *,
        writer: Writer,
        sums: Sums,
        quotas: Quotas,
        thresholds: Thresholds,
    ) -> None:
        self._engine = engine
        self._record = record
        self._writer = writer
        self._sums = sums
        self._quotas = quotas
        self._thresholds = thresholds

    async def settle(self, id: str, used: int, *, now: datetime) -> SettledUsage:
        """Record what a reserved call used. Raises :class:`ReservationNotFoundError` and as recording does."""
        row = await self._fetchrow(_SQL["reservation"], id) or await self._fetchrow(_USAGE["recorded"], [id])
        if row is None:
            raise ReservationNotFoundError(id)
        reserved, watch = used, None
        if "thresholds" in row.keys():  # noqa: SIM118 - a record, which is asked for values otherwise
            reserved = row["tokens"]
            watch = None if row["thresholds"] is None else Watch.model_validate_json(row["thresholds"])
        return await self.settle_call(
            self.call(id, row["user_id"], row["model"], used, now), reserved=reserved, watch=watch
        )

    @staticmethod
    def call(id: str, user_id: str, model: str, used: int, now: datetime) -> Call:
        """Return a reserved call as it is to be written."""
        return Call(id, user_id, used, model, now, is_given=True, is_late=False, settles=True)

    async def settle_call(self, call: Call, *, reserved: int, watch: Watch | None) -> SettledUsage:
        """Record a reserved call; where its reservation had expired and became a row, add the rest."""
        there = await self._record(call)
        duplicate = there is not None
        if there is not None and call.tokens > there["tokens_used"]:
            rest = call._replace(id=call.id + LATE, tokens=call.tokens - there["tokens_used"], settles=False)
            duplicate = await self._record(rest) is not None
        return SettledUsage(
            id=call.id,
            user_id=call.user_id,
            tokens=call.tokens if there is None else max(call.tokens, there["tokens_used"]),
            model=call.model,
            at=call.at if there is None else from_db(there["created_at"]),
            duplicate=duplicate,
            overrun=max(0, call.tokens - reserved),
            crossed=[] if watch is None else await self._look(call.user_id, watch, call.at),
        )

    async def _look(self, user_id: str, watch: Watch, now: datetime) -> list[int]:
        """Tell which thresholds were crossed; not inside a transaction, which may roll back: the next call will."""
        if self._engine.in_transaction():
            return []
        asked = await quotas(self._sums, user_id, watch.limits, now)
        seen = await self._thresholds.seen(user_id, asked)
        used = [tokens for tokens, _ in await self._quotas.used(user_id, asked)]
        alerts = await self._thresholds.note(user_id, asked, used, watch.percents, seen=seen, now=now)
        return await self._thresholds.tell(alerts)

    async def release(self, id: str) -> bool:
        """Give reserved tokens back, and return whether there were any."""
        query = UsageReservations.delete().where(UsageReservations.id == id).returning(UsageReservations.id)
        return bool(await self._engine.retry(lambda: self._engine.run(query), idempotent=True))

    async def expire(self, *, now: datetime) -> tuple[int, int]:
        """Turn expired reservations into calls of what they had used, and return how many, and how many were deleted
        because that was nothing.
        """
        recorded, some = 0, _BATCH
        while some == _BATCH:
            some = await self._engine.retry(lambda: self._expire_some(now), idempotent=True)
            recorded += some
        deleted, some = 0, _BATCH
        while some == _BATCH:
            some = await self._engine.fetchval(_SQL["sweep"], to_db(now - _GRACE), _BATCH)
            deleted += some
        return recorded, deleted

    async def _expire_some(self, now: datetime) -> int:
        async with self._engine.transaction(read_committed=True):
            rows = await self._engine.fetch(_SQL["expired"], to_db(now), _BATCH)
            calls = [
                # Dated when it expired, but never so early that the day may have been pruned meanwhile.
                self.call(
                    row["id"],
                    row["user_id"],
                    row["model"],
                    row["used"],
                    max(from_db(row["expires_at"]), now - LATE_AFTER),
                )
                for row in sorted(rows, key=lambda row: str(row["id"]))
            ]
            if calls:
                await self._writer.insert(self._engine, calls)
                await self._engine.fetch(_SQL["forget"], [call.id for call in calls])
        return len(calls)

    async def _fetchrow(self, sql: str, *arguments: object) -> asyncpg.Record | None:
        return await self._engine.retry(lambda: self._engine.fetchrow(sql, *arguments), idempotent=True)
