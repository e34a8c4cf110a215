"""Webhooks received, stored, applied and projected; what they make of the row and of access."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import asyncpg
import pytest

from delivering import (
    DAY,
    KEY,
    PAYLOADS,
    PRODUCTS,
    SECOND,
    SUBSCRIPTION,
    SUBSCRIPTION_EVENTS,
    USER,
    Desk,
    anonymous,
    at,
    dispute,
    event,
    refund,
    with_user,
)
from factories import make_subscription, make_user
from kitrocket.clock import to_db
from kitrocket.dodo.signature import sign
from kitrocket.engine import Engine
from kitrocket.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    InvalidInputError,
    WebhookError,
    WebhookNotConfiguredError,
    WebhookNotFoundError,
)
from kitrocket.models import WebhookReceipt
from kitrocket.testing import ManualClock
from kitrocket.users import UserService

pytestmark = pytest.mark.asyncio


@pytest.fixture
def desk(engine: Engine, clock: ManualClock) -> Desk:
    return Desk(engine, clock)


# -- every example ------------------------------------------------------------------------------------------------

# number, outcome, plan, status, period's end, allowed until (None: denied), reason of the access
RESULTS = [
    ("01", "applied", "starter", "trialing", "2026-03-16", "2026-03-16", "trial"),
    ("02", "applied", "starter", "active", "2026-04-16", "2026-04-16", "active"),
    ("04", "applied", "pro", "past_due", "2026-05-29", "2026-06-05", "grace"),
    ("05", "applied", "pro", "cancelled", "2026-07-29", "2026-07-29", "cancelled_paid"),
    ("06", "applied", None, None, None, None, "none"),
    ("07", "applied", None, None, None, None, "none"),
    ("09", "parked", None, None, None, None, "none"),
    ("12", "ignored", None, None, None, None, "none"),
    ("13", "ignored", None, None, None, None, "none"),
    ("14", "applied", "pro", "active", "2026-06-29", "2026-06-29", "cancel_scheduled"),
    ("15", "applied", "pro", "past_due", "2026-05-29", None, "on_hold"),
    ("16", "applied", "pro", "past_due", "2026-06-15", None, "paused"),
    ("17", "applied", "pro", "past_due", "2026-05-29", "2026-06-05", "grace"),
    ("x1", "applied", "starter", "active", "2026-04-16", "2026-04-16", "active"),
]


@pytest.mark.parametrize(("number", "outcome", "plan", "status", "end", "until", "reason"), RESULTS)
async def test_every_example_alone(
    desk: Desk,
    number: str,
    outcome: str,
    plan: str | None,
    status: str | None,
    end: str | None,
    until: str | None,
    reason: str,
) -> None:
    await with_user(desk)
    happened = datetime.fromisoformat(PAYLOADS[number]["timestamp"])
    desk.clock.now = happened + SECOND

    receipt = await desk.receipt(PAYLOADS[number], "msg_first")
    row, granted = await desk.service.get(USER), await desk.service.access(USER)

    assert receipt == WebhookReceipt(webhook_id="msg_first", type=PAYLOADS[number]["type"], outcome=outcome)
    if plan is None:
        assert row is None
    else:
        assert row is not None
        assert row.current_period_end is not None
        assert (row.plan, row.status, row.current_period_end.date().isoformat()) == (plan, status, end)
        assert (row.dodo_subscription_id, row.dodo_customer_id) == (SUBSCRIPTION, "cus_Lr8dWq3ZtY1s")
        assert (row.updated_at, row.created_at) == (happened, datetime.fromisoformat("2026-03-02T09:15:04.118203Z"))
    assert (granted.plan, granted.status, granted.reason) == (plan, status, reason)
    assert granted.allowed == (until is not None)
    if granted.allowed:
        assert granted.until is not None
        assert granted.until.date().isoformat() == until

    # The same delivery again: nothing moves, not even the row's place in its page.
    before = await desk.bytes_of_state()
    desk.clock.advance(SECOND)
    assert await desk.deliver(PAYLOADS[number], "msg_first") == "duplicate"
    # The same event under another id: equal, so nothing moves either.
    if outcome != "parked":
        assert await desk.deliver(PAYLOADS[number], "msg_second") == outcome
    assert await desk.bytes_of_state() == before


async def test_a_scheduled_cancel_ends_by_the_clock(desk: Desk) -> None:
    await with_user(desk)
    end = datetime.fromisoformat(PAYLOADS["14"]["data"]["next_billing_date"])
    desk.clock.now = end - DAY
    await desk.deliver(PAYLOADS["14"])
    for offset, allowed, status in (
        (-SECOND, True, "active"),
        (0 * SECOND, False, "cancelled"),
        (SECOND, False, "cancelled"),
    ):
        desk.clock.now = end + offset
        granted = await desk.service.access(USER)
        assert (granted.allowed, granted.status) == (allowed, status)


@pytest.mark.parametrize(("offset", "status"), [(-SECOND, "active"), (0 * SECOND, "cancelled"), (SECOND, "cancelled")])
async def test_the_row_follows_the_clock_by_the_next_sweep(desk: Desk, offset: timedelta, status: str) -> None:
    await with_user(desk)
    end = datetime.fromisoformat(PAYLOADS["14"]["data"]["next_billing_date"])
    happened = datetime.fromisoformat(PAYLOADS["14"]["timestamp"])
    desk.clock.now = happened
    await desk.deliver(PAYLOADS["14"])
    desk.clock.now = end + offset
    moved = offset >= 0 * SECOND
    assert (await desk.service.retry_parked()).reprojected == moved
    row = await desk.service.get(USER)
    assert row is not None
    assert (row.status, row.updated_at) == (status, end if moved else happened)
    before = await desk.bytes_of_state()
    assert (await desk.service.retry_parked()).reprojected == 0
    assert await desk.bytes_of_state() == before


async def test_an_unconfirmed_renewal_is_flagged_and_leaves_the_row(desk: Desk) -> None:
    await with_user(desk)
    desk.clock.now = at("2026-03-17")
    await desk.deliver(PAYLOADS["02"])
    rows = await desk.table("subscriptions")
    for pause, needs_check in ((30 * DAY, False), (DAY, True), (DAY * 4, True)):
        desk.clock.advance(pause)
        await desk.service.retry_parked()
        (mirrored,) = await desk.table("dodo_subscriptions")
        assert mirrored["needs_check"] == needs_check
    assert mirrored["reproject_at"] is None
    assert await desk.table("subscriptions") == rows


async def test_the_stale_type_changes_nothing_after_its_twin(desk: Desk) -> None:
    await with_user(desk)
    await desk.deliver(PAYLOADS["04"])
    before = await desk.bytes_of_state()
    assert await desk.deliver(PAYLOADS["17"]) == "applied"
    assert await desk.bytes_of_state() == before


async def test_the_body_is_kept_to_the_letter(desk: Desk) -> None:
    body = b'{ "type":"license_key.created",\n "timestamp":"2026-03-01T12:00:00", "data":{"n":"\\u0000","n":1e400} }'
    receipt = await desk.service.receive(body, sign(body, key=KEY, webhook_id="msg_letter", at=desk.clock.now))
    assert receipt.outcome == "ignored"
    (stored,) = await desk.table("webhook_events")
    assert stored["payload"].encode() == body
    assert (stored["state"], stored["deliveries"], stored["received_at"]) == ("ignored", 1, to_db(desk.clock.now))


# -- order ----------------------------------------------------------------------------------------------------------


async def test_any_order_of_the_subscription_events_ends_in_the_same_row(desk: Desk) -> None:
    await with_user(desk)
    desk.clock.now = at("2026-07-11")
    results = []
    for start in range(len(SUBSCRIPTION_EVENTS)):
        rotated = SUBSCRIPTION_EVENTS[start:] + SUBSCRIPTION_EVENTS[:start]
        for order in (rotated, rotated[::-1], rotated[::2] + rotated[1::2]):
            for number in order:
                await desk.deliver(PAYLOADS[number])
            results.append(await desk.rows())
            await desk.engine.fetch("DELETE FROM subscriptions")
            await desk.engine.fetch("DELETE FROM kitrocket.dodo_subscriptions")
    assert all(result == results[0] for result in results)
    assert [row["status"] for row in results[0]] == ["cancelled"]


async def test_all_orders_of_cancel_uncancel_upgrade_and_renew(desk: Desk) -> None:
    await with_user(desk)
    desk.clock.now = at("2026-04-20")
    renewed = {
        "previous_billing_date": "2026-04-16T09:15:04.118203Z",
        "next_billing_date": "2026-05-16T09:15:04.118203Z",
    }
    steps = [
        event("02", timestamp="2026-04-01T00:00:00Z", cancel_at_next_billing_date=True),
        event("02", timestamp="2026-04-02T00:00:00Z"),
        event("02", timestamp="2026-04-03T00:00:00Z", product_id="pdt_pro_m_8Kd2"),
        event("02", timestamp="2026-04-16T09:16:00Z", product_id="pdt_pro_m_8Kd2", **renewed),
    ]
    results = []
    for order in itertools.permutations(steps):
        outcomes = [await desk.deliver(step) for step in order]
        assert set(outcomes) <= {"applied", "stale"}
        results.append(await desk.rows())
        await desk.engine.fetch("DELETE FROM subscriptions")
        await desk.engine.fetch("DELETE FROM kitrocket.dodo_subscriptions")
    assert all(result == results[0] for result in results)
    assert [(row["plan"], row["status"]) for row in results[0]] == [("pro", "active")]


async def test_an_older_event_is_stale_and_leaves_every_byte(desk: Desk) -> None:
    await with_user(desk)
    await desk.deliver(PAYLOADS["15"])
    before = await desk.bytes_of_state()
    assert await desk.deliver(PAYLOADS["04"]) == "stale"
    assert await desk.bytes_of_state() == before


async def test_an_older_event_may_still_say_that_the_subscription_had_started(desk: Desk) -> None:
    await with_user(desk)
    assert await desk.deliver(event("02", status="failed", timestamp="2026-03-20T00:00:00Z")) == "applied"
    assert await desk.service.get(USER) is None
    assert (await desk.service.access(USER)).reason == "not_started"
    assert await desk.deliver(PAYLOADS["02"]) == "applied"
    row = await desk.service.get(USER)
    assert row is not None
    assert (row.status, row.updated_at) == ("cancelled", at("2026-03-20"))


@pytest.mark.parametrize(
    ("change", "flagged"),
    [
        ({"timestamp": "2026-03-16T09:16:41.730055Z", "quantity": 2}, False),
        ({"timestamp": "2026-03-16T09:16:41.730055Z", "product_id": "pdt_pro_m_8Kd2"}, True),
        ({"timestamp": "2026-03-16T09:16:41.730056Z", "product_id": "pdt_pro_m_8Kd2"}, False),
        ({"timestamp": "2026-03-18T12:00:00Z"}, False),
        ({"timestamp": "2026-03-18T12:00:01Z"}, True),
    ],
)
async def test_what_is_doubtful_is_flagged(desk: Desk, change: dict[str, Any], flagged: bool) -> None:
    await with_user(desk)
    desk.clock.now = at("2026-03-17T12:00:00")
    await desk.deliver(PAYLOADS["02"])
    await desk.deliver(event("02", **change))
    (mirrored,) = await desk.table("dodo_subscriptions")
    assert mirrored["needs_check"] == flagged


async def test_a_known_id_with_another_body_is_flagged_and_changes_nothing_else(desk: Desk) -> None:
    await with_user(desk)
    await desk.deliver(PAYLOADS["02"], "msg_same")
    rows = await desk.table("subscriptions")
    desk.clock.now = at("2026-03-17")
    assert await desk.deliver(PAYLOADS["15"], "msg_same") == "duplicate"
    (mirrored,) = await desk.table("dodo_subscriptions")
    assert mirrored["needs_check"] is True
    assert await desk.table("subscriptions") == rows


# -- the unknown never downgrades -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"status": "frozen"}, "unknown_status"),
        ({"product_id": "pdt_new"}, "unknown_product"),
        ({"customer": None}, "unreadable"),
        ({"next_billing_date": "soon"}, "unreadable"),
        ({"subscription_id": "a\0b"}, "unreadable"),
    ],
)
async def test_what_is_not_understood_is_parked_and_touches_nothing(
    desk: Desk, change: dict[str, Any], reason: str
) -> None:
    await with_user(desk)
    await desk.deliver(PAYLOADS["02"])
    before = await desk.bytes_of_state()
    assert await desk.deliver(event("15", **change), "msg_odd") == "parked"
    assert (await desk.inbox())["msg_odd"] == ("parked", reason)
    assert await desk.bytes_of_state() == before


async def test_a_product_known_later_is_applied_by_the_next_sweep(desk: Desk) -> None:
    await with_user(desk)
    await desk.deliver(event("02", product_id="pdt_new"), "msg_new")
    assert (await desk.service.retry_parked()).tried == 0
    desk.service = desk.open(products=PRODUCTS | {"pdt_new": "pro"})
    result = await desk.service.retry_parked()
    assert (result.tried, result.finished) == (1, 1)
    row = await desk.service.get(USER)
    assert row is not None
    assert row.plan == "pro"


# -- whose subscription it is ---------------------------------------------------------------------------------------


async def test_an_event_for_a_missing_user_is_parked_and_applied_once_the_user_exists(desk: Desk) -> None:
    desk.clock.now = at("2026-03-17")
    assert await desk.deliver(PAYLOADS["02"], "msg_2") == "parked"
    assert await desk.deliver(PAYLOADS["01"], "msg_1") == "parked"
    assert await desk.deliver(PAYLOADS["02"], "msg_2") == "duplicate"
    assert (await desk.inbox())["msg_2"] == ("parked", "no_user")
    assert (await desk.service.retry_parked()).tried == 0

    await with_user(desk)
    result = await desk.service.retry_parked()
    assert (result.tried, result.finished) == (2, 2)
    assert set((await desk.inbox()).values()) <= {("applied", None), ("stale", None)}
    row = await desk.service.get(USER)
    assert row is not None
    assert (row.status, row.updated_at) == ("active", datetime.fromisoformat(PAYLOADS["02"]["timestamp"]))
    before = await desk.bytes_of_state()
    assert (await desk.service.retry_parked()).tried == 0
    assert await desk.bytes_of_state() == before
    assert {row["customer_email"] for row in await desk.table("webhook_events")} == {None}


async def test_a_redelivery_applies_what_was_parked(desk: Desk) -> None:
    desk.clock.now = at("2026-03-17")
    assert await desk.deliver(PAYLOADS["02"], "msg_2") == "parked"
    await with_user(desk)
    # The payload that was stored first counts; that there is another one is worth a question.
    assert await desk.deliver(event("02", quantity=2), "msg_2") == "applied"
    assert await desk.deliver(PAYLOADS["02"], "msg_2") == "duplicate"
    assert await desk.service.get(USER) is not None
    (mirrored,) = await desk.table("dodo_subscriptions")
    assert mirrored["needs_check"] is True


async def test_metadata_of_the_subscription_comes_before_the_customers(desk: Desk) -> None:
    await with_user(desk)
    other = await make_user(desk.engine)
    customer = PAYLOADS["02"]["data"]["customer"]
    await desk.deliver(event("02", metadata={}, customer=customer))
    await desk.deliver(event("02", subscription_id="sub_2", metadata={"user_id": other}))
    assert [row["user_id"] for row in await desk.table("dodo_subscriptions")] == [USER, other]


@pytest.mark.parametrize("name", ["usr_nobody", "x" * 300, "a\0b", 7, ["list"]])
async def test_metadata_that_names_nobody_parks_whatever_the_email_says(desk: Desk, name: object) -> None:
    await with_user(desk, email="maya.okafor@example.com", email_verified=desk.clock.now)
    assert await desk.deliver(event("02", metadata={"user_id": name}), "msg_x") == "parked"
    assert (await desk.inbox())["msg_x"] == ("parked", "no_user")
    assert await desk.service.get(USER) is None
    assert (await desk.service.retry_parked()).tried == 0


async def test_without_metadata_the_customers_user_is_found(desk: Desk) -> None:
    await with_user(desk)
    await desk.deliver(PAYLOADS["02"])
    assert await desk.deliver(anonymous("15")) == "applied"
    assert await desk.deliver(anonymous("02", subscription_id="sub_2")) == "applied"
    assert {row["user_id"] for row in await desk.table("dodo_subscriptions")} == {USER}


async def test_without_metadata_the_customer_of_a_row_is_found(desk: Desk) -> None:
    await with_user(desk)
    await make_subscription(desk.engine, USER, dodo_customer_id="cus_Lr8dWq3ZtY1s", plan="starter", status="active")
    assert await desk.deliver(anonymous("02")) == "applied"
    assert [row["dodo_subscription_id"] for row in await desk.rows()] == [SUBSCRIPTION]


@pytest.mark.parametrize("verified", [False, True])
async def test_only_a_verified_email_finds_the_user(desk: Desk, verified: bool) -> None:
    await with_user(desk, email="Maya.Okafor@example.com", email_verified=desk.clock.now if verified else None)
    outcome = await desk.deliver(anonymous("02"))
    assert outcome == ("applied" if verified else "parked")
    assert (await desk.service.retry_parked()).tried == 0
    if not verified:
        (stored,) = await desk.table("webhook_events")
        assert stored["customer_email"] == "maya.okafor@example.com"
        await desk.engine.fetch("UPDATE users SET email_verified = created_at")
        assert (await desk.service.retry_parked()).finished == 1
    assert await desk.service.get(USER) is not None


async def test_two_candidates_are_ambiguous(desk: Desk) -> None:
    for _ in range(2):
        await make_subscription(desk.engine, await make_user(desk.engine), dodo_customer_id="cus_Lr8dWq3ZtY1s")
    assert await desk.deliver(anonymous("02"), "msg_two") == "parked"
    assert (await desk.inbox())["msg_two"] == ("parked", "ambiguous_user")
    assert (await desk.service.retry_parked()).tried == 0
    # An event that names one of them settles it for the subscription, and for what was parked.
    await with_user(desk)
    assert await desk.deliver(event("01")) == "applied"
    assert (await desk.service.retry_parked()).finished == 1


async def test_a_subscription_moves_to_the_user_that_the_newest_snapshot_names(desk: Desk) -> None:
    await with_user(desk)
    other = await make_user(desk.engine)
    moved = event("15", metadata={"user_id": other})
    for order in ([PAYLOADS["02"], moved], [moved, PAYLOADS["02"]]):
        for payload in order:
            await desk.deliver(payload)
        assert [(row["user_id"], row["status"]) for row in await desk.rows()] == [(other, "past_due")]
        assert (await desk.service.access(USER)).reason == "none"
        await desk.engine.fetch("DELETE FROM subscriptions")
        await desk.engine.fetch("DELETE FROM kitrocket.dodo_subscriptions")


async def test_an_older_event_gives_its_user_to_a_subscription_without_one(desk: Desk) -> None:
    await with_user(desk)
    assert await desk.deliver(anonymous("15")) == "parked"
    assert await desk.deliver(PAYLOADS["02"]) == "applied"
    assert [(row["user_id"], row["status"]) for row in await desk.rows()] == [(USER, "past_due")]


async def test_a_deleted_users_events_are_parked(desk: Desk) -> None:
    await with_user(desk)
    await desk.deliver(PAYLOADS["02"])
    await desk.engine.fetch("DELETE FROM users WHERE id = $1", USER)
    assert await desk.deliver(PAYLOADS["15"]) == "parked"
    (mirrored,) = await desk.table("dodo_subscriptions")
    assert (mirrored["user_id"], mirrored["status"]) == (None, "on_hold")


# -- one row a user -------------------------------------------------------------------------------------------------


async def test_two_subscriptions_share_the_users_row(desk: Desk) -> None:
    await with_user(desk)
    desk.clock.now = at("2026-03-17")
    await desk.deliver(PAYLOADS["02"])
    await desk.deliver(event("02", subscription_id="sub_2", product_id="pdt_pro_m_8Kd2"))
    (row,) = await desk.rows()
    assert (row["plan"], row["dodo_subscription_id"]) == ("pro", "sub_2")
    # The end of the one that is not shown leaves every byte of the row.
    before = await desk.table("subscriptions")
    assert await desk.deliver(event("02", status="expired", timestamp="2026-03-17T00:00:00Z")) == "applied"
    assert await desk.table("subscriptions") == before


async def test_a_live_result_takes_the_live_row_of_another_writer(desk: Desk) -> None:
    await with_user(desk)
    id = await make_subscription(desk.engine, USER, dodo_subscription_id="sub_unknown", status="trialing")
    await desk.deliver(PAYLOADS["02"])
    row = await desk.service.get(USER)
    assert row is not None
    assert (row.id, row.status, row.dodo_subscription_id) == (id, "active", SUBSCRIPTION)
    assert len(await desk.rows()) == 1


async def test_a_result_that_is_over_leaves_the_row_of_another_writer(desk: Desk) -> None:
    await with_user(desk)
    id = await make_subscription(desk.engine, USER, dodo_subscription_id="sub_unknown", status="active")
    before = await desk.table("subscriptions")
    await desk.deliver(event("05", next_billing_date=None))
    shown = await desk.service.get(USER)
    assert shown is not None
    assert shown.id == id
    assert [row for row in await desk.table("subscriptions") if row["id"] == id] == before
    granted = await desk.service.access(USER)
    assert (granted.allowed, granted.reason) == (True, "row_only")


async def test_a_row_of_another_writer_alone_is_read_by_itself(desk: Desk) -> None:
    await with_user(desk)
    end = desk.clock.now + DAY
    await make_subscription(desk.engine, USER, status="active", current_period_end=end)
    for offset, allowed in ((-SECOND, True), (0 * SECOND, False), (SECOND, False)):
        desk.clock.now = end + timedelta(hours=72) + offset
        granted = await desk.service.access(USER)
        assert (granted.allowed, granted.reason, granted.plan) == (allowed, "row_only", "pro")


async def test_get_and_get_with_subscription_choose_the_same_row(desk: Desk) -> None:
    users = UserService(desk.engine, clock=desk.clock)
    cases = itertools.product(("active", "cancelled", None), ("cancelled", "expired", None), (True, False))
    for first, second, known in cases:
        user_id = await make_user(desk.engine)
        for number, status in enumerate((first, second)):
            if status is not None:
                subscription_id = f"sub_{user_id}_{number}"
                await make_subscription(
                    desk.engine,
                    user_id,
                    status=status,
                    dodo_subscription_id=subscription_id,
                    at=desk.clock.now + number * DAY,
                )
                if known and number == 0:
                    await desk.deliver(
                        event("02", status="pending", subscription_id=subscription_id, metadata={"user_id": user_id})
                    )
        both = await users.get_with_subscription(user_id)
        assert both is not None
        assert both.subscription == await desk.service.get(user_id)


# -- payments, refunds, disputes ------------------------------------------------------------------------------------


async def test_a_refund_in_halves_revokes_in_any_order_and_a_new_period_restores(desk: Desk) -> None:
    await with_user(desk)
    desk.clock.now = at("2026-03-21")
    steps = [
        PAYLOADS["02"],
        PAYLOADS["06"],
        refund("ref_1", 866, "2026-03-18T00:00:00Z"),
        refund("ref_2", 1000, "2026-03-19T00:00:00Z"),
    ]
    results = []
    for order in itertools.permutations(steps):
        for step in order:
            await desk.deliver(step)
        results.append((await desk.rows(), await desk.service.access(USER)))
        for table in ("subscriptions", "kitrocket.dodo_subscriptions", "kitrocket.dodo_payments"):
            await desk.engine.fetch(f"DELETE FROM {table}")
    assert all(result == results[0] for result in results)
    ((row,), granted) = results[0]
    assert (row["status"], row["current_period_end"]) == ("cancelled", to_db(at("2026-03-19")))
    assert row["updated_at"] == to_db(at("2026-03-19"))
    assert (granted.allowed, granted.reason) == (False, "refunded")

    for step in steps:
        await desk.deliver(step)
    await desk.deliver(
        event(
            "02",
            timestamp="2026-04-16T09:16:00Z",
            previous_billing_date="2026-04-16T09:15:04.118203Z",
            next_billing_date="2026-05-16T09:15:04.118203Z",
        )
    )
    assert (await desk.service.access(USER)).allowed


async def test_a_dispute_before_its_payment_waits_but_is_not_forgotten(desk: Desk) -> None:
    await with_user(desk)
    desk.clock.now = at("2026-03-21")
    await desk.deliver(PAYLOADS["02"])
    assert await desk.deliver(dispute("lost", "2026-03-20T00:00:00Z"), "msg_lost") == "parked"
    assert (await desk.service.access(USER)).allowed
    assert await desk.deliver(PAYLOADS["06"]) == "applied"
    assert (await desk.service.access(USER)).reason == "dispute_lost"
    assert (await desk.service.retry_parked()).finished == 1
    assert (await desk.inbox())["msg_lost"] == ("applied", None)
    assert await desk.deliver(dispute("opened", "2026-03-19T00:00:00Z")) == "stale"
    assert await desk.deliver(dispute("won", "2026-03-21T00:00:00Z")) == "applied"
    assert (await desk.service.access(USER)).reason == "active"


async def test_an_open_dispute_suspends_where_the_policy_says_so(desk: Desk) -> None:
    await with_user(desk)
    desk.clock.now = at("2026-03-21")
    desk.service = desk.open(dispute_policy="suspend")
    for step in (PAYLOADS["02"], PAYLOADS["06"], dispute("opened", "2026-03-20T00:00:00Z")):
        await desk.deliver(step)
    assert (await desk.service.access(USER)).reason == "dispute_open"
    assert [row["status"] for row in await desk.rows()] == ["past_due"]


async def test_the_index_holds_what_a_payment_said(desk: Desk) -> None:
    await desk.deliver(PAYLOADS["06"])
    (payment,) = await desk.table("dodo_payments")
    assert json.loads(payment["subscription_ids"]) == [SUBSCRIPTION]
    assert (payment["status"], payment["charge_type"], payment["total_amount"]) == ("succeeded", "renewal", 1866)
    assert await desk.deliver(event("06", status="processing", timestamp="2026-03-16T09:16:40Z")) == "stale"


# -- the transaction ------------------------------------------------------------------------------------------------


async def test_a_delivery_costs_four_messages(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    await with_user(desk)
    await desk.deliver(PAYLOADS["02"])
    sent: list[str] = []
    for name in ("fetch", "execute"):
        method = getattr(asyncpg.Connection, name)

        async def told(connection: Any, sql: str, *arguments: Any, method: Any = method, **options: Any) -> Any:
            sent.append(next(line for line in sql.splitlines() if not line.startswith("--")))
            return await method(connection, sql, *arguments, **options)

        monkeypatch.setattr(asyncpg.Connection, name, told)
    later = event("02", timestamp="2026-03-17T00:00:00Z", product_id="pdt_pro_m_8Kd2")
    assert await desk.deliver(later) == "applied"
    assert [text.split(";")[0].split("(")[0] for text in sent] == [
        "BEGIN",
        "WITH stored AS ",
        "SELECT kitrocket.write_changes",
        "COMMIT",
    ]
    assert [row["plan"] for row in await desk.rows()] == ["pro"]


async def test_concurrent_deliveries_of_one_id_are_applied_once(desk: Desk) -> None:
    await with_user(desk)
    outcomes: list[str] = []

    async def one() -> None:
        outcomes.append(await desk.deliver(PAYLOADS["02"], "msg_race"))

    async with anyio.create_task_group() as group:
        for _ in range(12):
            group.start_soon(one)
    assert sorted(outcomes) == ["applied"] + ["duplicate"] * 11
    (stored,) = await desk.table("webhook_events")
    assert stored["deliveries"] == 12


async def test_concurrent_activations_of_two_subscriptions_make_one_live_row(desk: Desk) -> None:
    await with_user(desk)
    desk.clock.now = at("2026-03-17")
    outcomes: list[str] = []

    async def one(number: int) -> None:
        subscription_id = f"sub_{number % 2}"
        payload = event("02", subscription_id=subscription_id, timestamp=f"2026-03-16T09:16:{number:02}Z")
        outcomes.append(await desk.deliver(payload))

    async with anyio.create_task_group() as group:
        for number in range(40):
            group.start_soon(one, number)
    assert set(outcomes) <= {"applied", "stale"}
    (row,) = await desk.rows()
    assert (row["status"], row["dodo_subscription_id"]) == ("active", "sub_1")
    assert {state for state, _ in (await desk.inbox()).values()} <= {"applied", "stale"}


async def test_concurrent_events_of_a_users_two_subscriptions_see_each_other(desk: Desk) -> None:
    """Each alone would show the other's subscription as it was before."""
    desk.clock.now = at("2026-03-17")
    users = [await make_user(desk.engine) for _ in range(12)]
    later = "2026-03-17T00:00:00Z"

    def of(user_id: str, which: str, **change: Any) -> dict[str, Any]:
        return event("02", subscription_id=f"{user_id}_{which}", metadata={"user_id": user_id}, **change)

    for user_id in users:
        await desk.deliver(of(user_id, "high", product_id="pdt_pro_m_8Kd2"))
        await desk.deliver(of(user_id, "low"))
    async with anyio.create_task_group() as group:
        for user_id in users:
            group.start_soon(desk.deliver, of(user_id, "high", status="expired", timestamp=later))
            group.start_soon(desk.deliver, of(user_id, "low", status="past_due", timestamp=later))
    assert {(row["plan"], row["status"]) for row in await desk.rows()} == {("starter", "past_due")}


