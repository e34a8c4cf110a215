"""Dated prices of models, and what the calls of a window cost by them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, tzinfo
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext

import asyncpg

from kitrocket.clock import to_db
from kitrocket.engine import Engine
from kitrocket.errors import InvalidInputError, UnpricedModelError
from kitrocket.models import CostLine, CostReport, ModelPrice, PricesSet, UnpricedUsage
from kitrocket.sql import statements
from kitrocket.usage.sums import bounds, refuse_before, refuse_cut_days
from kitrocket.windows import CostDimension, Window, bucket_starts

#: The most lines of one answer.
MAX_LINES = 100_000

_SQL = statements("prices")
_ROLLUP = statements("rollup")
#: Wide enough for every digit of a sum: Python's own context would round at 28.
_EXACT = Context(prec=200, rounding=ROUND_HALF_EVEN)


class Prices:
    """Keeps prices and reads costs. Without ``rollup``, from single rows alone, with the same answers."""

    def __init__(self, engine: Engine, *, rollup: bool) -> None:
        self._engine = engine
        self._rollup = rollup

    async def set(self, prices: Sequence[ModelPrice]) -> PricesSet:
        """Set prices with different keys, all of them or none."""
        rows = await self._fetch(
            "set_prices",
            [price.model for price in prices],
            [price.currency for price in prices],
            [price.valid_from for price in prices],
            [price.per_million for price in prices],
        )
        added = sum(1 for row in rows if row["is_new"])
        return PricesSet(added=added, changed=len(rows) - added, unchanged=len(prices) - len(rows))

    async def kept(self, model: str | None, currency: str | None) -> list[ModelPrice]:
        """Return prices by model, currency and date."""
        return [ModelPrice(**row) for row in await self._fetch("prices", model, currency)]

    async def remove(self, model: str, currency: str, valid_from: date) -> bool:
        """Remove a price, and return whether there was one."""
        return bool(await self._fetch("remove_price", model, currency, valid_from))

    async def cost(
        self,
        user_id: str | None,
        window: Window,
        *,
        now: datetime,
        currency: str,
        by: Sequence[CostDimension],
        zone: tzinfo,
        places: int,
        allow_unpriced: bool,
    ) -> CostReport:
        """Price the calls of a window."""
        grain = next((part for part in by if part != "user" and part != "model"), None)
        starts = [window.since] if grain is None else bucket_starts(window, by=grain, zone=zone, now=now)
        in_utc_days = grain is None or (grain != "hour" and zone is UTC)
        rows = await self._rows(
            window,
            in_utc_days,
            (user_id, *bounds(window), currency, "user" in by, "model" in by, [to_db(start) for start in starts]),
        )
        unpriced = [
            UnpricedUsage(model=row["model"], tokens=row["tokens"], calls=row["calls"])
            for row in rows
            if not row["is_line"]
        ]
        if unpriced and not allow_unpriced:
            raise UnpricedModelError([one.model for one in unpriced], sum(one.tokens for one in unpriced))
        ends = [*starts[1:], window.until]
        days_of = zone if grain == "day" else None
        lines = [
            _line(row, starts[row["bucket"] - 1], ends[row["bucket"] - 1], days_of) for row in rows if row["is_line"]
        ]
        with localcontext(_EXACT):
            exact = sum((line.cost for line in lines), Decimal(0))
            total = exact.quantize(Decimal(1).scaleb(-places))
        return CostReport(
            since=window.since,
            until=window.until,
            currency=currency,
            total=total,
            exact=exact,
            tokens=sum(line.tokens for line in lines),
            calls=sum(line.calls for line in lines),
            lines=lines,
            unpriced=unpriced,
            complete=not unpriced,
        )

    async def _rows(self, window: Window, in_utc_days: bool, arguments: tuple[object, ...]) -> list[asyncpg.Record]:
        if window.since == window.until:
            return []
        if self._rollup and in_utc_days:
            rows = await self._fetch("cost_rolled", *arguments, MAX_LINES + 1)
            refuse_cut_days(window, rows[0]["raw_from"])
            rows = [row for row in rows if row["is_line"] is not None]
        else:
            rows = await self._fetch("cost", *arguments, MAX_LINES + 1)
            if self._rollup:
                # Pruning moves the floor before it deletes, so what is above it now was all there.
                state = await self._engine.fetchrow(_ROLLUP["state"])
                refuse_before(window, date.min if state is None else state["raw_from"])
        if len(rows) > MAX_LINES and rows[MAX_LINES]["is_line"]:
            raise InvalidInputError("by", "the answer has too many lines", f"at most {MAX_LINES:,}: a coarser division")
        return rows

    async def _fetch(self, name: str, *arguments: object) -> list[asyncpg.Record]:
        return await self._engine.retry(lambda: self._engine.fetch(_SQL[name], *arguments), idempotent=True)


def _line(row: asyncpg.Record, start: datetime, end: datetime | None, days_of: tzinfo | None) -> CostLine:
    return CostLine(
        start=start,
        end=end,
        day=None if days_of is None else start.astimezone(days_of).date(),
        user_id=row["user_id"],
        model=row["model"],
        tokens=row["tokens"],
        calls=row["calls"],
        unpriced=row["unpriced"],
        cost=row["cost"],
    )
