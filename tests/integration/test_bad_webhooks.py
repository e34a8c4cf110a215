"""Junk is refused and stores nothing; what is odd but signed is stored, raises nothing and downgrades nobody."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

from delivering import PAYLOADS, SUBSCRIPTION_EVENTS, USER, Desk, at, event, junk, with_user
from kitrocket.engine import Engine
from kitrocket.errors import WebhookError
from kitrocket.testing import ManualClock

pytestmark = pytest.mark.asyncio


@pytest.fixture
def desk(engine: Engine, clock: ManualClock) -> Desk:
    return Desk(engine, clock)


async def test_junk_is_refused_and_leaves_the_database_as_it_was(desk: Desk) -> None:
    await with_user(desk)
    await desk.deliver(PAYLOADS["01"], "msg_known")
    before = [*await desk.bytes_of_state(), await desk.table("webhook_events")]
    statuses: dict[int, int] = {}
    for body, headers in junk(desk.clock.now):
        with pytest.raises(WebhookError) as caught:
            await desk.service.receive(body, headers)
        statuses[caught.value.status_code] = statuses.get(caught.value.status_code, 0) + 1
        assert len(str(caught.value)) < 80
    assert sum(statuses.values()) >= 300
    assert set(statuses) == {400, 401, 413}
    assert [*await desk.bytes_of_state(), await desk.table("webhook_events")] == before


ODD: list[Any] = [None, "", "1", 1, 1.5, -1, True, [], {}, "x" * 300, "\0", "new_value", "2026-13-45", 10**30, [None]]


def odd(rng: random.Random, payload: dict[str, Any]) -> dict[str, Any]:
    """Take out, add or change a few fields of a payload's data, somewhere in it."""
    changed = copy.deepcopy(payload)
    for _ in range(rng.randrange(1, 4)):
        place: Any = changed["data"]
        while rng.random() < 0.4 and (inner := [v for v in place.values() if isinstance(v, dict) and v]):
            place = rng.choice(inner)
        name = rng.choice(sorted(place))
        match rng.randrange(3):
            case 0:
                del place[name]
            case 1:
                place[f"new_{rng.randrange(9)}"] = rng.choice(ODD)
            case _:
                place[name] = rng.choice(ODD)
        if not place:
            break
    if rng.random() < 0.1:
        changed["type"] = f"{payload['type'].partition('.')[0]}.invented_{rng.randrange(20)}"
    return changed


async def test_a_thousand_odd_payloads_are_stored_raise_nothing_and_downgrade_nobody(desk: Desk) -> None:
    """Each is older than what is known, and as active as that: whatever it says, access may not get less."""
    await with_user(desk)
    desk.clock.now = at("2026-03-20")
    await desk.deliver(event("02", timestamp="2026-03-19T00:00:00Z"), "msg_newest")
    rows = await desk.table("subscriptions")
    rng = random.Random(5)
    outcomes: dict[str, int] = {}
    for number in range(1000):
        payload = odd(rng, PAYLOADS[rng.choice(["01", "02", "12", "13", "x1", *SUBSCRIPTION_EVENTS])])
        payload["timestamp"] = "2026-03-18T00:00:00Z"
        outcome = await desk.deliver(payload, f"msg_odd_{number}")
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert set(outcomes) <= {"applied", "stale", "parked", "ignored"}
    assert await desk.engine.fetchval("SELECT count(*) FROM kitrocket.webhook_events") == 1001
    assert await desk.engine.fetchval("SELECT count(*) FROM kitrocket.webhook_events WHERE state = 'received'") == 0
    assert (await desk.service.access(USER)).allowed
    mine = [row for row in await desk.table("subscriptions") if row["user_id"] == USER]
    assert [row["status"] for row in mine] == [row["status"] for row in rows]


async def test_fifty_unknown_statuses_and_products_leave_every_byte_of_the_row(desk: Desk) -> None:
    await with_user(desk)
    desk.clock.now = at("2026-03-20")
    await desk.deliver(PAYLOADS["02"])
    before = await desk.bytes_of_state()
    for number in range(50):
        change = {"status": f"status_{number}"} if number % 2 else {"product_id": f"pdt_{number}"}
        assert await desk.deliver(event("02", timestamp="2026-03-19T00:00:00Z", **change)) == "parked"
    assert await desk.bytes_of_state() == before
