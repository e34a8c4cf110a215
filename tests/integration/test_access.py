"""Access in Python and its twin in SQL say the same, case by case and at every boundary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import pytest

from factories import make_subscription, make_user
from kitrocket.dodo.events import STATUS_RANKS
from kitrocket.dodo.payments import Facts
from kitrocket.dodo.projection import Snapshot
from kitrocket.engine import Engine
from kitrocket.errors import InvalidInputError
from kitrocket.subscriptions import SubscriptionService
from kitrocket.subscriptions.changes import Changes
from kitrocket.subscriptions.mirror import Mirrored
from kitrocket.testing import ManualClock

pytestmark = pytest.mark.asyncio

SECOND, DAY = timedelta(seconds=1), timedelta(days=1)
NOW = ManualClock().now
BASE = Snapshot(
    subscription_id="",
    customer_id="cus",
    plan="pro",
    status="active",
    event_at=NOW - 10 * DAY,
    created_at=NOW - 40 * DAY,
    previous_billing_date=NOW - 30 * DAY,
    next_billing_date=NOW,
    started=True,
)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"started": False},
    {"next_billing_date": None},
    {"cancel_at_next_billing_date": True},
    {"cancel_at_next_billing_date": True, "next_billing_date": None},
    {"trial_period_days": 30, "created_at": NOW - 30 * DAY},
    {"trial_period_days": 30, "created_at": NOW - 30 * DAY, "cancel_at_next_billing_date": True},
    {"trial_period_days": 30, "created_at": NOW - 30 * DAY, "facts": Facts(charged=True)},
    {"trial_period_days": 27, "created_at": NOW - 30 * DAY},
    {"trial_period_days": 2_000_000_000, "created_at": None},
    {"trial_period_days": 2_000_000_000, "next_billing_date": datetime.max.replace(tzinfo=UTC)},
    {"cancelled_at": NOW - DAY},
    {"cancelled_at": NOW + DAY, "expires_at": NOW - DAY},
    {"cancelled_at": NOW - DAY, "paused_at": NOW - 2 * DAY},
    {"cancelled_at": NOW - DAY, "facts": Facts(charge_failed=True)},
    {"facts": Facts(dispute_open=True)},
    {"facts": Facts(dispute_open=True), "cancel_at_next_billing_date": True},
    {"facts": Facts(revoked_at=NOW - DAY, revoked_reason="refunded")},
    {"facts": Facts(revoked_at=NOW - DAY, revoked_reason="dispute_lost")},
    {"past_due_ends_at": NOW},
    {"event_at": NOW + DAY, "created_at": None},
]
#: How far before now each date stands: at the boundary, and a second to both sides of it.
OFFSETS = [base + side for base, side in product((0 * DAY, 3 * DAY), (-SECOND, 0 * SECOND, SECOND))]


def moved(snapshot: Snapshot, by: timedelta) -> Snapshot:
    def earlier(instant: datetime | None) -> datetime | None:
        return instant if instant is None or instant.year == 9999 else instant - by

    return replace(
        snapshot,
        next_billing_date=earlier(snapshot.next_billing_date),
        previous_billing_date=earlier(snapshot.previous_billing_date),
        past_due_ends_at=earlier(snapshot.past_due_ends_at),
    )


def cases() -> Iterator[Snapshot]:
    for status, variant, offset in product(STATUS_RANKS, VARIANTS, OFFSETS):
        yield moved(replace(BASE, status=status, **variant), offset)


async def put(engine: Engine, *items: Mirrored) -> None:
    async with engine.transaction():
        for item in items:
            await Changes({item.snapshot.subscription_id: item}).write(engine)


async def agree(engine: Engine, clock: ManualClock, user_ids: list[str]) -> list[str]:
    """Compare both under every policy, and return the reasons that were given."""
    reasons: list[str] = []
    for honour, dispute in product((True, False), ("flag", "suspend")):
        service = SubscriptionService(
            engine,
            clock=clock,
            honour_paid_period=honour,
            dispute_policy=dispute,  # type: ignore[arg-type]  # both are what it may be
        )
        many = await service.access_many(user_ids)
        assert len(many) == len(set(user_ids))
        for user_id in user_ids:
            assert many[user_id] == await service.access(user_id)
            reasons.append(many[user_id].reason)
    return reasons


async def test_the_twin_agrees_on_every_line_at_its_boundaries(engine: Engine, clock: ManualClock) -> None:
    snapshots = [replace(case, subscription_id=f"sub_{number}") for number, case in enumerate(cases())]
    assert len(snapshots) >= 300
    await engine.fetch(
        "INSERT INTO users (id, email, name)"
        " SELECT 'u' || n, 'u' || n || '@example.com', 'U' FROM generate_series(1, $1) n",
        len(snapshots),
    )
    users = [f"u{number + 1}" for number in range(len(snapshots))]
    await put(
        engine,
        *(
            Mirrored(snapshot=item, product_id="pdt", event_key="", user_id=user_id)
            for user_id, item in zip(users, snapshots, strict=True)
        ),
    )
    reasons = await agree(engine, clock, users)
    told = (
        "active trial cancel_scheduled cancelled_paid grace renewal_unconfirmed renewal_missing past_due on_hold paused"
    )
    more = "ended cancelled expired failed refunded dispute_lost dispute_open not_started"
    assert set(reasons) == {*told.split(), *more.split()}


async def test_the_twin_agrees_on_rows_of_other_writers(engine: Engine, clock: ManualClock) -> None:
    users = []
    for status, end, known in product(
        ("active", "trialing", "past_due", "cancelled", "odd"),
        (None, *(NOW - leeway + side for leeway, side in product((0 * DAY, 3 * DAY), (-SECOND, 0 * SECOND, SECOND)))),
        (False, True),
    ):
        user_id = await make_user(engine)
        users.append(user_id)
        await make_subscription(
            engine, user_id, status=status, current_period_end=end, dodo_subscription_id=f"sub_{user_id}"
        )
        if known:
            snapshot = replace(BASE, subscription_id=f"sub_{user_id}", status="expired")
            await put(engine, Mirrored(snapshot=snapshot, product_id="pdt", event_key=""))
    assert set(await agree(engine, clock, [*users, "nobody"])) == {"row_only", "none"}


async def test_the_twin_chooses_the_same_of_several(engine: Engine, clock: ManualClock) -> None:
    users = []
    kinds: list[dict[str, Any]] = [
        {"status": "active", "plan": "starter", "next_billing_date": NOW + DAY},
        {"status": "active", "plan": "pro", "next_billing_date": NOW + DAY},
        {"status": "active", "plan": "gone", "next_billing_date": NOW + DAY},
        {"status": "on_hold", "plan": "pro"},
        {"status": "cancelled", "plan": "pro", "cancelled_at": NOW - DAY, "next_billing_date": NOW + DAY},
        {"status": "expired", "plan": "pro", "created_at": NOW},
        {"status": "pending"},
    ]
    for first, second in product(kinds, kinds):
        user_id = await make_user(engine)
        users.append(user_id)
        for name, kind in (("Sub", first), ("sub", second)):
            snapshot = replace(BASE, **kind, subscription_id=f"{name}_{user_id}")
            await put(engine, Mirrored(snapshot=snapshot, product_id="pdt", event_key="", user_id=user_id))
    await agree(engine, clock, users)


async def test_a_started_trial_counts_for_ever(engine: Engine, clock: ManualClock) -> None:
    service = SubscriptionService(engine, clock=clock)
    for trial, started, expected in ((14, True, True), (14, False, False), (0, True, False)):
        user_id = await make_user(engine)
        snapshot = replace(
            BASE, subscription_id=f"sub_{user_id}", status="expired", trial_period_days=trial, started=started
        )
        await put(engine, Mirrored(snapshot=snapshot, product_id="pdt", event_key="", user_id=user_id))
        assert await service.had_trial(user_id) is expected
    assert await service.had_trial("nobody") is False


async def test_junk_is_refused(engine: Engine) -> None:
    service = SubscriptionService(engine)
    assert await service.access_many([]) == {}
    for junk in ("", "a\0b", None, 7):
        with pytest.raises(InvalidInputError):
            await service.access_many(["u1", junk])  # type: ignore[list-item]  # that is what is bad about some
        with pytest.raises(InvalidInputError):
            await service.had_trial(junk)  # type: ignore[arg-type]  # the same
