"""Reconciliation with the provider, through its own SDK, over HTTP."""

from __future__ import annotations

import random
from datetime import datetime
from typing import Any

import anyio
import pytest
import pytest_asyncio
from starlette.responses import JSONResponse, Response

from delivering import DAY, PAYLOADS, PRODUCTS, SUBSCRIPTION, USER, Desk, at, event, refund, with_user
from dodo_server import DodoServer
from factories import make_user
from kitrocket.clock import to_db
from kitrocket.dodo.events import DisputeState, PaymentState, RefundState, SubscriptionSnapshot, read_event
from kitrocket.engine import Engine
from kitrocket.errors import ConfigurationError, ProviderError
from kitrocket.models import Difference
from kitrocket.subscriptions import SubscriptionService
from kitrocket.testing import ManualClock
from simulating import NOW, Told, World, expected_rows, simulate
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


async def mirror_of(desk: Desk, dodo: DodoServer, count: int) -> None:
    """Let server and mirror know so many subscriptions, and the same of each."""
    if not await desk.table("dodo_subscriptions"):
        await desk.deliver(event("02", subscription_id="sub_0000"))
    knows(dodo, *(event("02", subscription_id=f"sub_{number:04}") for number in range(count)))
    await desk.engine.fetch(
        "INSERT INTO kitrocket.dodo_subscriptions"
        " SELECT (jsonb_populate_record(m, jsonb_build_object('subscription_id', 'sub_' || lpad(n::text, 4, '0')))).*"
        " FROM kitrocket.dodo_subscriptions m, generate_series(1, $1 - 1) n WHERE m.subscription_id = 'sub_0000'"
        " ON CONFLICT DO NOTHING",
        count,
    )


