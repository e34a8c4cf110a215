"""How sums are read: whole UTC days from the rollup where there is one, the rest from single rows."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta

import asyncpg

from kitrocket.clock import from_db, to_db
from kitrocket.engine import Engine
from kitrocket.errors import NoBillingPeriodError, WindowNotExactError
from kitrocket.models import Period
from kitrocket.sql import statements
from kitrocket.windows import Window

_SQL = statements("usage")
_ROLLUP = statements("rollup")
_DAY = timedelta(days=1)


class Sums:
    """Reads sums. Without ``rollup``, as on Citus, from single rows alone, with the same answers.

    Raises :class:`WindowNotExactError` for a window that cuts into days whose single rows were pruned.
    """

    def __init__(self, engine: Engine, *, rollup: bool) -> None:
        self._engine = engine
        self._rollup = rollup

    async def total(self, user_id: str, window: Window, model: str | None) -> int:
        """Return a user's tokens in a window, of one model or of all."""
        if not self._rollup:
            [row] = await self._fetch("total", user_id, *bounds(window), model)
            return int(row["tokens"])
        [row] = await self._fetch("total_rolled", user_id, *bounds(window), model)
        refuse_cut_days(window, row["raw_from"])
        return int(row["tokens"])

    async def by_time(
        self, user_id: str, window: Window, starts: Sequence[datetime], *, in_utc_days: bool
    ) -> list[asyncpg.Record]:
        """Return a row for each bucket with a call; ``in_utc_days`` says that buckets begin at UTC midnights."""
        arguments = (user_id, *bounds(window), [to_db(start) for start in starts])
        if self._rollup and in_utc_days:
            return await self._rolled("by_time_rolled", window, "bucket", *arguments)
        rows = await self._fetch("by_time", *arguments)
        if self._rollup:
            # Pruning moves the floor before it deletes, so what is above it now was all there.
            state = await self._engine.fetchrow(_ROLLUP["state"])
            refuse_before(window, date.min if state is None else state["raw_from"])
        return rows

    async def by_model(self, user_id: str, window: Window) -> list[asyncpg.Record]:
        """Return a row for each model, the largest sum first."""
        if self._rollup:
            return await self._rolled("by_model_rolled", window, "model", user_id, *bounds(window))
        return await self._fetch("by_model", user_id, *bounds(window))

    async def top_users(self, window: Window, limit: int) -> list[asyncpg.Record]:
        """Return a row for each of the users with the largest sums."""
        if self._rollup:
            return await self._rolled("top_users_rolled", window, "user_id", *bounds(window), limit)
        return await self._fetch("top_users", *bounds(window), limit)

    async def billing_period(self, user_id: str) -> Period:
        """Return the billing period of a user's live subscription, or raise :class:`NoBillingPeriodError`."""
        rows = await self._fetch("billing_period", user_id)
        if not rows:
            raise NoBillingPeriodError(user_id)
        return Period(since=from_db(rows[0]["since"]), until=from_db(rows[0]["until"]), source=rows[0]["source"])

    async def _rolled(self, name: str, window: Window, key: str, *arguments: object) -> list[asyncpg.Record]:
        rows = await self._fetch(name, *arguments)
        refuse_cut_days(window, rows[0]["raw_from"])
        return [row for row in rows if row[key] is not None]

    async def _fetch(self, name: str, *arguments: object) -> list[asyncpg.Record]:
        return await self._engine.retry(lambda: self._engine.fetch(_SQL[name], *arguments), idempotent=True)


def bounds(window: Window) -> tuple[datetime, datetime | None]:
    """Return a window's two ends as statements take them."""
    return to_db(window.since), None if window.until is None else to_db(window.until)


def refuse_cut_days(window: Window, raw_from: date) -> None:
    """Raise unless the window begins and ends at a UTC midnight or where single rows are kept."""
    if raw_from == date.min:
        return
    floor = datetime.combine(raw_from, time(), UTC)
    since = _nearest(window.since, floor)
    until = None if window.until is None else _nearest(window.until, floor)
    if (since, until) != (window.since, window.until) and window.since != window.until:
        raise WindowNotExactError(since, until)


def refuse_before(window: Window, raw_from: date) -> None:
    """Raise unless single rows of the whole window are kept."""
    if raw_from == date.min:
        return
    floor = datetime.combine(raw_from, time(), UTC)
    if window.since < floor and window.since != window.until:
        raise WindowNotExactError(floor, None if window.until is None else max(window.until, floor))


def _nearest(instant: datetime, floor: datetime) -> datetime:
    """Return the instant itself from ``floor`` on, else the midnight nearest to it."""
    if instant >= floor:
        return instant
    midnight = instant.replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight if instant - midnight <= _DAY / 2 else midnight + _DAY
