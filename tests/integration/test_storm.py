"""Whole lives of subscriptions, delivered twice, shuffled and all at once, end where order would have ended."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any, Literal

import anyio.to_thread
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import make_user
from kitrocket.engine import Engine
from simulating import NOW, expected_rows, simulate
from storming import deliver_all, service_of, storm

pytestmark = pytest.mark.asyncio

TABLES = (
    "subscriptions",
    "users",
    "kitrocket.webhook_events",
    "kitrocket.dodo_subscriptions",
    "kitrocket.dodo_payments",
)


async def rows_of(engine: Engine) -> list[dict[str, Any]]:
    rows = await engine.fetch("SELECT * FROM subscriptions ORDER BY user_id")
    return [{name: value for name, value in row.items() if name != "id"} for row in rows]


async def empty(engine: Engine) -> None:
    for table in TABLES:
        await engine.fetch(f"DELETE FROM {table}")


async def weather(
    engine: Engine,
    url: str,
    folder: Path,
    seed: int,
    *,
    subscriptions: int,
    events: int,
    payloads: Literal["frozen", "latest"],
) -> None:
    """Deliver a whole world, and find the rows that its events make in order."""
    world = simulate(seed, subscriptions=subscriptions, events=events, payloads=payloads)
    assert world.tied() >= 0.25
    for user_id in world.users:
        await make_user(engine, id=user_id)
    deadlocks = await deadlocks_of(engine)
    started = time.perf_counter()
    counts, durations = await anyio.to_thread.run_sync(lambda: storm(url, folder, world.deliveries))
    took = time.perf_counter() - started
    p99 = sorted(durations)[int(len(durations) * 0.99)]
    print(f"seed {seed}, {payloads}: {len(durations) / took:,.0f} deliveries/s, p99 {p99 * 1000:.0f} ms, {counts}")

    assert set(counts) <= {"applied", "stale", "parked", "ignored", "duplicate"}
    assert sum(counts.values()) == 2 * events
    assert await engine.fetchval("SELECT count(*) FROM kitrocket.webhook_events WHERE deliveries = 2") == events
    for user_id in world.late_users:
        await make_user(engine, id=user_id)
    service = service_of(engine)
    while (await service.retry_parked()).tried:
        pass
    unfinished = (
        "SELECT webhook_id, state, reason FROM kitrocket.webhook_events"
        " WHERE state NOT IN ('applied', 'stale', 'ignored')"
    )
    assert [tuple(row) for row in await engine.fetch(unfinished)] == []
    assert await rows_of(engine) == expected_rows(world)
    assert await deadlocks_of(engine) == deadlocks


async def deadlocks_of(engine: Engine) -> int:
    found: int = await engine.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    return found


@pytest.mark.parametrize("payloads", ["frozen", "latest"])
async def test_a_thousand_deliveries_at_once(
    engine: Engine, database_url: str, tmp_path: Path, payloads: Literal["frozen", "latest"]
) -> None:
    await weather(engine, database_url, tmp_path, 1, subscriptions=50, events=500, payloads=payloads)


@pytest.mark.storm
@pytest.mark.parametrize("payloads", ["frozen", "latest"])
@pytest.mark.parametrize("seed", range(20))
async def test_ten_thousand_deliveries_at_once(
    engine: Engine, database_url: str, tmp_path: Path, seed: int, payloads: Literal["frozen", "latest"]
) -> None:
    await weather(engine, database_url, tmp_path, seed, subscriptions=500, events=5000, payloads=payloads)


async def test_the_oracle_tells_what_an_orderly_delivery_makes(engine: Engine) -> None:
    world = simulate(7, subscriptions=30, events=300)
    for user_id in [*world.users, *world.late_users]:
        await make_user(engine, id=user_id)
    await deliver_all(service_of(engine), [(event.webhook_id, event.body) for event in world.events], workers=1)
    assert await rows_of(engine) == expected_rows(world)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32), order=st.randoms(use_true_random=False), again=st.lists(st.integers(0, 13), max_size=6)
)
async def test_any_order_and_duplication_of_one_subscriptions_events(
    engine: Engine, seed: int, order: random.Random, again: list[int]
) -> None:
    await empty(engine)
    world = simulate(seed, subscriptions=1, events=14)
    for user_id in [*world.users, *world.late_users]:
        await make_user(engine, id=user_id)
    deliveries = [(event.webhook_id, event.body) for event in world.events]
    deliveries += [deliveries[index] for index in again]
    order.shuffle(deliveries)
    service = service_of(engine)
    counts, _ = await deliver_all(service, deliveries, workers=1)
    assert set(counts) <= {"applied", "stale", "parked", "ignored", "duplicate"}
    await service.retry_parked()
    assert await rows_of(engine) == expected_rows(world, NOW)