async def test_concurrent_facts_about_a_payment_are_all_kept(desk: Desk) -> None:
    """Refunds that come before their payment share no subscription whose lock would order them."""
    payments = [f"pay_{number}" for number in range(12)]
    async with anyio.create_task_group() as group:
        for payment_id, half in itertools.product(payments, (1, 2)):
            step = refund(f"ref_{half}", 933, "2026-03-18T00:00:00Z")
            step["data"]["payment_id"] = payment_id
            group.start_soon(desk.deliver, step)
    assert {len(json.loads(row["refunds"])) for row in await desk.table("dodo_payments")} == {2}


async def test_deliveries_and_the_deletion_of_their_users_at_once(desk: Desk) -> None:
    users = [await make_user(desk.engine) for _ in range(20)]
    async with anyio.create_task_group() as group:
        for user_id in users:
            group.start_soon(desk.deliver, event("02", subscription_id=f"sub_{user_id}", metadata={"user_id": user_id}))
            group.start_soon(desk.engine.fetch, "DELETE FROM users WHERE id = $1", user_id)
    assert set((await desk.inbox()).values()) <= {("applied", None), ("parked", "no_user")}
    assert {row["user_id"] for row in await desk.table("dodo_subscriptions")} == {None}
    assert await desk.rows() == []


