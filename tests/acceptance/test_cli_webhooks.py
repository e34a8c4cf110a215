"""``kitrocket webhooks``, as someone on call runs it."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from datetime import timedelta

import anyio
import anyio.to_thread
import pytest

from delivering import PAYLOADS, SUBSCRIPTION, USER, Desk, event, with_user
from dodo_server import DodoServer
from factories import make_user
from kitrocket.cli import main
from kitrocket.engine import Engine
from kitrocket.models import BillingEvent
from kitrocket.testing import ManualClock

pytestmark = [pytest.mark.asyncio, pytest.mark.direct]

PRODUCTS = '{"pdt_starter_m_4Vb7": "starter", "pdt_pro_m_8Kd2": "pro"}'


Webhooks = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
def webhooks(database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Webhooks:
    """Runs a command in a thread of its own, for a process takes a second to start; exit code, stdout, stderr."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("KITROCKET_DODO_PRODUCTS", PRODUCTS)
    monkeypatch.delenv("DODO_PAYMENTS_API_KEY", raising=False)

    def call() -> int:
        try:
            main()
        except SystemExit as exit:
            if isinstance(exit.code, str):
                print(exit.code, file=sys.stderr)
                return 1
            return exit.code or 0
        return 0

    async def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kitrocket", "webhooks", *arguments])
        capsys.readouterr()
        code = await anyio.to_thread.run_sync(call)
        return code, *capsys.readouterr()

    return run


