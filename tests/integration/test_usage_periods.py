"""Totals of the calendar month and of the billing period."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from factories import make_mirror, make_subscription, make_usage, make_user
from kitrocket.clock import to_db
from kitrocket.engine import Engine
from kitrocket.errors import InvalidInputError, NoBillingPeriodError
from kitrocket.models import Period
from kitrocket.testing import ManualClock
from kitrocket.usage import UsageService

pytestmark = pytest.mark.asyncio(loop_scope="session")

MICROSECOND = timedelta(microseconds=1)


@pytest.fixture
def usage(engine: Engine, clock: ManualClock) -> UsageService:
    return UsageService(engine, clock=clock)


async def around(engine: Engine, *edges: datetime) -> None:
    """Calls just before, at and just after each edge: 1, 2, 4, then 8, 16, 32, and so on."""
    for number, edge in enumerate(edges):
        for index, offset in enumerate((-MICROSECOND, timedelta(0), MICROSECOND)):
            await make_usage(engine, "ada", tokens=2 ** (3 * number + index), at=edge + offset)


@pytest.mark.parametrize(
    ("zone", "first", "following"),
    [
        ("UTC", "2026-03-01T00:00+00:00", "2026-04-01T00:00+00:00"),
        ("Europe/Berlin", "2026-03-01T00:00+01:00", "2026-04-01T00:00+02:00"),
        ("Asia/Kathmandu", "2026-03-01T00:00+05:45", "2026-04-01T00:00+05:45"),
        ("Pacific/Chatham", "2026-03-01T00:00+13:45", "2026-04-01T00:00+13:45"),
    ],
)
async def test_the_month_of_a_zone(
    usage: UsageService, engine: Engine, clock: ManualClock, zone: str, first: str, following: str
) -> None:
    await make_user(engine, id="ada")
    since, until = datetime.fromisoformat(first), datetime.fromisoformat(following)
    await around(engine, since, until)
    for now in (since, until - MICROSECOND):
        clock.now = now
        assert await usage.total("ada", period="month", tz=zone) == 2 + 4 + 8
    clock.now = since - MICROSECOND
    assert await usage.total("ada", period="month", tz=zone) == 1


async def test_the_period_of_the_provider_wins(usage: UsageService, engine: Engine) -> None:
    await make_user(engine, id="ada")
    await make_subscription(engine, "ada", current_period_end=datetime(2026, 3, 31, tzinfo=UTC))
    assert await usage.billing_period("ada") == Period(
        since=datetime(2026, 2, 28, tzinfo=UTC), until=datetime(2026, 3, 31, tzinfo=UTC), source="row"
    )
    since, until = datetime(2026, 2, 10, 9, 30, tzinfo=UTC), datetime(2026, 3, 10, 9, 30, tzinfo=UTC)
    await make_mirror(engine, "sub_1", user_id="ada")
    await engine.fetch(
        "UPDATE kitrocket.dodo_subscriptions SET previous_billing_date = $1, next_billing_date = $2",
        to_db(since),
        to_db(until),
    )
    assert await usage.billing_period("ada") == Period(since=since, until=until, source="provider")
    await around(engine, since, until)
    assert await usage.total("ada", period="billing") == 2 + 4 + 8


@pytest.mark.parametrize("status", ["cancelled", None])
async def test_without_a_live_subscription_there_is_none(
    usage: UsageService, engine: Engine, status: str | None
) -> None:
    await make_user(engine, id="ada")
    if status is not None:
        await make_subscription(engine, "ada", status=status, current_period_end=datetime(2026, 3, 31, tzinfo=UTC))
        await make_mirror(engine, "sub_1", user_id="ada", status=status)
    for work in (usage.billing_period("ada"), usage.total("ada", period="billing")):
        with pytest.raises(NoBillingPeriodError) as caught:
            await work
        assert caught.value.user_id == "ada"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"period": "week"}, "period"),
        ({"period": 5}, "period"),
        ({"period": "month", "tz": "Nowhere"}, "tz"),
        ({"period": "month", "since": datetime(2026, 1, 1, tzinfo=UTC)}, "period"),
        ({"period": "billing", "until": datetime(2026, 1, 1, tzinfo=UTC)}, "period"),
    ],
)
async def test_bad_periods_are_refused(usage: UsageService, arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        await usage.total("ada", **arguments)
    assert caught.value.field == field