async def test_a_user_whose_deletion_commits_meanwhile_is_missing(desk: Desk) -> None:
    await with_user(desk)
    other = await desk.engine.acquire()
    await other.fetch("BEGIN")
    await other.fetch("DELETE FROM users WHERE id = $1", USER)
    async with anyio.create_task_group() as group:
        group.start_soon(desk.deliver, PAYLOADS["02"], "msg_late")
        await desk.somebody_waits()
        await other.fetch("COMMIT")
    await desk.engine.give_back(other)
    assert await desk.inbox() == {"msg_late": ("parked", "no_user")}


async def test_a_live_row_that_another_writer_commits_meanwhile_is_taken(desk: Desk) -> None:
    await with_user(desk)
    other = await desk.engine.acquire()
    await other.execute("BEGIN")
    await other.fetch(
        "INSERT INTO subscriptions (id, user_id, plan, status) VALUES ('theirs', $1, 'pro', 'active')", USER
    )
    async with anyio.create_task_group() as group:
        group.start_soon(desk.deliver, PAYLOADS["02"], "msg_meets")
        await desk.somebody_waits()
        await other.execute("COMMIT")
    await desk.engine.give_back(other)
    assert await desk.inbox() == {"msg_meets": ("applied", None)}
    row = await desk.service.get(USER)
    assert row is not None
    assert (row.id, row.plan) == ("theirs", "starter")


