"""What waited, failed or was given up is repaired: by one sweep, by replay, and never at another event's expense."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio

from delivering import PRODUCTS, Desk, anonymous, event
from factories import make_user
from kitrocket.engine import Engine
from kitrocket.subscriptions import service
from kitrocket.subscriptions.inbox import pause_after
from kitrocket.testing import ManualClock


@pytest_asyncio.fixture
async def desk(engine: Engine, clock: ManualClock) -> Desk:
    return Desk(engine, clock)


def of(person: int, **data: Any) -> dict[str, Any]:
    """An activation that names its user."""
    return event("02", subscription_id=f"sub_{person:04}", metadata={"user_id": f"user_{person:04}"}, **data)


def by_email(person: int) -> dict[str, Any]:
    """An activation that names nobody but an address."""
    customer = {"customer_id": f"cus_{person:04}", "email": f"Person{person:04}@example.com", "metadata": {}}
    return anonymous("02", subscription_id=f"sub_{person:04}", customer=customer)


async def orphans(desk: Desk, count: int) -> None:
    """Deliver so many events without users, half by name and half by address; then their users come, and strangers."""
    people = list(range(count + count // 10))
    random.Random(5).shuffle(people)
    for person in people:
        outcome = await desk.deliver(of(person) if person < count // 2 else by_email(person), f"msg_{person:04}")
        assert outcome == "parked"
    assert (await desk.service.retry_parked()).tried == 0
    for person in people:
        # The last tenth claim an address that they never proved to have.
        verified = desk.clock.now if person < count else None
        await make_user(
            desk.engine, id=f"user_{person:04}", email=f"person{person:04}@example.com", email_verified=verified
        )
    swept = await desk.service.retry_parked()
    assert (swept.tried, swept.finished) == (count, count)
    rows = await desk.engine.fetch("SELECT user_id, dodo_subscription_id FROM subscriptions ORDER BY 1")
    assert [tuple(row) for row in rows] == [(f"user_{person:04}", f"sub_{person:04}") for person in range(count)]
    waiting = {f"msg_{person:04}": ("parked", "no_user") for person in range(count, len(people))}
    assert {id: state for id, state in (await desk.inbox()).items() if state[0] != "applied"} == waiting
    assert (await desk.service.retry_parked()).tried == 0


@pytest.mark.asyncio
async def test_fifty_orphans_are_linked_by_one_sweep(desk: Desk) -> None:
    await orphans(desk, 50)


@pytest.mark.storm
@pytest.mark.timeout(600)
@pytest.mark.asyncio
async def test_a_thousand_orphans_are_linked_by_one_sweep(desk: Desk) -> None:
    await orphans(desk, 1000)


async def replays(desk: Desk, count: int) -> None:
    """Replay so many finished events and so many that were given up, half of which could be applied by now, twice."""
    finished, dead = range(count), range(count, 2 * count)
    for person in finished:
        await make_user(desk.engine, id=f"user_{person:04}")
        assert await desk.deliver(of(person), f"msg_{person:04}") == "applied"
    for person in dead:
        assert await desk.deliver(of(person), f"msg_{person:04}") == "parked"
    desk.service = desk.open(max_attempts=2)
    desk.clock.advance(timedelta(minutes=1))
    assert (await desk.service.retry_parked()).dead == count
    for person in dead[: count // 2]:
        await make_user(desk.engine, id=f"user_{person:04}")

    async def replay_all() -> list[Any]:
        for person in [*finished, *dead]:
            desk.clock.advance(timedelta(seconds=1))
            await desk.service.replay(f"msg_{person:04}")
        return [*await desk.bytes_of_state(), await desk.table("webhook_events")]

    after = await replay_all()
    assert await replay_all() == after
    states = [state for state, _ in (await desk.inbox()).values()]
    assert (states.count("applied"), states.count("dead")) == (count + count // 2, count - count // 2)
    assert await desk.engine.fetchval("SELECT count(*) FROM subscriptions") == count + count // 2


@pytest.mark.asyncio
async def test_replaying_twice_changes_nothing_the_second_time(desk: Desk) -> None:
    await replays(desk, 20)


@pytest.mark.storm
@pytest.mark.timeout(600)
@pytest.mark.asyncio
async def test_replaying_two_thousand_twice_changes_nothing_the_second_time(desk: Desk) -> None:
    await replays(desk, 1000)


@pytest.mark.asyncio
async def test_an_event_that_cannot_be_applied_never_blocks_another(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for person in range(6):
        product = next(id for id, plan in PRODUCTS.items() if plan == ("starter" if person % 2 else "pro"))
        assert await desk.deliver(of(person, product_id=product), f"msg_{person}") == "parked"
    for person in range(6):
        await make_user(desk.engine, id=f"user_{person:04}")
    # Three fail for a reason of their own, and one is held by somebody else.
    await desk.engine.fetch("ALTER TABLE subscriptions ADD CONSTRAINT no_starter CHECK (plan <> 'starter')")
    monkeypatch.setattr(service, "_LOCK", timedelta(milliseconds=20))
    other = await desk.engine.acquire()
    await other.execute("BEGIN")
    await other.execute("SELECT id FROM users WHERE id = 'user_0000' FOR UPDATE")
    result = await desk.service.retry_parked()
    await other.execute("ROLLBACK")
    await desk.engine.give_back(other)
    assert (result.tried, result.finished) == (5, 2)
    assert "msg_0 is held elsewhere and left for the next time: LockNotAvailableError" in caplog.text
    assert await desk.inbox() == {
        "msg_0": ("parked", "no_user"),
        "msg_2": ("applied", None),
        "msg_4": ("applied", None),
        **{f"msg_{person}": ("received", None) for person in (1, 3, 5)},
    }
    # Nor does one of the failing keep a delivery about its own subscription from being stored.
    assert await desk.deliver(of(1), "msg_again") == "parked"

    await desk.engine.fetch("ALTER TABLE subscriptions DROP CONSTRAINT no_starter")
    assert (await desk.service.retry_parked()).finished == 1
    desk.clock.advance(timedelta(minutes=4))
    assert (await desk.service.retry_parked()).finished == 4


@pytest.mark.parametrize(("jitter", "share"), [(0.0, 0.8), (0.5, 1.0), (1.0, 1.2)])
def test_pauses_grow_to_six_hours_within_a_fifth(jitter: float, share: float) -> None:
    expected = [60 * 4**n for n in range(5)] + [6 * 3600] * 20
    assert [pause_after(n, jitter).total_seconds() for n in range(1, 26)] == [
        pytest.approx(seconds * share) for seconds in expected
    ]
