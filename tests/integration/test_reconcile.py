"""Reconciliation with the provider, through its own SDK, over HTTP."""

from __future__ import annotations

import random
from typing import Any

import pytest
import pytest_asyncio
from starlette.responses import JSONResponse, Response

from delivering import DAY, PAYLOADS, PRODUCTS, SUBSCRIPTION, USER, Desk, at, event, refund, with_user
from dodo_server import DodoServer
from factories import make_user
from kitrocket.engine import Engine
from kitrocket.errors import ConfigurationError, ProviderError
from kitrocket.models import Difference
from kitrocket.testing import ManualClock
from simulating import NOW, expected_rows, simulate
from simulating import PRODUCTS as SIMULATED
from storming import deliver_all, service_of

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def desk(engine: Engine, clock: ManualClock, dodo: DodoServer) -> Desk:
    desk = Desk(engine, clock)
    desk.clock.now = at("2026-03-17")
    desk.service = desk.open(api_key="key", base_url=dodo.url, requests_per_second=10_000)
    return await with_user(desk)


def knows(dodo: DodoServer, *events: dict[str, Any]) -> None:
    for one in events:
        dodo.subscriptions[one["data"]["subscription_id"]] = one["data"]


async def test_a_missed_renewal_is_taken_over(desk: Desk, dodo: DodoServer) -> None:
    await desk.deliver(PAYLOADS["01"])
    knows(dodo, PAYLOADS["02"])
    before = await desk.bytes_of_state()
    dry = await desk.service.reconcile(dry_run=True)
    assert await desk.bytes_of_state() == before
    assert (
        Difference(
            subscription_id=SUBSCRIPTION,
            field="next_billing_date",
            ours="2026-03-16T09:15:04.118203+00:00",
            theirs="2026-04-16T09:15:04.118203+00:00",
        )
        in dry.differences
    )

    result = await desk.service.reconcile()
    assert (result.checked, result.fetched, result.changed, result.failed) == (1, 1, 1, 0)
    assert result.differences == dry.differences
    assert (await desk.service.access(USER)).reason == "active"
    (mirrored,) = await desk.table("dodo_subscriptions")
    assert mirrored["event_key"] == before[1][0]["event_key"]
    assert mirrored["fetched_at"] is not None

    again = await desk.service.reconcile()
    assert (again.fetched, again.changed, again.requests) == (0, 0, 1)
    # The event that was lost and comes late is newer than what was known, and says the same.
    assert await desk.deliver(PAYLOADS["02"]) == "applied"
    assert (await desk.service.access(USER)).reason == "active"


async def test_what_no_webhook_told_is_found(desk: Desk, dodo: DodoServer) -> None:
    knows(dodo, PAYLOADS["02"])
    assert (await desk.service.reconcile()).changed == 1
    row = await desk.service.get(USER)
    assert row is not None
    assert row.status == "active"
    # Any event is newer than a fetch that followed none.
    assert await desk.deliver(PAYLOADS["01"]) == "applied"


async def test_a_deadline_that_is_not_told_stays_while_it_is_past_due(desk: Desk, dodo: DodoServer) -> None:
    await desk.deliver(PAYLOADS["04"])
    knows(dodo, event("04", product_id="pdt_starter_m_4Vb7"))
    result = await desk.service.reconcile()
    assert [one.field for one in result.differences] == ["product_id"]
    (mirrored,) = await desk.table("dodo_subscriptions")
    assert mirrored["past_due_ends_at"] is not None


@pytest.mark.parametrize("count", [0, 100, 101])
async def test_pages_are_read_whole(desk: Desk, dodo: DodoServer, count: int) -> None:
    knows(dodo, *(event("02", subscription_id=f"sub_{number:04}", status="pending") for number in range(count)))
    result = await desk.service.reconcile(dry_run=True)
    assert result.checked == count
    assert dodo.requests.count("/subscriptions") == count // 100 + 1
    assert len(result.differences) == count


async def test_a_webhook_that_is_faster_is_never_overwritten(desk: Desk, dodo: DodoServer) -> None:
    await desk.deliver(PAYLOADS["01"])
    knows(dodo, PAYLOADS["02"])

    async def meanwhile(path: str, _number: int) -> None:
        if path != "/subscriptions":
            await desk.deliver(PAYLOADS["15"])

    dodo.trouble = meanwhile
    result = await desk.service.reconcile()
    assert (result.raced, result.changed) == (1, 0)
    assert (await desk.service.access(USER)).reason == "on_hold"


