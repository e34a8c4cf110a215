"""``retry_after`` and ``reset_at``, against an oracle that tries every instant at which something changes."""

from __future__ import annotations

import itertools
import json
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import make_usage, make_user
from kitrocket.clock import to_db
from kitrocket.engine import Engine
from kitrocket.models import Limit
from kitrocket.sql import statements
from kitrocket.testing import ManualClock
from kitrocket.usage import UsageService

pytestmark = pytest.mark.asyncio(loop_scope="session")

MICROSECOND = timedelta(microseconds=1)
SECOND = timedelta(seconds=1)
WINDOW = timedelta(seconds=60)
NOW = datetime(2026, 3, 31, 23, 59, 50, tzinfo=UTC)
APRIL = datetime(2026, 4, 1, tzinfo=UTC)
MAY = datetime(2026, 5, 1, tzinfo=UTC)

#: Offsets that lie on, and a microsecond or a second beside, the edges that matter.
OFFSETS = st.builds(
    lambda edge, step, times: edge + step * times,
    st.sampled_from([timedelta(0), WINDOW, SECOND * 9, SECOND * 30]),
    st.sampled_from([MICROSECOND, SECOND]),
    st.integers(-2, 2),
).map(lambda offset: max(offset, timedelta(0)))
ROWS = st.lists(st.tuples(OFFSETS, st.integers(0, 40)), max_size=6)
HELD = st.lists(st.tuples(OFFSETS.filter(bool), st.integers(0, 40)), max_size=4)
LIMITS = st.lists(
    st.builds(Limit, tokens=st.integers(0, 100), window=st.sampled_from([WINDOW, SECOND * 30, "month"])),
    min_size=1,
    max_size=3,
)


class Oracle:
    """A user's calls and reservations, added up one by one."""

    def __init__(self, rows: list[tuple[datetime, int]], held: list[tuple[datetime, int]]) -> None:
        self.rows = rows
        self.held = held

    def since(self, limit: Limit, now: datetime) -> datetime:
        if isinstance(limit.window, timedelta):
            return now - limit.window
        return now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)

    def used(self, limit: Limit, now: datetime) -> int:
        return sum(tokens for at, tokens in self.rows if at >= self.since(limit, now))

    def reserved(self, now: datetime) -> int:
        return sum(tokens for expires_at, tokens in self.held if expires_at > now)

    def fits(self, limits: list[Limit], tokens: int, now: datetime) -> bool:
        return all(self.used(limit, now) + self.reserved(now) + tokens <= limit.tokens for limit in limits)

    def changes(self) -> list[datetime]:
        windows = (WINDOW, SECOND * 30)
        leaving = [at + window + MICROSECOND for (at, _), window in itertools.product(self.rows, windows)]
        return sorted({at for at in [*leaving, *(at for at, _ in self.held), APRIL] if at > NOW})

    def wait(self, limits: list[Limit], tokens: int) -> int | None:
        for at in [NOW, *self.changes()]:
            if self.fits(limits, tokens, at):
                return math.ceil((at - NOW) / SECOND)
        return None

    def reset_at(self, limit: Limit) -> datetime | None:
        if limit.window == "month":
            return APRIL
        counting = [at for at, _ in self.rows if at >= self.since(limit, NOW)]
        for at in self.changes() if counting else []:
            if not [one for one in counting if one >= self.since(limit, at)]:
                return at
        return None


@settings(max_examples=40)
@given(rows=ROWS, held=HELD, limits=LIMITS, tokens=st.integers(0, 60))
async def test_a_decision_says_what_trying_every_instant_says(
    engine: Engine,
    rows: list[tuple[timedelta, int]],
    held: list[tuple[timedelta, int]],
    limits: list[Limit],
    tokens: int,
) -> None:
    usage = UsageService(engine, clock=ManualClock(NOW))
    user_id = await make_user(engine)
    oracle = Oracle([(NOW - before, some) for before, some in rows], [(NOW + later, some) for later, some in held])
    for at, some in oracle.rows:
        await make_usage(engine, user_id, tokens=some, at=at)
    for number, (expires_at, some) in enumerate(oracle.held):
        await engine.fetch(
            "INSERT INTO kitrocket.usage_reservations (id, user_id, model, tokens, used, created_at, expires_at)"
            " VALUES ($1, $2, 'm', $3, 0, $4, $5)",
            f"{user_id}-{number}",
            user_id,
            some,
            to_db(NOW),
            to_db(expires_at),
        )
    decision = await usage.reserve(user_id, tokens=tokens, model="m", limits=limits)
    assert decision.allowed is oracle.fits(limits, tokens, NOW)
    assert decision.retry_after == oracle.wait(limits, tokens)
    [shown, *_] = [limit for limit in limits if (limit.tokens, limit.window) == (decision.limit, decision.window)]
    assert decision.used == oracle.used(shown, NOW)
    assert decision.reserved == oracle.reserved(NOW) + (tokens if decision.allowed else 0)
    assert decision.remaining == max(0, shown.tokens - decision.used - decision.reserved)
    assert decision.reset_at == oracle.reset_at(shown)
    if decision.allowed:
        assert decision.remaining == min(
            max(0, limit.tokens - oracle.used(limit, NOW) - decision.reserved) for limit in limits
        )


async def test_the_wait_is_found_without_reading_the_whole_window(engine: Engine) -> None:
    """The oldest calls leave first, so that is where the search begins and where it ends."""
    usage, calls = UsageService(engine, clock=ManualClock(NOW)), 3_000
    user_id, other = await make_user(engine), await make_user(engine)
    await engine.fetch(
        "INSERT INTO usage SELECT 'u' || n, CASE n % 5 WHEN 0 THEN $1 ELSE $4 END, 1, 'm',"
        " $2::timestamp - n / 5 * interval '10 minutes' FROM generate_series(5, 5 * $3::integer + 4) AS n",
        user_id,
        to_db(NOW),
        calls,
        other,
    )
    await engine.fetch("VACUUM ANALYZE usage")
    decision = await usage.reserve(user_id, tokens=10, model="m", limit=calls)
    first = NOW - timedelta(minutes=10) * (calls - 9)
    assert decision.retry_after == math.ceil((first + timedelta(days=30) + MICROSECOND - NOW) / SECOND)
    types = "(text, timestamp, timestamp[], integer[], bigint)"
    values = f"'{user_id}', '2026-03-01', '{{2026-03-02}}', '{{5}}', 10"
    async with engine.transaction() as transaction:
        await transaction.connection.execute(f"PREPARE search {types} AS {statements('quotas')['leaves_at']}")
        explained = await engine.fetchval(f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) EXECUTE search ({values})")
        await engine.fetch("DEALLOCATE search")
    scans = [node for node in nodes(json.loads(explained)[0]["Plan"]) if node.get("Relation Name") == "usage"]
    assert len(scans) == 2
    for scan in scans:
        assert scan["Index Name"] == "usage_user_created_idx"
        assert scan["Actual Rows"] < 50


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for inner in plan.get("Plans", []) for node in nodes(inner))]
