"""Incidents: opened once, closed when they are over, whatever order the events come in."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import anyio
import pytest

from delivering import PAYLOADS, SUBSCRIPTION, USER, Desk, at, event, refund, with_user
from kitrocket.engine import Engine
from kitrocket.testing import ManualClock

pytestmark = pytest.mark.asyncio


@pytest.fixture
def desk(engine: Engine, clock: ManualClock) -> Desk:
    return Desk(engine, clock)


async def incidents(desk: Desk) -> list[tuple[Any, ...]]:
    rows = await desk.engine.fetch("SELECT * FROM kitrocket.billing_incidents ORDER BY kind, opened_at")
    return [(row["kind"], row["subject"], row["user_id"], row["closed_at"] is None) for row in rows]


async def test_two_hundred_activations_of_two_subscriptions_make_one_row_and_one_incident(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last of them waits for all others, and the machine may be busy.
    monkeypatch.setattr("kitrocket.subscriptions.service._TOTAL", timedelta(seconds=60))
    await with_user(desk)
    desk.clock.now = at("2026-03-17")
    async with anyio.create_task_group() as group:
        for number in range(200):
            at_text = f"2026-03-16T09:{number // 60:02}:{number % 60:02}Z"
            group.start_soon(desk.deliver, event("02", subscription_id=f"sub_{number % 2}", timestamp=at_text))
    assert len(await desk.rows()) == 1
    assert await incidents(desk) == [("double_billing", USER, USER, True)]
    detail = json.loads(await desk.engine.fetchval("SELECT detail FROM kitrocket.billing_incidents"))
    assert detail == {"subscriptions": ["sub_0", "sub_1"]}

    await desk.deliver(event("02", subscription_id="sub_1", timestamp="2026-03-16T10:00:00Z", status="cancelled"))
    assert await incidents(desk) == [("double_billing", USER, USER, False)]
    await desk.deliver(event("02", subscription_id="sub_1", timestamp="2026-03-16T11:00:00Z"))
    assert [one[3] for one in await incidents(desk)] == [False, True]


async def test_one_that_ends_by_itself_bills_nobody_twice(desk: Desk) -> None:
    await with_user(desk)
    await desk.deliver(PAYLOADS["02"])
    await desk.deliver(event("02", subscription_id="sub_2", cancel_at_next_billing_date=True))
    assert await incidents(desk) == []


async def test_a_refunded_subscription_that_bills_on_is_told_until_it_ends(desk: Desk) -> None:
    await with_user(desk)
    desk.clock.now = at("2026-03-21")
    for step in (PAYLOADS["02"], PAYLOADS["06"], refund("ref_1", None, "2026-03-18T00:00:00Z")):
        await desk.deliver(step)
    assert await incidents(desk) == [("still_billing", SUBSCRIPTION, USER, True)]
    assert (await desk.service.access(USER)).reason == "refunded"
    await desk.deliver(event("02", status="cancelled", timestamp="2026-03-19T00:00:00Z"))
    assert await incidents(desk) == [("still_billing", SUBSCRIPTION, USER, False)]


async def test_a_subscription_that_moves_takes_its_incident_along(desk: Desk) -> None:
    await with_user(desk)
    await desk.engine.fetch("INSERT INTO users (id, email, name) VALUES ('other', 'o@example.com', 'O')")
    await desk.deliver(PAYLOADS["02"])
    await desk.deliver(event("02", subscription_id="sub_2"))
    moved = event("02", subscription_id="sub_2", timestamp="2026-03-17T00:00:00Z", metadata={"user_id": "other"})
    assert await desk.deliver(moved) == "applied"
    assert await incidents(desk) == [("double_billing", USER, USER, False)]
    assert {row["user_id"] for row in await desk.rows()} == {USER, "other"}


@pytest.mark.parametrize("other", ["aaa", "zzz"])
async def test_an_incident_follows_its_subscription_to_whichever_user_it_moves(desk: Desk, other: str) -> None:
    await with_user(desk)
    assert (other < USER) == (other == "aaa")
    await desk.engine.fetch("INSERT INTO users (id, email, name) VALUES ($1, 'o@example.com', 'O')", other)
    desk.clock.now = at("2026-03-21")
    for step in (PAYLOADS["02"], PAYLOADS["06"], refund("ref_1", None, "2026-03-18T00:00:00Z")):
        await desk.deliver(step)
    assert await incidents(desk) == [("still_billing", SUBSCRIPTION, USER, True)]
    assert await desk.deliver(event("02", timestamp="2026-03-19T00:00:00Z", metadata={"user_id": other})) == "applied"
    assert await incidents(desk) == [("still_billing", SUBSCRIPTION, other, True)]
    await desk.deliver(event("02", status="cancelled", timestamp="2026-03-20T00:00:00Z", metadata={"user_id": other}))
    assert await incidents(desk) == [("still_billing", SUBSCRIPTION, other, False)]