async def in_a_process(*arguments: str) -> tuple[int, str, str]:
    done = await anyio.run_process(
        [sys.executable, "-c", "from kitrocket.cli import main; main()", "webhooks", *arguments], check=False
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


async def test_someone_on_call_sees_and_repairs_everything(
    engine: Engine, clock: ManualClock, webhooks: Webhooks
) -> None:
    desk = Desk(engine, clock)
    await desk.deliver(PAYLOADS["02"], "msg_parked")
    await desk.deliver(PAYLOADS["12"], "msg_ignored")

    code, out, _ = await webhooks("list", "--state", "parked")
    assert code == 0
    assert "msg_parked" in out
    assert "no_user" in out
    assert "msg_ignored" not in out
    code, out, _ = await webhooks("show", "msg_parked")
    assert code == 0
    assert "subscription.renewed" in out
    assert "maya" not in out
    code, _, error = await webhooks("show", "msg_nowhere")
    assert code == 1
    assert "Traceback" not in error

    await with_user(desk)
    code, out, _ = await webhooks("retry")
    assert (code, out.startswith("Tried 1 event(s): 1 finished")) == (0, True)
    await engine.fetch("UPDATE subscriptions SET plan = 'pro' WHERE user_id = $1", USER)
    code, out, _ = await webhooks("replay", "--state", "applied")
    assert (code, out) == (0, "Replayed: 1 applied.\n")
    assert await engine.fetchval("SELECT plan FROM subscriptions") == "starter"
    code, _, error = await webhooks("replay", "msg_nowhere")
    assert code == 1
    assert "msg_nowhere" in error
    assert (await webhooks("replay"))[0] == 2


async def test_what_still_fails_says_why_in_a_line_and_a_dead_hook_is_told_again(
    engine: Engine, clock: ManualClock, webhooks: Webhooks
) -> None:
    desk = await with_user(Desk(engine, clock))
    desk.service = desk.open(max_attempts=1)

    @desk.service.on("subscription.renewed")
    async def fails(_event: BillingEvent) -> None:
        raise ValueError

    await desk.deliver(PAYLOADS["02"], "msg_told")
    await desk.service.run_hooks()
    code, out, _ = await webhooks("list", "--hooks", "dead")
    assert (code, "msg_told" in out) == (0, True)
    await engine.fetch("ALTER TABLE subscriptions ADD CONSTRAINT no_pro CHECK (plan <> 'pro')")
    await make_user(engine, id="user_2")
    pro = event("02", subscription_id="sub_pro", product_id="pdt_pro_m_8Kd2", metadata={"user_id": "user_2"})
    await desk.deliver(pro, "msg_failed")
    await desk.deliver(event("02", subscription_id="sub_dead", metadata={"user_id": "user_3"}), "msg_dead")
    clock.advance(timedelta(minutes=2))
    await desk.service.retry_parked()

    code, out, error = await webhooks("replay", "--state", "dead")
    assert (code, out) == (0, "Replayed: 2 parked.\n")
    assert "msg_failed is still dead: CheckViolationError 23514" in error
    assert "msg_dead is still dead: no_user" in error
    assert "File " not in error
    code, out, _ = await webhooks("list", "--state", "dead")
    assert (code, out.count("CheckViolationError 23514"), out.count("no_user")) == (0, 1, 1)

    code, _, _ = await webhooks("replay", "msg_told", "--hooks")
    assert (
        code,
        await engine.fetchval("SELECT hook_state FROM kitrocket.webhook_events WHERE webhook_id = $1", "msg_told"),
    ) == (0, "pending")
    code, out, error = await webhooks("list", "--state", "deadd")
    assert (code, out) == (1, "")
    assert "received, parked, dead" in error
    await engine.fetch("UPDATE kitrocket.webhook_events SET payload = NULL")
    code, out, error = await webhooks("replay", "msg_told", "msg_nowhere")
    assert (code, out) == (1, "Replayed: nothing.\n")
    assert "the payload of webhook 'msg_told' is no longer kept" in error


async def test_what_was_missed_is_shown_and_then_taken_over(
    engine: Engine, clock: ManualClock, dodo: DodoServer, webhooks: Webhooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = await with_user(Desk(engine, clock))
    await desk.deliver(PAYLOADS["01"])
    await desk.deliver(event("02", subscription_id="sub_gone"))
    dodo.subscriptions = {
        one["data"]["subscription_id"]: one["data"]
        for one in (
            PAYLOADS["02"],
            event("02", subscription_id="sub_missed"),
            event("02", subscription_id="sub_odd", status="new"),
        )
    }
    code, _, error = await webhooks("reconcile", "--dry-run")
    assert (code, "DODO_PAYMENTS_API_KEY" in error) == (1, True)

    monkeypatch.setenv("DODO_PAYMENTS_BASE_URL", dodo.url)
    monkeypatch.setenv("DODO_PAYMENTS_API_KEY", "key")
    before = [*await desk.bytes_of_state(), await desk.table("webhook_events")]
    code, out, error = await in_a_process("reconcile", "--dry-run")
    assert code == 1
    assert error.splitlines() == ["asking DodoPayments", "sub_odd could not be checked: unknown_status"]
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["subscription", "field", "here", "DodoPayments"]
    assert [SUBSCRIPTION, "previous_billing_date"] in [line[:2] for line in lines]
    assert ["sub_missed", "subscription_id", "(unknown)", "sub_missed"] in lines
    assert ["sub_gone", "subscription_id", "sub_gone", "(unknown)"] in lines
    assert out.splitlines()[-1] == (
        "Compared 3 subscription(s) in 5 request(s): 2 would be changed, 0 outrun by a webhook,"
        " 1 unknown to DodoPayments, 1 failed."
    )
    assert [*await desk.bytes_of_state(), await desk.table("webhook_events")] == before
    assert await engine.fetchval("SELECT count(*) FROM kitrocket.billing_incidents WHERE kind = 'drift'") == 0

    del dodo.subscriptions["sub_odd"]
    code, again, _ = await webhooks("reconcile")
    assert (code, again.splitlines()[:-1]) == (0, out.splitlines()[:-1])
    assert ": 2 changed, " in again
    assert {row["status"] for row in await desk.table("dodo_subscriptions")} == {"active"}


async def test_why_the_provider_could_not_be_asked_is_one_line(
    dodo: DodoServer, webhooks: Webhooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DODO_PAYMENTS_BASE_URL", dodo.url)
    monkeypatch.setenv("DODO_PAYMENTS_API_KEY", "other")
    code, out, error = await webhooks("reconcile")
    assert (code, out) == (1, "")
    assert error.splitlines()[-1].startswith("kitrocket: DodoPayments answered 401: check DODO_PAYMENTS_API_KEY;")
    monkeypatch.setenv("DODO_PAYMENTS_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("kitrocket.subscriptions.provider._FIRST_PAUSE", 0.0)
    code, out, error = await webhooks("reconcile")
    assert (code, out) == (1, "")
    assert error.splitlines()[-1].startswith("kitrocket: DodoPayments cannot be reached: check DODO_PAYMENTS_BASE_URL")
    assert "Traceback" not in error
