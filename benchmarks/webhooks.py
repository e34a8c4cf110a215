"""How fast webhooks are verified, stored and applied, beside the SDK, plain round trips and Piccolo's ORM.

    python benchmarks/webhooks.py

On an embedded PostgreSQL, with real payloads, once with fsync and once without. The rounds are interleaved and give a
ratio each; medians are printed.

* verify: signature, time and reading of a delivery, against the SDK's ``unwrap`` (which does not validate).
* apply: a new event that activates a subscription of its own for a user of its own, by one task. All verify and read it
  with the same code, and write the same inbox row, snapshot and row. Beside it:

  - four round trips, by asyncpg on a held connection: insert the inbox row, put the snapshot into the mirror, put the
    user's row, note in the inbox that it is done. No locks, no reads, no transaction: each commits by itself.
  - the same in a transaction: six round trips, one commit.
  - Piccolo's ORM, doing what ``receive`` does inside a transaction: the inbox row unless it is known, the snapshot and
    the user locked by their rows (the ORM has no advisory locks), the user found, payments, the user's snapshots, rows
    and open incidents read, the same pure projection, snapshot, row and inbox written.
* stored: a further event of a subscription of which 10,000 are stored, against one of which none are.
* storm: new events per second and the slowest hundredth with 16 tasks in this process.
"""

from __future__ import annotations

import base64
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import fields
from datetime import datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import dodopayments
from piccolo.columns.combination import WhereRaw

from kitrocket.clock import from_db, to_db, utc_now
from kitrocket.dodo.events import SubscriptionSnapshot
from kitrocket.dodo.projection import Policy, Snapshot, project
from kitrocket.dodo.signature import Delivery, Verifier, sign
from kitrocket.embedded import EmbeddedServer
from kitrocket.engine import Engine
from kitrocket.ids import new_id
from kitrocket.migrations import migrate
from kitrocket.subscriptions import SubscriptionService
from kitrocket.subscriptions.inbox import digest_of
from kitrocket.tables import BillingIncidents, DodoPayments, DodoSubscriptions, Subscriptions, Users, WebhookEvents

ROUNDS, EACH, TASKS, STORM, STORED = 12, 40, 16, 3000, 10_000
KEY = "whsec_" + base64.b64encode(b"b" * 32).decode()
PAYLOAD = json.loads(
    (files("kitrocket.demo") / "payloads" / "02_subscription_renewed_first_charge.json").read_text(encoding="utf-8")
)
PRODUCTS = {"pdt_starter_m_4Vb7": "starter", "pdt_pro_m_8Kd2": "pro"}
USERS = 20_000
BEGINNING = datetime.fromisoformat(PAYLOAD["timestamp"])
VERIFIER = Verifier([KEY], max_bytes=2_097_152)
INBOX = (
    "INSERT INTO kitrocket.webhook_events (webhook_id, type, subscription_id, customer_id, user_hint, event_at,"
    " received_at, body_sha256, payload, state, attempts, deliveries, hook_state, hook_attempts)"
    " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, 'received', 0, 1, 'none', 0)"
    " ON CONFLICT (webhook_id) DO NOTHING RETURNING webhook_id"
)
COLUMNS = (
    *("subscription_id", "user_id", "customer_id", "product_id", "plan", "status", "created_at"),
    *("previous_billing_date", "next_billing_date", "cancel_at_next_billing_date", "trial_period_days", "started"),
    *("event_at", "event_key", "webhook_id"),
)
MIRROR = (
    f"INSERT INTO kitrocket.dodo_subscriptions AS known ({', '.join(COLUMNS)}, needs_check, version, dispute_open,"
    " charged, charge_failed) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, false, 1,"
    f" false, false, false) ON CONFLICT (subscription_id) DO UPDATE SET version = known.version + 1,"
    f" {', '.join(f'{name} = excluded.{name}' for name in COLUMNS[1:])}"
)
ROW = (
    "INSERT INTO subscriptions (id, user_id, plan, status, dodo_customer_id, dodo_subscription_id, current_period_end,"
    " created_at, updated_at) VALUES ($1, $2, $3, 'active', $4, $5, $6, $7, $8)"
    " ON CONFLICT (user_id) WHERE status IN ('active', 'trialing', 'past_due') DO UPDATE SET plan = excluded.plan,"
    " dodo_subscription_id = excluded.dodo_subscription_id, current_period_end = excluded.current_period_end,"
    " updated_at = excluded.updated_at"
)
DONE = (
    "UPDATE kitrocket.webhook_events SET state = 'applied', user_id = $2, finished_at = $3 WHERE webhook_id = $1"
    " RETURNING webhook_id"
)
STORE = (
    "INSERT INTO kitrocket.webhook_events (webhook_id, type, subscription_id, customer_id, user_id, user_hint,"
    " received_at, finished_at, body_sha256, payload, state)"
    " SELECT 'old_' || n, 'subscription.renewed', $1, 'cus', $2, $2, $3, $3, 'x', '{}', 'applied'"
    " FROM generate_series(1, $4::integer) n"
)