async def test_pages_are_read_whole(desk: Desk, dodo: DodoServer) -> None:
    assert (await desk.service.reconcile()).requests == 1
    for count in (45, 100, 101, 1000):
        await mirror_of(desk, dodo, count)
        dodo.requests.clear()
        result = await desk.service.reconcile()
        # A subscription on a page that was not read would be asked for by itself.
        assert (result.checked, result.fetched, result.gone, result.failed) == (count, 0, 0, 0)
        assert dodo.requests == ["/subscriptions"] * (count // 100 + 1)
    # One that is missing here is found wherever it stands.
    missing = ["sub_0000", "sub_0099", "sub_0100", "sub_0999"]
    await desk.engine.fetch("DELETE FROM kitrocket.dodo_subscriptions WHERE subscription_id = ANY($1)", missing)
    result = await desk.service.reconcile()
    assert [one.subscription_id for one in result.differences] == missing
    assert result.requests == 11 + 4


async def race(desk: Desk, dodo: DodoServer, count: int) -> None:
    """Have a renewal to fetch for so many subscriptions, and each put on hold before the renewal is written."""
    names = [f"sub_{number:04}" for number in range(count)]

    def told(number: str, name: str) -> dict[str, Any]:
        return event(number, subscription_id=name, metadata={"user_id": f"user_of_{name}"})

    for name in names:
        await make_user(desk.engine, id=f"user_of_{name}")
        await desk.deliver(told("01", name))
    knows(dodo, *(told("02", name) for name in names))

    async def hold(name: str) -> None:
        await desk.deliver(told("15", name))

    async with anyio.create_task_group() as group:

        async def meanwhile(path: str, number: int) -> Response | None:
            name = path.removeprefix("/subscriptions/")
            if name == path:
                return None
            answer = dodo.subscriptions[name]
            dodo.subscriptions[name] = told("15", name)["data"]
            # Every other time it races with the writing, else it is certain to come first.
            if number % 2:
                group.start_soon(hold, name)
            else:
                await hold(name)
            return JSONResponse(answer)

        dodo.trouble = meanwhile
        result = await desk.service.reconcile()
    assert (result.fetched, result.failed, result.raced + result.changed) == (count, 0, count)
    assert result.raced >= count // 2
    found = await desk.engine.fetch("SELECT status, count(*) FROM kitrocket.dodo_subscriptions GROUP BY 1")
    assert [tuple(row) for row in found] == [("on_hold", count)]
    dodo.trouble = None
    again = await desk.service.reconcile()
    assert (again.checked, again.differences, again.raced) == (count, [], 0)


async def test_a_webhook_that_is_faster_is_never_overwritten(desk: Desk, dodo: DodoServer) -> None:
    await race(desk, dodo, 12)


@pytest.mark.storm
@pytest.mark.timeout(600)
async def test_a_thousand_webhooks_that_are_faster_are_never_overwritten(desk: Desk, dodo: DodoServer) -> None:
    await race(desk, dodo, 1000)


async def test_what_the_provider_does_not_know_is_an_incident_and_stays(desk: Desk, dodo: DodoServer) -> None:
    await desk.deliver(PAYLOADS["02"])
    rows = await desk.table("subscriptions")
    result = await desk.service.reconcile()
    assert (result.checked, result.gone, result.requests) == (0, 1, 2)
    assert result.differences == [
        Difference(subscription_id=SUBSCRIPTION, field="subscription_id", ours=SUBSCRIPTION, theirs=None)
    ]
    assert await desk.table("subscriptions") == rows
    found = await desk.engine.fetch("SELECT kind, subject, user_id FROM kitrocket.billing_incidents")
    assert [tuple(row) for row in found] == [("drift", SUBSCRIPTION, USER)]
    await desk.service.reconcile()
    assert await desk.engine.fetchval("SELECT count(*) FROM kitrocket.billing_incidents") == 1
    # It is over when the provider knows it again.
    knows(dodo, PAYLOADS["02"])
    await desk.service.reconcile(dry_run=True)
    still_open = "SELECT count(*) FROM kitrocket.billing_incidents WHERE closed_at IS NULL"
    assert await desk.engine.fetchval(still_open) == 1
    assert (await desk.service.reconcile()).gone == 0
    assert await desk.engine.fetchval(still_open) == 0


async def test_a_webhook_of_what_the_provider_did_not_know_a_moment_ago_is_believed(
    desk: Desk, dodo: DodoServer
) -> None:
    await desk.deliver(PAYLOADS["01"])

    async def meanwhile(path: str, _number: int) -> None:
        if path != "/subscriptions":
            await desk.deliver(PAYLOADS["02"])

    dodo.trouble = meanwhile
    result = await desk.service.reconcile()
    assert (result.gone, result.raced, result.differences) == (0, 1, [])
    assert await desk.engine.fetchval("SELECT count(*) FROM kitrocket.billing_incidents") == 0


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
    assert "sub_2 could not be checked: DodoPayments answered 400" in caplog.text
    assert "sub_odd could not be checked: unknown_product" in caplog.text


@pytest.mark.parametrize("status", [500, 401])
async def test_a_provider_that_goes_away_ends_the_pass(
    desk: Desk, dodo: DodoServer, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr("kitrocket.subscriptions.provider._FIRST_PAUSE", 0.0)
    knows(dodo, *(event("02", subscription_id=f"sub_{number}") for number in range(8)))

    async def away(path: str, _number: int) -> Response | None:
        return JSONResponse({}, status) if path > "/subscriptions/sub_1" else None

    dodo.trouble = away
    with pytest.raises(ProviderError, match=str(status)):
        await desk.service.reconcile()
    assert dodo.requests[-1] == ("/subscriptions/sub_6" if status == 500 else "/subscriptions/sub_2")
    assert len(await desk.table("dodo_subscriptions")) == 2
    # The tick goes on without it.
    await desk.engine.fetch(
        "UPDATE kitrocket.dodo_subscriptions SET needs_check = true, subscription_id = 'sub_9' || subscription_id"
    )
    await desk.service.retry_parked()


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


async def test_a_changed_map_of_products_acts(desk: Desk, dodo: DodoServer) -> None:
    await desk.deliver(PAYLOADS["02"])
    knows(dodo, PAYLOADS["02"])
    product = PAYLOADS["02"]["data"]["product_id"]
    desk.service = desk.open(
        api_key="key", base_url=dodo.url, requests_per_second=10_000, products=PRODUCTS | {product: "pro"}
    )
    result = await desk.service.reconcile()
    assert [(one.field, one.ours, one.theirs) for one in result.differences] == [("plan", "starter", "pro")]
    assert (await desk.service.access(USER)).plan == "pro"


async def test_a_change_that_was_scheduled_is_noticed(desk: Desk, dodo: DodoServer) -> None:
    await desk.deliver(PAYLOADS["02"])
    change = {"product_id": "pdt_pro_m_8Kd2", "effective_at": "2026-04-16T00:00:00Z"}
    knows(dodo, event("02", scheduled_change=change))
    assert (await desk.service.reconcile()).changed == 1
    (mirrored,) = await desk.table("dodo_subscriptions")
    assert mirrored["pending_plan"] == "pro"
    assert (await desk.service.access(USER)).plan == "starter"
    assert (await desk.service.reconcile()).fetched == 0


async def test_a_doubt_is_settled_by_the_list_alone(desk: Desk, dodo: DodoServer) -> None:
    await desk.deliver(PAYLOADS["02"], "msg_1")
    await desk.deliver(event("02", cancelled_at="2026-03-16T12:00:00Z"), "msg_1")
    knows(dodo, PAYLOADS["02"])
    assert (await desk.table("dodo_subscriptions"))[0]["needs_check"]
    result = await desk.service.reconcile()
    assert (result.fetched, result.changed, result.requests) == (0, 0, 1)
    assert not (await desk.table("dodo_subscriptions"))[0]["needs_check"]


# -- what was lost --------------------------------------------------------------------------------------------------


async def lose(engine: Engine, dodo: DodoServer, *, subscriptions: int, events: int) -> None:
    """Lose a fiftieth of a world's events, and let one pass find the rest."""
    world = simulate(12, subscriptions=subscriptions, events=events)
    for user_id in [*world.users, *world.late_users]:
        await make_user(engine, id=user_id)
    lost = set(random.Random(12).sample(range(len(world.events)), events // 50))
    kept = [one for number, one in enumerate(world.events) if number not in lost]
    await deliver_all(service_of(engine), [(one.webhook_id, one.body) for one in kept], workers=4)
    know_all(dodo, world)
    drift = await drifted(engine, dodo)
    assert drift
    payments = await engine.fetchval("SELECT count(*) FROM kitrocket.dodo_payments WHERE status IS NULL")
    service = SubscriptionService(
        engine,
        clock=lambda: NOW,
        products=SIMULATED,
        api_key="key",
        base_url=dodo.url,
        requests_per_second=10_000,
    )
    result = await service.reconcile()
    assert (result.checked, result.failed, result.raced, result.gone) == (subscriptions, 0, 0, 0)
    assert result.requests <= -(-subscriptions // 100) + 1 + len(drift) + payments
    assert await drifted(engine, dodo) == set()
    assert not await engine.fetchval("SELECT count(*) FROM kitrocket.dodo_payments WHERE status IS NULL")
    again = await service.reconcile(dry_run=True)
    assert (again.differences, again.fetched) == ([], 0)

    # The rows are those of the orderly world, but for users whose payments were lost: no list tells of those.
    poorer = {one.subscription_id for number, one in enumerate(world.events) if number in lost and is_about_money(one)}
    owners = {row["user_id"]: row for row in expected_rows(world)}
    found = {row["user_id"]: dict(row) for row in await engine.fetch("SELECT * FROM subscriptions")}
    touched = await engine.fetch(
        "SELECT user_id FROM kitrocket.dodo_subscriptions WHERE subscription_id = ANY($1)", list(poorer)
    )
    unsure = {row["user_id"] for row in touched}
    names = ("plan", "status", "dodo_subscription_id")
    assert {user: [found[user][name] for name in names] for user in found.keys() - unsure} == {
        user: [row[name] for name in names] for user, row in owners.items() if user not in unsure
    }
    print(
        f"{subscriptions} subscriptions, {events} events, {len(lost)} lost: {len(drift)} drifted, {payments} payments"
        f" unknown; {result.requests} requests, {result.changed} changed"
    )


def know_all(dodo: DodoServer, world: World) -> None:
    """Let the server know the last state of all, with the user that a subscription's events named last."""
    keyed = []
    for one in world.events:
        told = read_event(one.body.decode())
        if isinstance(told.content, SubscriptionSnapshot):
            keyed.append((told.content.order_key(told.at), told.data))
        elif isinstance(told.content, PaymentState):
            dodo.payments[told.content.payment_id] = told.data
    for _, data in sorted(keyed, key=lambda entry: entry[0]):
        before = dodo.subscriptions.get(data["subscription_id"])
        is_named = data["metadata"] or data["customer"]["metadata"]
        names = {} if before is None or is_named else {name: before[name] for name in ("metadata", "customer")}
        dodo.subscriptions[data["subscription_id"]] = data | names


def is_about_money(one: Told) -> bool:
    return isinstance(read_event(one.body.decode()).content, PaymentState | RefundState | DisputeState)


async def drifted(engine: Engine, dodo: DodoServer) -> set[str]:
    """Return the subscriptions that the mirror does not hold as the server does, compared by the test itself."""
    rows = await engine.fetch("SELECT * FROM kitrocket.dodo_subscriptions")
    here = {row["subscription_id"]: dict(row) for row in rows}
    instants = ("created_at", "previous_billing_date", "next_billing_date", "cancelled_at", "paused_at")
    odd = set(here.keys() ^ dodo.subscriptions.keys())
    for id, data in dodo.subscriptions.items():
        ours = here.get(id, {})
        for name in ("status", "product_id", "cancel_at_next_billing_date", "trial_period_days", *instants):
            theirs = data.get(name)
            if name in instants and theirs is not None:
                theirs = to_db(datetime.fromisoformat(theirs))
            if ours.get(name) != theirs:
                odd.add(id)
        # Whom the simulator names exists; the subscription's metadata come before the customer's.
        named = next(iter([*data["metadata"].values(), *data["customer"]["metadata"].values()]))
        change = data.get("scheduled_change")
        if ours.get("user_id") != named:
            odd.add(id)
        if ours.get("pending_plan") != (SIMULATED[change["product_id"]] if change else None):
            odd.add(id)
    return odd


async def test_what_was_lost_is_found_in_one_pass(engine: Engine, dodo: DodoServer) -> None:
    await lose(engine, dodo, subscriptions=200, events=1000)


@pytest.mark.storm
@pytest.mark.timeout(600)
async def test_two_hundred_of_ten_thousand_that_were_lost_are_found_in_one_pass(
    engine: Engine, dodo: DodoServer
) -> None:
    await lose(engine, dodo, subscriptions=2000, events=10_000)