async def test_what_the_provider_does_not_know_is_an_incident_and_stays(desk: Desk, dodo: DodoServer) -> None:
    await desk.deliver(PAYLOADS["02"])
    rows = await desk.table("subscriptions")
    result = await desk.service.reconcile()
    assert (result.checked, result.gone, result.requests) == (0, 1, 2)
    assert await desk.table("subscriptions") == rows
    found = await desk.engine.fetch("SELECT kind, subject, user_id FROM kitrocket.billing_incidents")
    assert [tuple(row) for row in found] == [("drift", SUBSCRIPTION, USER)]
    await desk.service.reconcile()
    assert await desk.engine.fetchval("SELECT count(*) FROM kitrocket.billing_incidents") == 1


async def test_an_unknown_payment_is_asked_for(desk: Desk, dodo: DodoServer) -> None:
    for step in (PAYLOADS["02"], refund("ref_1", None, "2026-03-16T12:00:00Z")):
        await desk.deliver(step)
    knows(dodo, PAYLOADS["02"])
    dodo.payments["pay_Zf4sHc8yUe1D"] = PAYLOADS["06"]["data"]
    assert (await desk.service.access(USER)).allowed
    await desk.service.reconcile()
    assert (await desk.service.access(USER)).reason == "refunded"
    assert (await desk.service.retry_parked()).finished == 1


async def test_bad_days_are_waited_out_and_one_failure_stops_nothing(
    desk: Desk, dodo: DodoServer, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"sub_{number}" for number in range(4)]
    knows(dodo, *(event("02", subscription_id=name) for name in names))
    knows(dodo, event("02", subscription_id="sub_odd", product_id="pdt_new"))
    bad = [JSONResponse({}, 429, {"retry-after": "0"}), JSONResponse({}, 500, {"retry-after": "0"})]

    async def trouble(path: str, number: int) -> Response | None:
        if number <= len(bad):
            return bad[number - 1]
        return JSONResponse({}, 400) if path.endswith("sub_2") else None

    dodo.trouble = trouble
    result = await desk.service.reconcile()
    assert (result.checked, result.changed, result.failed) == (5, 3, 2)
    assert "sub_2 could not be checked: ProviderError" in caplog.text


async def test_a_wrong_key_is_told(desk: Desk, dodo: DodoServer) -> None:
    desk.service = desk.open(api_key="other", base_url=dodo.url, requests_per_second=10_000)
    with pytest.raises(ProviderError, match="DODO_PAYMENTS_API_KEY"):
        await desk.service.reconcile()
    with pytest.raises(ConfigurationError):
        await desk.open().reconcile()


async def test_the_tick_asks_about_what_is_in_doubt(desk: Desk, dodo: DodoServer) -> None:
    await desk.deliver(PAYLOADS["02"])
    desk.clock.now = at("2026-04-17")
    renewed = {"previous_billing_date": "2026-04-16T09:15:04.118203Z", "next_billing_date": "2026-05-16T09:15:04Z"}
    knows(dodo, event("02"))
    await desk.service.retry_parked()
    assert (await desk.service.access(USER)).reason == "renewal_unconfirmed"
    knows(dodo, event("02", **renewed))
    await desk.service.retry_parked()
    assert len(dodo.requests) == 1
    desk.clock.advance(DAY)
    await desk.service.retry_parked()
    assert (await desk.service.access(USER)).reason == "active"
    assert len(dodo.requests) == 2


async def test_what_was_lost_is_found_in_one_pass(engine: Engine, dodo: DodoServer) -> None:
    world = simulate(11, subscriptions=100, events=1000)
    for user_id in [*world.users, *world.late_users]:
        await make_user(engine, id=user_id)
    rng = random.Random(11)
    kept = [one for one in world.events if rng.random() > 0.02]
    await deliver_all(service_of(engine), [(one.webhook_id, one.body) for one in kept], workers=4)
    import json

    for one in world.events:
        data = json.loads(one.body)["data"]
        if "status" in data and "product_id" in data:
            known = dodo.subscriptions.get(data["subscription_id"])
            # The state of the last event, with the user that was last named.
            if known is not None and not data["metadata"] and not data["customer"]["metadata"]:
                data |= {"metadata": known["metadata"], "customer": known["customer"]}
            dodo.subscriptions[data["subscription_id"]] = data
    service = type(service_of(engine))(
        engine,
        clock=lambda: NOW,
        products=SIMULATED,
        api_key="key",
        base_url=dodo.url,
        requests_per_second=10_000,
    )
    result = await service.reconcile()
    assert (result.checked, result.failed, result.raced) == (100, 0, 0)
    again = await service.reconcile(dry_run=True)
    assert again.differences == []
    assert result.requests <= 2 + result.fetched
    found = {row["user_id"]: row["plan"] for row in await engine.fetch("SELECT user_id, plan FROM subscriptions")}
    assert len(found) >= len(expected_rows(world)) - 2
    assert set(PRODUCTS.values()) == set(SIMULATED.values())
