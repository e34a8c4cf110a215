"""Calls of several processes that race for one limit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack

import anyio
import anyio.to_thread
import pytest

from factories import make_usage, make_user
from kitrocket.clock import utc_now
from kitrocket.engine import Engine
from kitrocket.usage import UsageService

pytestmark = pytest.mark.asyncio(loop_scope="session")

#: Reserves 50 times at once for each user that a line names, and says how many were admitted.
RESERVING = """
import asyncio, os, sys
from kitrocket.engine import Engine
from kitrocket.usage import UsageService

async def work():
    async with Engine(os.environ["URL"], pooler=os.environ["POOLER"] == "1", pool_size=10) as engine:
        usage = UsageService(engine)
        held = [await engine.acquire() for _ in range(10)]
        for connection in held:
            await engine.give_back(connection)
        print("ready", flush=True)
        for line in sys.stdin:
            decisions = await asyncio.gather(
                *(usage.reserve(line.strip(), tokens=1_000, model="m", limit=50_000) for _ in range(50))
            )
            print(sum(decision.allowed for decision in decisions), flush=True)

asyncio.run(work())
"""


async def test_200_calls_of_4_processes_are_admitted_as_far_as_the_limit(engine: Engine, database_url: str) -> None:
    new, old = await make_user(engine), await make_user(engine)
    now = utc_now()
    for number in range(100):
        await make_usage(engine, old, id=f"old-{number}", tokens=100, at=now)
    await UsageService(engine).reserve(old, tokens=0, model="m", limit=50_000)
    pooler = "1" if "KITROCKET_TEST_POOLER_DSN" in os.environ else "0"
    admitted: Counter[str] = Counter()
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", RESERVING],
                    env={**os.environ, "URL": database_url, "POOLER": pooler},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(4)
        ]

        async def line_of(process: subprocess.Popen[str]) -> str:
            assert process.stdout is not None
            return (await anyio.to_thread.run_sync(process.stdout.readline)).strip()

        assert [await line_of(process) for process in processes] == ["ready"] * 4
        for user_id in (new, old):
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(f"{user_id}\n")
                process.stdin.flush()
            for process in processes:
                admitted[user_id] += int(await line_of(process))
    assert admitted == {new: 50, old: 40}
    held = await engine.fetch(
        "SELECT user_id, sum(tokens)::int AS tokens FROM kitrocket.usage_reservations GROUP BY user_id"
    )
    assert {row["user_id"]: row["tokens"] for row in held} == {new: 50_000, old: 40_000}
