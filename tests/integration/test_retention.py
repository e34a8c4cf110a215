"""Payloads go when they were kept long enough, and with their user; what else is known of an event stays."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

import anyio
import pytest

from delivering import DAY, PAYLOADS, SECOND, USER, Desk, anonymous, event, with_user
from factories import make_user
from kitrocket.engine import Engine
from kitrocket.errors import WebhookPayloadPurgedError
from kitrocket.testing import ManualClock
from kitrocket.users import UserService

pytestmark = pytest.mark.asyncio


@pytest.fixture
def desk(engine: Engine, clock: ManualClock) -> Desk:
    return Desk(engine, clock)


async def kept(desk: Desk) -> set[str]:
    return {row["webhook_id"] for row in await desk.table("webhook_events") if row["payload"] is not None}


@pytest.mark.parametrize(("offset", "purged"), [(-SECOND, 0), (0 * SECOND, 0), (SECOND, 1)])
@pytest.mark.parametrize(("webhook", "days"), [("msg_done", 90), ("msg_parked", 180)])
async def test_a_payload_goes_after_its_days(
    desk: Desk, offset: timedelta, purged: int, webhook: str, days: int
) -> None:
    if webhook == "msg_done":
        await with_user(desk)
    assert await desk.deliver(PAYLOADS["02"], webhook) == ("applied" if webhook == "msg_done" else "parked")
    desk.clock.advance(days * DAY + offset)
    assert await desk.service.purge() == purged
    (stored,) = await desk.table("webhook_events")
    assert (stored["payload"] is None) == bool(purged)
    if purged:
        # A late delivery is a duplicate still, and says so by its type.
        assert stored["type"] == "subscription.renewed"
        assert stored["body_sha256"]
        with pytest.raises(WebhookPayloadPurgedError, match=webhook):
            await desk.service.replay(webhook)
        if webhook == "msg_done":
            assert await desk.deliver(PAYLOADS["02"], webhook) == "duplicate"


async def test_the_tick_purges_once_an_hour(desk: Desk) -> None:
    desk.service = desk.open(retention_days=1)
    await desk.deliver(PAYLOADS["12"])
    desk.clock.advance(DAY)
    assert (await desk.service.retry_parked()).purged == 0
    desk.clock.advance(timedelta(minutes=59))
    assert (await desk.service.retry_parked()).purged == 0
    desk.clock.advance(timedelta(minutes=1))
    assert (await desk.service.retry_parked()).purged == 1


async def test_a_deleted_users_payloads_go_in_the_same_transaction(desk: Desk) -> None:
    await with_user(desk)
    other = await make_user(desk.engine)
    users = UserService(desk.engine, clock=desk.clock)
    await desk.deliver(anonymous("02", subscription_id="sub_9"), "msg_before")
    await desk.deliver(PAYLOADS["02"], "msg_own")
    await desk.deliver(PAYLOADS["06"], "msg_payment")
    await desk.deliver(event("15", status="frozen"), "msg_unknown")
    customer = PAYLOADS["02"]["data"]["customer"] | {"customer_id": "cus_other"}
    await desk.deliver(
        event("02", subscription_id="sub_2", metadata={"user_id": other}, customer=customer), "msg_other"
    )
    await users.delete(USER)
    assert await kept(desk) == {"msg_other"}
    assert {row["customer_email"] for row in await desk.table("webhook_events")} == {None}


async def test_a_user_deleted_past_kitrocket_is_noticed(desk: Desk) -> None:
    await with_user(desk)
    await desk.deliver(PAYLOADS["02"], "msg_own")
    assert await desk.service.purge() == 0
    await desk.engine.fetch("DELETE FROM users")
    assert await desk.service.purge() == 1
    assert await kept(desk) == set()


async def test_deletions_and_deliveries_at_once_never_deadlock(desk: Desk) -> None:
    users = UserService(desk.engine, clock=desk.clock)
    ids = [await make_user(desk.engine) for _ in range(20)]
    for user_id in ids:
        await desk.deliver(event("02", subscription_id=f"sub_{user_id}", metadata={"user_id": user_id}), f"a_{user_id}")

    async def replay(webhook_id: str) -> None:
        with suppress(WebhookPayloadPurgedError):
            await desk.service.replay(webhook_id)

    async with anyio.create_task_group() as group:
        for user_id in ids:
            again = event("15", subscription_id=f"sub_{user_id}", metadata={"user_id": user_id})
            group.start_soon(desk.deliver, again, f"b_{user_id}")
            group.start_soon(users.delete, user_id)
            group.start_soon(replay, f"a_{user_id}")
    found = await desk.engine.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    assert found == 0
    assert {row["user_id"] for row in await desk.table("dodo_subscriptions")} == {None}
    assert not {id for id in await kept(desk) if id.startswith("a_")}
