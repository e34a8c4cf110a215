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
from kitrocket.windows import Window, whole_days

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
        #: From which day on the rollup is complete, as a statement last answered.
        self._complete_from = date.min

    async def total(self, user_id: str, window: Window, model: str | None) -> int:
        """Return a user's tokens in a window, of one model or of all."""
        if self._rollup:
            [row] = await self._rolled("total_rolled", window, (user_id,), (model,))
        else:
            [row] = await self._fetch("total", user_id, *bounds(window), model)
        return int(row["tokens"])

    async def by_time(
        self, user_id: str, window: Window, starts: Sequence[datetime], *, in_utc_days: bool
    ) -> list[asyncpg.Record]:
        """Return a row for each bucket with a call; ``in_utc_days`` says that buckets begin at UTC midnights."""
        buckets = [to_db(start) for start in starts]
        if self._rollup and in_utc_days:
            rows = await self._rolled("by_time_rolled", window, (user_id,), (buckets,))
            return [row for row in rows if row["bucket"] is not None]
        rows = await self._fetch("by_time", user_id, *bounds(window), buckets)
        if self._rollup:
            # Pruning moves the floor before it deletes, so what is above it now was all there.
            state = await self._engine.fetchrow(_ROLLUP["state"])
            refuse_before(window, date.min if state is None else state["raw_from"])
        return rows

    async def by_model(self, user_id: str, window: Window) -> list[asyncpg.Record]:
        """Return a row for each model, the largest sum first."""
        if self._rollup:
            rows = await self._rolled("by_model_rolled", window, (user_id,))
            return [row for row in rows if row["model"] is not None]
        return await self._fetch("by_model", user_id, *bounds(window))

    async def top_users(self, window: Window, limit: int) -> list[asyncpg.Record]:
        """Return a row for each of the users with the largest sums."""
        if self._rollup:
            rows = await self._rolled("top_users_rolled", window, (), (limit,))
            return [row for row in rows if row["user_id"] is not None]
        return await self._fetch("top_users", *bounds(window), limit)

    async def billing_period(self, user_id: str) -> Period:
        """Return the billing period of a user's live subscription, or raise :class:`NoBillingPeriodError`."""
        rows = await self._fetch("billing_period", user_id)
        if not rows:
            raise NoBillingPeriodError(user_id)
        return Period(since=from_db(rows[0]["since"]), until=from_db(rows[0]["until"]), source=rows[0]["source"])

    async def _rolled(
        self, name: str, window: Window, before: Sequence[object], after: Sequence[object] = ()
    ) -> list[asyncpg.Record]:
        """Run a statement with whole days; its arguments are some, the window and its days, and others.

        The days are chosen by what is known of the rollup and judged by what the statement saw of it. Where that asks
        for other days, as while the rollup is being filled, the statement is run again with these.
        """
        while True:
            days = _days(window, self._complete_from)
            rows = await self._fetch(name, *before, *bounds(window), *days, *after)
            refuse_cut_days(window, rows[0]["raw_from"])
            complete_from = rows[0]["rollup_from"]
            if complete_from == self._complete_from or _days(window, complete_from) == days:
                return rows
            self._complete_from = complete_from

    async def _fetch(self, name: str, *arguments: object) -> list[asyncpg.Record]:
        return await self._engine.retry(lambda: self._engine.fetch(_SQL[name], *arguments), idempotent=True)


def _days(window: Window, complete_from: date) -> list[datetime | None]:
    """Return a window's whole days as statements take them."""
    return [None if day is None else to_db(day) for day in whole_days(window, complete_from=complete_from)]


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