_numbers = itertools.count(1)


def new_event(number: int | None = None) -> tuple[str, bytes]:
    """Return webhook id and body of an event that nobody has seen, of a subscription and user of its own."""
    turn = next(_numbers)
    data = PAYLOAD["data"] | {
        "subscription_id": f"sub_{turn if number is None else number}",
        "metadata": {"user_id": f"user_{(turn if number is None else number) % USERS}"},
    }
    at = BEGINNING + timedelta(milliseconds=turn)
    return f"msg_{turn}", json.dumps(PAYLOAD | {"data": data, "timestamp": at.isoformat()}).encode()


def columns_of(delivery: Delivery) -> dict[str, Any]:
    """Return what a delivery puts into the mirror."""
    state, event = delivery.event.content, delivery.event
    assert isinstance(state, SubscriptionSnapshot)
    assert state.created_at is not None
    assert state.previous_billing_date is not None
    assert state.next_billing_date is not None
    return {
        "subscription_id": state.subscription_id,
        "user_id": state.metadata["user_id"],
        "customer_id": state.customer.customer_id,
        "product_id": state.product_id,
        "plan": PRODUCTS[state.product_id],
        "status": state.status,
        "created_at": to_db(state.created_at),
        "previous_billing_date": to_db(state.previous_billing_date),
        "next_billing_date": to_db(state.next_billing_date),
        "cancel_at_next_billing_date": state.cancel_at_next_billing_date,
        "trial_period_days": state.trial_period_days,
        "started": True,
        "event_at": to_db(event.at),
        "event_key": state.order_key(event.at),
        "webhook_id": delivery.webhook_id,
    }


def measure_verification() -> None:
    client = dodopayments.DodoPayments(bearer_token="none", webhook_key=KEY)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(1000):
        webhook_id, body = new_event()
        now = utc_now()
        headers = sign(body, key=KEY, webhook_id=webhook_id, at=now)
        start = time.perf_counter()
        assert VERIFIER.verify(body, headers, now=now).event.content is not None
        middle = time.perf_counter()
        client.webhooks.unwrap(body.decode(), headers=headers)
        ours.append(middle - start)
        theirs.append(time.perf_counter() - middle)
    mine, sdk = statistics.median(ours), statistics.median(theirs)
    print(f"verify   {mine * 1e6:5.0f} µs; the SDK's unwrap {sdk * 1e6:5.0f} µs: {sdk / mine:.2f}x as fast as it")