async def test_a_storm_of_shuffled_events_ends_where_order_would(desk: Desk) -> None:
    """Payments, refunds and snapshots of a user's two subscriptions, all at once."""
    await with_user(desk)
    desk.clock.now = at("2026-07-11")
    payloads = [
        *(PAYLOADS[number] for number in SUBSCRIPTION_EVENTS),
        *(event(number, subscription_id="sub_2") for number in SUBSCRIPTION_EVENTS),
        event("06", subscription_ids=[SUBSCRIPTION, "sub_2"]),
        refund("ref_1", 866, "2026-03-18T00:00:00Z"),
        refund("ref_2", 1000, "2026-03-19T00:00:00Z"),
        PAYLOADS["07"],
    ]
    results = []
    for concurrent in (False, True, True, True):
        async with anyio.create_task_group() as group:
            for number, payload in enumerate(payloads[::-1] if concurrent else payloads):
                if concurrent:
                    group.start_soon(desk.deliver, payload)
                else:
                    await desk.deliver(payload, f"msg_in_order_{number}")
        results.append(await desk.rows())
        for table in ("subscriptions", "kitrocket.dodo_subscriptions", "kitrocket.dodo_payments"):
            await desk.engine.fetch(f"DELETE FROM {table}")
    assert all(result == results[0] for result in results)
    assert "received" not in {state for state, _ in (await desk.inbox()).values()}


