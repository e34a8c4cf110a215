"""The rollup proven, repaired, and what lies below it pruned."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from functools import partial

import anyio

from kitrocket.engine import Engine
from kitrocket.errors import ConfigurationError, InvalidInputError, TransactionError
from kitrocket.models import PruneResult, RebuildResult, UsageDrift, VerifyResult
from kitrocket.rollup import fetch_long, recompute_day
from kitrocket.sql import statements

#: How many differing keys an answer names.
_EXAMPLES = 20

_SQL = statements("rollup")


async def verify(engine: Engine) -> VerifyResult:
    """Compare the rollup with the single rows, in one snapshot."""
    rows = await fetch_long(engine, _SQL["verify"], _EXAMPLES)
    return VerifyResult(
        days=rows[0]["days"],
        drift=rows[0]["drift"],
        examples=[
            UsageDrift(**{name: row[name] for name in UsageDrift.model_fields})
            for row in rows
            if row["user_id"] is not None
        ],
    )


async def rebuild(engine: Engine, since: date, report: Callable[[int, int], None] | None) -> RebuildResult:
    """Recompute the rollup's days from ``since`` on, the newest first."""
    _refuse_in_transaction(engine, "rebuild")
    state = await engine.fetchrow(_SQL["state"])
    floor = date.min if state is None else state["raw_from"]
    if since < floor:
        raise InvalidInputError("since", "single calls of that day were pruned", f"a time from {floor} on, in UTC")
    days = [row["day"] for row in await fetch_long(engine, _SQL["days"], since)]
    corrected = 0
    for done, day in enumerate(days, start=1):
        corrected += await recompute_day(engine, day)
        if report is not None:
            report(done, len(days))
    return RebuildResult(days=len(days), corrected=corrected)


async def count_before(engine: Engine, before: date) -> int:
    """Count the single rows of the days before ``before``."""
    [row] = await fetch_long(engine, _SQL["count_before"], before)
    return int(row["calls"])


async def prune(
    engine: Engine,
    before: date,
    *,
    batch_size: int,
    budget: timedelta | None,
    report: Callable[[int], None] | None,
) -> PruneResult:
    """Raise the floor to ``before``, then delete the single rows below it, in batches."""
    _refuse_in_transaction(engine, "prune")
    give_up_at = None if budget is None else anyio.current_time() + budget.total_seconds()
    floor = await engine.retry(lambda: engine.fetchval(_SQL["raise_floor"], before), idempotent=True)
    if floor is None:
        raise ConfigurationError("the daily sums are not complete yet; run `kitrocket db migrate` first")
    deleted = batches = 0
    more = False
    for row in await engine.fetch(_SQL["days_before"], floor):
        while not more:
            some = await engine.retry(partial(_prune_some, engine, row["day"], batch_size), idempotent=True)
            deleted, batches = deleted + some, batches + (some > 0)
            if report is not None:
                report(deleted)
            more = give_up_at is not None and anyio.current_time() >= give_up_at
            if some < batch_size:
                break
    return PruneResult(deleted=deleted, batches=batches, more=more, kept_from=midnight(floor))


async def _prune_some(engine: Engine, day: date, batch_size: int) -> int:
    async with engine.transaction():
        await engine.fetch(_SQL["begin_pruning"])
        return int(await engine.fetchval(_SQL["prune"], day, batch_size))


def midnight(day: date) -> datetime:
    """Return the instant at which a UTC day begins."""
    return datetime.combine(day, time(), UTC)


def _refuse_in_transaction(engine: Engine, what: str) -> None:
    if engine.in_transaction():
        raise TransactionError(f"usage.{what} commits as it goes, so it cannot run inside a transaction")
