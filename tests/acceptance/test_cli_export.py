"""``kitrocket usage export`` and what ``db migrate`` and ``doctor`` say of it, in processes of their own."""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from signal import SIGKILL
from subprocess import DEVNULL

import anyio
import pytest

from dodo_server import DodoServer
from factories import make_subscription, make_usage, make_user
from kitrocket.clock import utc_now
from kitrocket.engine import Engine
from kitrocket.usage import UsageService

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.direct,
    pytest.mark.usefixtures("turn_with_roles"),  # `doctor` looks for them
]


COMMAND = [sys.executable, "-c", "from kitrocket.cli import main; main()"]


@dataclass(frozen=True)
class Cli:
    """The command line of an application that exports usage."""

    database_url: str
    dodo_url: str

    def environment(self, **changed: str) -> dict[str, str]:
        return {
            **os.environ,
            "DATABASE_URL": self.database_url,
            "DODO_PAYMENTS_API_KEY": "key",
            "DODO_PAYMENTS_BASE_URL": self.dodo_url,
            "KITROCKET_USAGE_EXPORT_EVENT": "tokens",
            "COLUMNS": "200",
            **changed,
        }

    async def __call__(self, *arguments: str, **changed: str) -> tuple[int, str]:
        done = await anyio.run_process([*COMMAND, *arguments], env=self.environment(**changed), check=False)
        return done.returncode, (done.stdout + done.stderr).decode()


@pytest.fixture
def kitrocket(database_url: str, dodo: DodoServer) -> Cli:
    return Cli(database_url, dodo.url)


async def test_calls_are_exported_and_what_is_left_is_told(engine: Engine, kitrocket: Cli, dodo: DodoServer) -> None:
    code, out = await kitrocket("doctor")
    assert code == 1
    assert "wrong  KITROCKET_USAGE_EXPORT_EVENT is set, but usage is not put into the outbox" in out
    code, out = await kitrocket("db", "migrate")
    assert code == 0
    assert "usage is put into the outbox from now on" in out

    customer, lead, now = await make_user(engine), await make_user(engine), utc_now()
    await make_subscription(engine, customer, dodo_customer_id="cus_1")
    await make_usage(engine, customer, id="good", at=now)
    await make_usage(engine, customer, id="bad", model="unknown", at=now - timedelta(minutes=31))
    await make_usage(engine, lead, id="nobodys", at=now)
    dodo.dislikes = lambda event: event["metadata"]["model"] == "unknown"

    code, out = await kitrocket("doctor", KITROCKET_USAGE_EXPORT_EVENT="")
    assert code == 1
    assert "wrong  the oldest call that is not exported is 31 minutes old" in out
    assert "note   usage is put into the outbox, and KITROCKET_USAGE_EXPORT_EVENT is not set here" in out
    code, out = await kitrocket("usage", "export")
    assert code == 1
    assert "Sent 1 call(s) in 3 request(s): 1 refused, 0 deleted meanwhile, 1 of users who are no customers." in out
    assert "1 call(s) are left, 1 of them wait for a customer; 1 refused." in out
    code, out = await kitrocket("usage", "export", "--parked")
    assert code == 1
    assert f"bad   {customer}" in out
    assert "HTTP 422" in out
    dodo.dislikes = lambda _event: False
    code, out = await kitrocket("usage", "export", "--retry")
    assert code == 0
    assert sorted(dodo.events) == ["bad", "good"]
    assert (await kitrocket("usage", "export", "--retry", "--stop"))[0] == 2
    code, out = await kitrocket("usage", "export", "--stop")
    assert (code, out) == (0, "Calls are no longer put into the outbox.\n")


async def test_who_is_killed_between_sending_and_deleting_bills_nothing_twice(
    engine: Engine, kitrocket: Cli, dodo: DodoServer
) -> None:
    code, _ = await kitrocket("db", "migrate")
    assert code == 0
    customer = await make_user(engine)
    await make_subscription(engine, customer, dodo_customer_id="cus_1")
    calls = [{"id": f"{number:04}", "user_id": customer, "tokens": 1, "model": "m"} for number in range(1_500)]
    await UsageService(engine).record_many(calls)
    process = await anyio.open_process(
        [*COMMAND, "usage", "export"], env=kitrocket.environment(), stdout=DEVNULL, stderr=DEVNULL
    )

    async def kill_at_the_second_call() -> None:
        if len(dodo.calls) == 2:
            process.kill()
            await process.wait()

    dodo.aftermath = kill_at_the_second_call
    assert await process.wait() == -SIGKILL
    dodo.aftermath = None
    assert len(dodo.events) == 1_500
    assert await engine.fetchval("SELECT count(*)::int FROM kitrocket.usage_outbox") == 500
    # Nobody else may send them until the lease of who died has run out.
    code, out = await kitrocket("usage", "export")
    assert "Sent 0 call(s)" in out
    await engine.fetch("UPDATE kitrocket.usage_outbox SET next_at = next_at - interval '1 minute'")
    code, out = await kitrocket("usage", "export")
    assert code == 0
    assert await engine.fetchval("SELECT count(*)::int FROM kitrocket.usage_outbox") == 0
    assert len(dodo.events) == 1_500
    assert Counter(dodo.sent.values()) == {1: 1_000, 2: 500}
