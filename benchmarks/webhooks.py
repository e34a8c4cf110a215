"""How fast webhooks are verified, stored and applied, beside the SDK, plain round trips and Piccolo's ORM.

    python benchmarks/webhooks.py

On an embedded PostgreSQL, with real payloads. The rounds are interleaved and give a ratio each; medians are printed.

* verify: signature, time and reading of a delivery, against the SDK's ``unwrap`` (which does not validate).
* apply: a new event of a subscription of its own, by one task, against the same rows written in four plain statements
  on a held connection (inbox, user, mirror, row; no lock, no transaction), and through Piccolo's ORM.
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
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import dodopayments

from kitrocket.clock import to_db, utc_now
from kitrocket.dodo.signature import Verifier, sign
from kitrocket.embedded import EmbeddedServer
from kitrocket.engine import Engine
from kitrocket.ids import new_id
from kitrocket.migrations import migrate
from kitrocket.subscriptions import SubscriptionService
from kitrocket.tables import DodoSubscriptions, Subscriptions, Users, WebhookEvents

ROUNDS, EACH, TASKS, STORM = 12, 40, 16, 3000
KEY = "whsec_" + base64.b64encode(b"b" * 32).decode()
PAYLOAD = json.loads(
    (files("kitrocket.demo") / "payloads" / "02_subscription_renewed_first_charge.json").read_text(encoding="utf-8")
)
PRODUCTS = {"pdt_starter_m_4Vb7": "starter", "pdt_pro_m_8Kd2": "pro"}
USERS = 5000
NAMES = ["webhook_id", "type", "received_at", "body_sha256", "payload", "state", "attempts", "deliveries"]
INBOX = (
    "INSERT INTO kitrocket.webhook_events (webhook_id, type, received_at, body_sha256, payload, state, attempts,"
    " deliveries, hook_state, hook_attempts) VALUES ($1, $2, $3, '', $4, 'applied', 0, 1, 'none', 0)"
    " ON CONFLICT (webhook_id) DO NOTHING RETURNING webhook_id"
)
MIRROR = (
    "INSERT INTO kitrocket.dodo_subscriptions (subscription_id, user_id, customer_id, product_id, plan, status,"
    " cancel_at_next_billing_date, trial_period_days, started, event_at, event_key, needs_check, version, dispute_open,"
    " charged, charge_failed) VALUES ($1, $2, 'cus', 'pdt', 'pro', 'active', false, 0, true, $3, '', false, 1, false,"
    " false, false) ON CONFLICT (subscription_id) DO UPDATE SET status = excluded.status, version ="
    " kitrocket.dodo_subscriptions.version + 1"
)
ROW = (
    "INSERT INTO subscriptions (id, user_id, plan, status, dodo_subscription_id, created_at, updated_at)"
    " VALUES ($1, $2, 'pro', 'cancelled', $3, $4, $4)"
)

_numbers = itertools.count(1)


def new_event() -> tuple[str, str, str, bytes]:
    """Return webhook id, subscription, user and body of an event that nobody has seen."""
    number = next(_numbers)
    subscription, user = f"sub_{number}", f"user_{number % USERS}"
    data = PAYLOAD["data"] | {"subscription_id": subscription, "metadata": {"user_id": user}, "status": "cancelled"}
    return f"msg_{number}", subscription, user, json.dumps(PAYLOAD | {"data": data}).encode()


def measure_verification() -> None:
    client = dodopayments.DodoPayments(bearer_token="none", webhook_key=KEY)
    verifier = Verifier([KEY], max_bytes=2_097_152)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(1000):
        webhook_id, _, _, body = new_event()
        now = utc_now()
        headers = sign(body, key=KEY, webhook_id=webhook_id, at=now)
        start = time.perf_counter()
        assert verifier.verify(body, headers, now=now).event.content is not None
        middle = time.perf_counter()
        client.webhooks.unwrap(body.decode(), headers=headers)
        ours.append(middle - start)
        theirs.append(time.perf_counter() - middle)
    mine, sdk = statistics.median(ours), statistics.median(theirs)
    print(f"verify   {mine * 1e6:5.0f} µs; the SDK's unwrap {sdk * 1e6:5.0f} µs: {sdk / mine:.2f}x as fast as it")


async def measure_applying(engine: Engine, service: SubscriptionService) -> None:
    connection = await engine.get_new_connection()
    contenders: dict[str, Callable[[], Awaitable[object]]] = {
        "kitrocket": lambda: receive(service),
        "four round trips": lambda: plainly(connection),
        "Piccolo's ORM": lambda: through_piccolo(engine),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(ROUNDS):
        order = list(contenders)
        for name in order[turn % 3 :] + order[: turn % 3]:
            start = time.perf_counter()
            for _ in range(EACH):
                await contenders[name]()
            rates[name].append(EACH / (time.perf_counter() - start))
    await connection.close()
    for name in list(contenders)[1:]:
        ratios = [mine / other for mine, other in zip(rates["kitrocket"], rates[name], strict=True)]
        print(f"apply    {statistics.median(ratios):.2f}x {name} ({statistics.median(rates[name]):,.0f}/s)")


async def receive(service: SubscriptionService) -> float:
    webhook_id, _, _, body = new_event()
    headers = sign(body, key=KEY, webhook_id=webhook_id, at=utc_now())
    start = time.perf_counter()
    receipt = await service.receive(body, headers)
    assert receipt.outcome == "applied", receipt
    return time.perf_counter() - start


async def plainly(connection: asyncpg.Connection[Any]) -> None:
    webhook_id, subscription, user, body = new_event()
    now = to_db(utc_now())
    await connection.fetch(INBOX, webhook_id, "subscription.renewed", now, body.decode())
    await connection.fetch("SELECT id FROM users WHERE id = $1", user)
    await connection.fetch(MIRROR, subscription, user, now)
    await connection.fetch(ROW, new_id(), user, subscription, now)


async def through_piccolo(engine: Engine) -> None:
    webhook_id, subscription, user, body = new_event()
    now: datetime = to_db(utc_now())
    async with engine.transaction():
        found = await engine.run(
            WebhookEvents.select(WebhookEvents.state).where(WebhookEvents.webhook_id == webhook_id)
        )
        assert not found
        values = [webhook_id, "subscription.renewed", now, "", body.decode(), "applied", 0, 1]
        await engine.run(WebhookEvents.insert(WebhookEvents(**dict(zip(NAMES, values, strict=True)))))
        assert await engine.run(Users.select(Users.id).where(Users.id == user))
        mirrored = DodoSubscriptions(
            subscription_id=subscription,
            user_id=user,
            customer_id="cus",
            product_id="pdt",
            plan="pro",
            status="active",
            event_at=now,
            event_key="",
        )
        await engine.run(DodoSubscriptions.insert(mirrored))
        row = Subscriptions(user_id=user, plan="pro", status="cancelled", dodo_subscription_id=subscription)
        await engine.run(Subscriptions.insert(row))


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


async def main() -> None:
    measure_verification()
    with tempfile.TemporaryDirectory(prefix="kitrocket-bench-") as folder:
        Path(folder).chmod(0o755)  # noqa: ASYNC240 - nobody waits yet; the server's account must reach its data
        async with Engine(embedded=EmbeddedServer(Path(folder) / "pg"), pool_size=TASKS) as engine:
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
            await measure_storm(service)


if __name__ == "__main__":
    anyio.run(main)