async def measure_applying(engine: Engine, service: SubscriptionService) -> None:
    connection = await engine.get_new_connection()
    contenders: dict[str, Callable[[], Awaitable[float]]] = {
        "kitrocket": lambda: receive(service),
        "four round trips": lambda: plainly(connection),
        "the same in a transaction": lambda: plainly(connection, together=True),
        "Piccolo's ORM": lambda: through_piccolo(engine),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(ROUNDS):
        order = list(contenders)
        for name in order[turn % 4 :] + order[: turn % 4]:
            took = [await contenders[name]() for _ in range(EACH)]
            rates[name].append(EACH / sum(took))
    await connection.close()
    print(f"apply    {statistics.median(rates['kitrocket']):,.0f}/s")
    for name in list(contenders)[1:]:
        ratios = [mine / other for mine, other in zip(rates["kitrocket"], rates[name], strict=True)]
        print(f"apply    {statistics.median(ratios):.2f}x {name} ({statistics.median(rates[name]):,.0f}/s)")


async def receive(service: SubscriptionService, number: int | None = None) -> float:
    webhook_id, body = new_event(number)
    headers = sign(body, key=KEY, webhook_id=webhook_id, at=utc_now())
    start = time.perf_counter()
    receipt = await service.receive(body, headers)
    took = time.perf_counter() - start
    assert receipt.outcome == "applied", receipt
    return took


async def plainly(connection: asyncpg.Connection[Any], *, together: bool = False) -> float:
    webhook_id, body = new_event()
    headers = sign(body, key=KEY, webhook_id=webhook_id, at=utc_now())
    start = time.perf_counter()
    delivery = VERIFIER.verify(body, headers, now=utc_now())
    if together:
        async with connection.transaction():
            await write_plainly(connection, delivery)
    else:
        await write_plainly(connection, delivery)
    return time.perf_counter() - start


async def write_plainly(connection: asyncpg.Connection[Any], delivery: Delivery) -> None:
    now, new = to_db(utc_now()), columns_of(delivery)
    id, user, customer, at = new["subscription_id"], new["user_id"], new["customer_id"], new["event_at"]
    name, digest, text = delivery.event.type, digest_of(delivery.text), delivery.text
    await connection.fetch(INBOX, delivery.webhook_id, name, id, customer, user, at, now, digest, text)
    await connection.fetch(MIRROR, *new.values())
    end, created = new["next_billing_date"], new["created_at"]
    await connection.fetch(ROW, new_id(), user, new["plan"], customer, id, end, created, at)
    assert await connection.fetch(DONE, delivery.webhook_id, user, now)


async def through_piccolo(engine: Engine) -> float:
    webhook_id, body = new_event()
    headers = sign(body, key=KEY, webhook_id=webhook_id, at=utc_now())
    start = time.perf_counter()
    delivery = VERIFIER.verify(body, headers, now=utc_now())
    async with engine.transaction():
        await apply_by_piccolo(engine, delivery, columns_of(delivery), to_db(utc_now()))
    return time.perf_counter() - start


async def apply_by_piccolo(engine: Engine, delivery: Delivery, new: dict[str, Any], now: datetime) -> None:
    id, user = new["subscription_id"], new["user_id"]
    event = WebhookEvents(
        webhook_id=delivery.webhook_id,
        type=delivery.event.type,
        subscription_id=id,
        customer_id=new["customer_id"],
        user_hint=user,
        event_at=new["event_at"],
        received_at=now,
        body_sha256=digest_of(delivery.text),
        payload=delivery.text,
        state="received",
    )
    insert = WebhookEvents.insert(event).on_conflict(WebhookEvents.webhook_id, "DO NOTHING")
    assert await engine.run(insert.returning(WebhookEvents.webhook_id))
    known = DodoSubscriptions.select().where(DodoSubscriptions.subscription_id == id).lock_rows("UPDATE")
    assert not await engine.run(known)
    assert await engine.run(Users.select(Users.id).where(Users.id == user).lock_rows("NO KEY UPDATE"))
    named = WhereRaw("subscription_ids @> jsonb_build_array({}::text)", id)
    assert not await engine.run(DodoPayments.select().where(named))
    assert not await engine.run(DodoSubscriptions.select().where(DodoSubscriptions.user_id == user))
    rows = await engine.run(Subscriptions.select().where(Subscriptions.user_id == user))
    open_ones = (BillingIncidents.user_id == user) & BillingIncidents.closed_at.is_null()
    assert not await engine.run(BillingIncidents.select().where(open_ones))

    aware = {name: from_db(value) if isinstance(value, datetime) else value for name, value in new.items()}
    names = {field.name for field in fields(Snapshot)}
    shown = project([Snapshot(**{name: aware[name] for name in names & aware.keys()})], utc_now(), Policy())
    assert shown is not None
    mirrored = DodoSubscriptions.insert(DodoSubscriptions(**new))
    told = [column for column in DodoSubscriptions.all_columns() if column._meta.name in COLUMNS[1:]]
    await engine.run(mirrored.on_conflict(DodoSubscriptions.subscription_id, "DO UPDATE", told))
    columns = {name: to_db(v) if isinstance(v, datetime) else v for name, v in shown._asdict().items()}
    assert not rows
    await engine.run(Subscriptions.insert(Subscriptions(user_id=user, **columns)))
    done = WebhookEvents.update({"state": "applied", "user_id": user, "finished_at": now}, force=True)
    await engine.run(done.where(WebhookEvents.webhook_id == delivery.webhook_id))


async def measure_stored(engine: Engine, service: SubscriptionService) -> None:
    full, empty = USERS - 1, USERS - 2
    for number in (full, empty):
        await receive(service, number)
    await engine.fetch(STORE, f"sub_{full}", f"user_{full}", to_db(utc_now()), STORED)
    await engine.fetch("ANALYZE kitrocket.webhook_events")
    took: dict[int, list[float]] = {full: [], empty: []}
    for turn in range(ROUNDS):
        for number in (full, empty) if turn % 2 else (empty, full):
            took[number].append(statistics.median([await receive(service, number) for _ in range(EACH)]))
    ratio = statistics.median(mine / other for mine, other in zip(took[full], took[empty], strict=True))
    ms = statistics.median(took[full]) * 1000
    print(f"stored   {ms:.2f} ms with {STORED:,} stored events of the subscription: {ratio:.2f}x the time with none")


async def measure_storm(service: SubscriptionService) -> None:
    durations: list[float] = []
    left = iter(range(STORM))

    async def work() -> None:
        durations.extend([await receive(service) for _ in left])

    start = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(TASKS):
            group.start_soon(work)
    rate = STORM / (time.perf_counter() - start)
    p99 = sorted(durations)[int(STORM * 0.99)]
    print(f"storm    {rate:,.0f} events/s with {TASKS} tasks, p99 {p99 * 1000:.0f} ms")


async def measure(*, fsync: bool) -> None:
    print(f"-- fsync {'on' if fsync else 'off'}")
    with tempfile.TemporaryDirectory(prefix="kitrocket-bench-") as folder:
        Path(folder).chmod(0o755)  # noqa: ASYNC240 - nobody waits yet; the server's account must reach its data
        server = EmbeddedServer(Path(folder) / "pg", fsync=fsync)
        async with Engine(embedded=server, pool_size=TASKS) as engine:
            await migrate(engine)
            await engine.fetch(
                "INSERT INTO users (id, email, name)"
                " SELECT 'user_' || n, 'user' || n || '@example.com', 'U' FROM generate_series(0, $1) n",
                USERS,
            )
            service = SubscriptionService(engine, webhook_keys=[KEY], products=PRODUCTS)
            for _ in range(EACH):
                await receive(service)
            await measure_applying(engine, service)
            await measure_stored(engine, service)
            await measure_storm(service)


async def main() -> None:
    measure_verification()
    for fsync in (True, False):
        await measure(fsync=fsync)


if __name__ == "__main__":
    anyio.run(main)
