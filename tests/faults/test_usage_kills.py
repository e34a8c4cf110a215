"""What was acknowledged is there once, whatever was killed: the application, PostgreSQL, or its connections."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from factories import make_user
from kitrocket import KitRocket, Settings
from kitrocket.embedded import EmbeddedServer
from kitrocket.engine import Engine
from kitrocket.errors import DatabaseUnavailableError
from kitrocket.migrations import migrate
from kitrocket.usage import UsageService

pytestmark = pytest.mark.asyncio(loop_scope="session")

#: Records calls from 32 tasks, and writes each id to standard output once it is acknowledged.
RECORDING = """
import asyncio, os, sys
from kitrocket import KitRocket, Settings

async def work(name):
    settings = Settings(database_url=os.environ["URL"], database_pooler=os.environ["POOLER"] == "1")
    async with KitRocket(settings, background=False) as kit:
        async def caller(number):
            for index in range(1_000_000):
                id = f"{name}-{number}-{index}"
                await kit.usage.record(os.environ["USER_ID"], tokens=1, model="m", id=id)
                os.write(1, f"{id}\\n".encode())
        await asyncio.gather(*(caller(number) for number in range(32)))

asyncio.run(work(sys.argv[1]))
"""

#: Sends its share of ids and some of the others', some of them twice, from 8 tasks, until each is acknowledged.
SENDING = """
import asyncio, os, random, sys
from kitrocket import KitRocket, Settings
from kitrocket.errors import DatabaseUnavailableError

async def work():
    settings = Settings(database_url=os.environ["URL"], database_pooler=os.environ["POOLER"] == "1")
    async with KitRocket(settings, background=False) as kit:
        ids = [n for n in range(int(sys.argv[1])) for _ in range(random.choice([0, 0, 0, 1, 1, 1, 1, 2]))]
        ids += range(int(sys.argv[2]), int(sys.argv[1]), 8)
        random.shuffle(ids)
        os.write(1, b"ready\\n")
        async def caller(some):
            for n in some:
                while True:
                    try:
                        await kit.usage.record(f"u{n % 10}", tokens=n, model=f"m{n % 3}", id=f"id-{n}")
                        break
                    except DatabaseUnavailableError:
                        continue
        await asyncio.gather(*(caller(ids[number::8]) for number in range(8)))

asyncio.run(work())
"""


def environment(database_url: str, user_id: str = "") -> dict[str, str]:
    pooler = "1" if "KITROCKET_TEST_POOLER_DSN" in os.environ else "0"
    return {**os.environ, "URL": database_url, "POOLER": pooler, "USER_ID": user_id}


async def killed_while_recording(engine: Engine, database_url: str, points: int) -> None:
    user_id = await make_user(engine)
    acknowledged: list[str] = []
    for number in range(points):
        with subprocess.Popen(
            [sys.executable, "-c", RECORDING, f"run{number}"],
            env=environment(database_url, user_id),
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            lines = [await anyio.to_thread.run_sync(process.stdout.readline)]
            await anyio.sleep(random.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            lines += (await anyio.to_thread.run_sync(process.stdout.read)).splitlines(keepends=True)
        acknowledged += [line.decode().strip() for line in lines if line.endswith(b"\n")]
    found = [row["id"] for row in await engine.fetch("SELECT id FROM usage")]
    assert len(acknowledged) > points
    assert set(acknowledged) <= set(found)
    assert len(found) == len(set(found))
    usage = UsageService(engine)
    assert (await usage.verify()).drift == 0
    assert await usage.total(user_id) == len(found)


async def test_an_application_killed_at_ten_points_lost_nothing(engine: Engine, database_url: str) -> None:
    await killed_while_recording(engine, database_url, 10)


@pytest.mark.faults
async def test_an_application_killed_at_a_hundred_points_lost_nothing(engine: Engine, database_url: str) -> None:
    await killed_while_recording(engine, database_url, 100)


async def sent_by_eight_processes(engine: Engine, database_url: str, ids: int) -> None:
    for number in range(10):
        await make_user(engine, id=f"u{number}")
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", SENDING, str(ids), str(number)],
                    env=environment(database_url),
                    stdout=subprocess.PIPE,
                )
            )
            for number in range(8)
        ]
        for process in processes:
            assert process.stdout is not None
            assert await anyio.to_thread.run_sync(process.stdout.readline) == b"ready\n"
        while any(process.poll() is None for process in processes):
            await engine.fetch(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
                " AND pid <> pg_backend_pid() AND random() < 0.2"
            )
            await anyio.sleep(0.1)
    assert [process.returncode for process in processes] == [0] * 8
    usage = UsageService(engine)
    expected = Counter({f"u{number}": sum(range(number, ids, 10)) for number in range(10)})
    assert await engine.fetchval("SELECT count(*) FROM usage") == ids
    assert {top.user_id: top.tokens for top in await usage.top_users()} == expected
    assert {name: await usage.total(name) for name in expected} == expected
    assert (await usage.verify()).drift == 0


@pytest.mark.direct
async def test_a_thousand_ids_sent_by_eight_processes_over_cut_connections_count_once(
    engine: Engine, database_url: str
) -> None:
    await sent_by_eight_processes(engine, database_url, 1_000)


@pytest.mark.direct
@pytest.mark.faults
async def test_ten_thousand_ids_sent_by_eight_processes_over_cut_connections_count_once(
    engine: Engine, database_url: str
) -> None:
    await sent_by_eight_processes(engine, database_url, 10_000)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path that the account of the server can reach."""
    with tempfile.TemporaryDirectory(prefix="kitrocket-kills-") as name:
        Path(name).chmod(0o755)
        yield Path(name)
        EmbeddedServer(Path(name) / "pg").stop()


async def postgresql_killed_while_recording(folder: Path, points: int) -> None:
    server = EmbeddedServer(folder / "pg")
    async with Engine(embedded=server) as engine:
        await migrate(engine)
        user_id = await make_user(engine)
        acknowledged: set[str] = set()
        over = False
        async with KitRocket(Settings(), engine=engine, background=False) as kit:

            async def caller(number: int) -> None:
                index = 0
                while not over:
                    id = f"{number}-{index}"
                    try:
                        await kit.usage.record(user_id, tokens=1, model="m", id=id)
                    except DatabaseUnavailableError:
                        continue
                    acknowledged.add(id)
                    index += 1

            async with anyio.create_task_group() as group:
                for number in range(32):
                    group.start_soon(caller, number)
                for _ in range(points):
                    before = len(acknowledged)
                    await anyio.sleep(random.uniform(0.05, 0.3))
                    pid = (await anyio.to_thread.run_sync(server.status)).pid
                    assert pid is not None
                    os.kill(pid, signal.SIGKILL)
                    await server.astart()
                    with anyio.fail_after(60):
                        while len(acknowledged) < before + 32:
                            await anyio.sleep(0.01)
                over = True
        found = [row["id"] for row in await engine.fetch("SELECT id FROM usage")]
        assert acknowledged <= set(found)
        assert (await UsageService(engine).verify()).drift == 0
        assert await UsageService(engine).total(user_id) == len(found)


@pytest.mark.embedded
async def test_postgresql_killed_at_ten_points_lost_nothing(folder: Path) -> None:
    await postgresql_killed_while_recording(folder, 10)


@pytest.mark.embedded
@pytest.mark.faults
async def test_postgresql_killed_at_a_hundred_points_lost_nothing(folder: Path) -> None:
    await postgresql_killed_while_recording(folder, 100)