async def test_bad_input_stores_nothing(desk: Desk) -> None:
    body = json.dumps(PAYLOADS["02"]).encode()
    good = sign(body, key=KEY, webhook_id="msg_bad", at=desk.clock.now)
    for bad_body, headers in (
        (body, {}),
        (body, good | {"webhook-signature": "v1,x"}),
        (body + b" ", good),
        (b"[]", sign(b"[]", key=KEY, webhook_id="msg_bad", at=desk.clock.now)),
        (b"x" * 2_097_153, good),
        (body.decode(), good),
    ):
        with pytest.raises(WebhookError):
            await desk.service.receive(bad_body, headers)  # type: ignore[arg-type]  # that is what is bad about one
    with pytest.raises(WebhookNotConfiguredError):
        await desk.open(webhook_keys=[]).receive(body, good)
    assert await desk.table("webhook_events") == []


async def test_an_event_that_fails_unexpectedly_is_stored_and_tried_again(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    await with_user(desk)
    await desk.engine.fetch("ALTER TABLE subscriptions ADD CONSTRAINT no_starter CHECK (plan <> 'starter')")
    assert await desk.deliver(PAYLOADS["02"], "msg_fails") == "parked"
    (stored,) = await desk.table("webhook_events")
    assert (stored["state"], stored["attempts"], stored["last_error"]) == ("received", 1, "CheckViolationError 23514")
    assert stored["next_attempt_at"] == to_db(desk.clock.now + timedelta(seconds=60))
    assert await desk.bytes_of_state() == [[], [], []]
    assert "msg_fails" in caplog.text
    assert all(word not in caplog.text for word in ("maya", "okafor", SUBSCRIPTION, USER))

    await desk.engine.fetch("ALTER TABLE subscriptions DROP CONSTRAINT no_starter")
    due = desk.clock.now + timedelta(seconds=60)
    for offset, tried in ((-SECOND, 0), (0 * SECOND, 1), (SECOND, 0)):
        desk.clock.now = due + offset
        assert (await desk.service.retry_parked()).tried == tried
    assert await desk.service.get(USER) is not None


async def test_an_event_that_keeps_failing_is_given_up(desk: Desk) -> None:
    await desk.deliver(anonymous("02"), "msg_dead")
    pauses = []
    for _ in range(7):
        (stored,) = await desk.table("webhook_events")
        pauses.append(stored["next_attempt_at"] - to_db(desk.clock.now))
        desk.clock.now = stored["next_attempt_at"].replace(tzinfo=UTC)
        await desk.service.retry_parked()
    assert pauses == [timedelta(seconds=60 * 4**n) for n in range(5)] + [timedelta(hours=6)] * 2
    assert await desk.inbox() == {"msg_dead": ("dead", "no_user")}
    desk.clock.advance(10 * DAY)
    assert (await desk.service.retry_parked()).tried == 0
    await with_user(desk, email="maya.okafor@example.com", email_verified=desk.clock.now)
    assert (await desk.service.retry_parked()).finished == 1


async def test_a_lock_held_elsewhere_is_waited_for_then_refused_with_nothing_stored(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await with_user(desk)
    monkeypatch.setattr("kitrocket.subscriptions.service._LOCK", timedelta(milliseconds=50))
    other = await desk.engine.acquire()
    await other.execute("BEGIN")
    await other.execute("UPDATE users SET id = id || 'x'")
    with pytest.raises(DatabaseUnavailableError) as caught:
        await desk.deliver(PAYLOADS["02"], "msg_held")
    await other.execute("ROLLBACK")
    await desk.engine.give_back(other)
    assert isinstance(caught.value.__cause__, asyncpg.LockNotAvailableError)
    assert await desk.table("webhook_events") == []
    assert await desk.deliver(PAYLOADS["02"], "msg_held") == "applied"


async def test_a_receipt_comes_only_after_the_commit(desk: Desk) -> None:
    await with_user(desk)
    await desk.engine.fetch(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not today'; END $$"
    )
    await desk.engine.fetch(
        "CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON kitrocket.webhook_events DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    with pytest.raises(asyncpg.RaiseError):
        await desk.deliver(PAYLOADS["02"])
    assert await desk.table("webhook_events") == []
    assert await desk.rows() == []


# -- replay, input --------------------------------------------------------------------------------------------------


async def test_replay_repairs_the_row_and_changes_nothing_the_second_time(desk: Desk) -> None:
    await with_user(desk)
    desk.clock.now = at("2026-03-17")
    await desk.deliver(PAYLOADS["02"], "msg_2")
    expected = await desk.rows()
    await desk.engine.fetch("UPDATE subscriptions SET plan = 'pro', status = 'cancelled'")
    assert (await desk.service.replay("msg_2")).outcome == "applied"
    assert await desk.rows() == expected
    before = [*await desk.bytes_of_state(), await desk.table("webhook_events")]
    assert (await desk.service.replay("msg_2")).outcome == "applied"
    assert [*await desk.bytes_of_state(), await desk.table("webhook_events")] == before


async def test_replay_of_an_unknown_event_is_an_error(desk: Desk) -> None:
    with pytest.raises(WebhookNotFoundError):
        await desk.service.replay("msg_nowhere")


@pytest.mark.parametrize("junk", ["", "a\0b", "x" * 256, None, 7, b"x"])
async def test_junk_ids_are_refused(desk: Desk, junk: Any) -> None:
    for method in (desk.service.get, desk.service.access, desk.service.replay):
        with pytest.raises(InvalidInputError):
            await method(junk)


async def test_an_unknown_user_has_nothing(desk: Desk) -> None:
    assert await desk.service.get("nobody") is None
    granted = await desk.service.access("nobody")
    assert (granted.allowed, granted.plan, granted.reason) == (False, None, "none")


async def test_settings_that_contradict_each_other_are_refused(desk: Desk) -> None:
    for options in ({"products": {"pdt": "gold"}}, {"webhook_keys": ["junk"]}, {"dispute_policy": "ask"}):
        with pytest.raises(ConfigurationError):
            desk.open(**options)
