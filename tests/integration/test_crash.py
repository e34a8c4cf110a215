"""Killed, or cut off from PostgreSQL, at each step of a delivery: what was acknowledged is there, and all converges."""

from __future__ import annotations

import signal
from typing import Any

import anyio.to_thread
import pytest

from dying import carry_out
from factories import make_user
from kitrocket.engine import Engine
from simulating import expected_rows, simulate
from storming import deliver_all, service_of

pytestmark = pytest.mark.asyncio

EVENTS = 8


async def crash(engine: Engine, url: str, steps: list[int]) -> None:
    worlds = [simulate(step, subscriptions=1, events=EVENTS) for step in steps]
    for world in worlds:
        for user_id in [*world.users, *world.late_users]:
            await make_user(engine, id=user_id)
    plans: list[dict[str, Any]] = [
        {
            "mode": ("kill", "cut")[number % 2],
            "when": ("before", "after")[number // 2 % 2],
            "step": number // 4 + 1,
            "deliveries": [(event.webhook_id, event.body.decode()) for event in world.events],
        }
        for number, world in zip(steps, worlds, strict=True)
    ]
    told = await anyio.to_thread.run_sync(carry_out, url, plans)

    assert {one["signal"]: plan["mode"] for plan, one in zip(plans, told, strict=True)} == {
        signal.SIGKILL: "kill",
        None: "cut",
    }
    stored = {row[0] for row in await engine.fetch("SELECT webhook_id FROM kitrocket.webhook_events")}
    for plan, one in zip(plans, told, strict=True):
        assert one["failed"] == []
        assert set(one["acknowledged"]) <= stored, plan
        # A connection that is lost costs nobody a delivery: it is tried again before the provider has to.
        assert plan["mode"] == "kill" or len(one["acknowledged"]) == EVENTS, plan

    service = service_of(engine)
    again = [(event.webhook_id, event.body) for world in worlds for event in world.events]
    counts, _ = await deliver_all(service, again, workers=4)
    assert set(counts) <= {"applied", "stale", "parked", "ignored", "duplicate"}
    rows = await engine.fetch("SELECT * FROM subscriptions ORDER BY user_id")
    expected = [row for world in worlds for row in expected_rows(world)]
    assert [{name: value for name, value in row.items() if name != "id"} for row in rows] == sorted(
        expected, key=lambda row: row["user_id"]
    )
    assert await engine.fetchval("SELECT count(*) FROM kitrocket.webhook_events") == len(again)


@pytest.mark.direct
async def test_ten_crashes(engine: Engine, database_url: str) -> None:
    await crash(engine, database_url, [*range(8, 13), *range(29, 34)])


@pytest.mark.direct
@pytest.mark.faults
async def test_two_hundred_crashes(engine: Engine, database_url: str) -> None:
    await crash(engine, database_url, list(range(200)))
