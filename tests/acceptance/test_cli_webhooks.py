"""``kitrocket webhooks`` in processes of its own."""

from __future__ import annotations

import os
import sys

import anyio
import pytest

from delivering import PAYLOADS, USER, Desk, with_user
from kitrocket.engine import Engine
from kitrocket.testing import ManualClock

pytestmark = [pytest.mark.asyncio, pytest.mark.direct]

PRODUCTS = '{"pdt_starter_m_4Vb7": "starter", "pdt_pro_m_8Kd2": "pro"}'


async def webhooks(url: str, *arguments: str) -> tuple[int, str, str]:
    done = await anyio.run_process(
        [sys.executable, "-c", "from kitrocket.cli import main; main()", "webhooks", *arguments],
        env={**os.environ, "DATABASE_URL": url, "KITROCKET_DODO_PRODUCTS": PRODUCTS, "COLUMNS": "200"},
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


async def test_someone_on_call_sees_and_repairs_everything(
    engine: Engine, database_url: str, clock: ManualClock
) -> None:
    desk = Desk(engine, clock)
    await desk.deliver(PAYLOADS["02"], "msg_parked")
    await desk.deliver(PAYLOADS["12"], "msg_ignored")

    code, out, _ = await webhooks(database_url, "list", "--state", "parked")
    assert code == 0
    assert "msg_parked" in out
    assert "no_user" in out
    assert "msg_ignored" not in out
    code, out, _ = await webhooks(database_url, "show", "msg_parked")
    assert code == 0
    assert "subscription.renewed" in out
    assert "maya" not in out
    code, _, error = await webhooks(database_url, "show", "msg_nowhere")
    assert code == 1
    assert "Traceback" not in error

    await with_user(desk)
    code, out, _ = await webhooks(database_url, "retry")
    assert (code, out.startswith("Tried 1 event(s): 1 finished")) == (0, True)
    await engine.fetch("UPDATE subscriptions SET plan = 'pro' WHERE user_id = $1", USER)
    code, out, _ = await webhooks(database_url, "replay", "--state", "applied")
    assert (code, out) == (0, "Replayed: 1 applied.\n")
    assert await engine.fetchval("SELECT plan FROM subscriptions") == "starter"
    code, _, error = await webhooks(database_url, "replay", "msg_nowhere")
    assert code == 1
    assert "msg_nowhere" in error
    assert (await webhooks(database_url, "replay"))[0] == 2
    code, _, error = await webhooks(database_url, "reconcile", "--dry-run")
    assert code == 1
    assert "DODO_PAYMENTS_API_KEY" in error
