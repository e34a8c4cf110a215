"""How much memory a recorder takes while PostgreSQL stands still, at the limit of its queue and beyond.

    python benchmarks/usage_memory.py [--callers 8000] [--seconds 20]

A kit whose queue holds 10,000 calls records through a proxy. The proxy stops passing anything on, as when PostgreSQL
hangs, while callers keep coming: each waits for its answer, and gives up after two seconds as an impatient client does.
Every second this prints how many calls the queue holds, how many callers wait, and the memory that Python has allocated
since the beginning (tracemalloc) and the whole process takes (RSS). Then the proxy goes on, and so do new calls.

It exits with 1 when the queue exceeds its size, or when memory grows by more than a tenth in the second half of the
stall.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import tracemalloc
from datetime import timedelta
from pathlib import Path

import anyio
import anyio.abc

from kitrocket import KitRocket, Settings
from kitrocket.clock import to_db, utc_now
from kitrocket.embedded import EmbeddedServer
from kitrocket.engine import Engine
from kitrocket.migrations import migrate

QUEUE = 10_000
PATIENCE = 2.0


class Proxy:
    """Passes bytes between a socket of its own and PostgreSQL's, unless it is told to stop."""

    def __init__(self, there: str) -> None:
        self.there = there
        self.goes = anyio.Event()
        self.goes.set()

    def stop(self) -> None:
        self.goes = anyio.Event()

    async def serve(self, listener: anyio.abc.Listener[anyio.abc.SocketStream]) -> None:
        await listener.serve(self.connect)

    async def connect(self, client: anyio.abc.SocketStream) -> None:
        async with client, await anyio.connect_unix(self.there) as server, anyio.create_task_group() as group:
            group.start_soon(self.pass_on, client, server)
            group.start_soon(self.pass_on, server, client)

    async def pass_on(self, source: anyio.abc.SocketStream, target: anyio.abc.SocketStream) -> None:
        try:
            async for chunk in source:
                await self.goes.wait()
                await target.send(chunk)
            await target.send_eof()
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            await target.aclose()


class Bench:
    """A kit behind a proxy, and the callers that keep coming."""

    def __init__(self, kit: KitRocket, proxy: Proxy, callers: int) -> None:
        self.kit = kit
        self.proxy = proxy
        self.callers = callers
        self.most_queued = 0
        self.answered = self.given_up = 0

    async def call(self) -> None:
        with anyio.move_on_after(PATIENCE) as patience:
            await self.kit.usage.record("ada", tokens=1, model="m")
            self.answered += 1
        self.given_up += patience.cancelled_caught

    def measure(self, second: int) -> int:
        recorder = self.kit.usage._recorder
        self.most_queued = max(self.most_queued, len(recorder._queue))
        allocated, _ = tracemalloc.get_traced_memory()
        print(
            f"{second:>3} s  queue {len(recorder._queue):>6,}  waiting {len(recorder._outstanding):>6,}  given up"
            f" {self.given_up:>7,}  allocated {allocated / 1e6:6.1f} MB  RSS {resident() / 1e6:6.1f} MB",
            flush=True,
        )
        return allocated

    async def run(self, seconds: int) -> bool:
        async with anyio.create_task_group() as group:
            await self.call()
            self.proxy.stop()
            seen = []
            for second in range(seconds):
                for _ in range(self.callers // 2):
                    group.start_soon(self.call)
                await anyio.sleep(1)
                seen.append(self.measure(second + 1))
            self.proxy.goes.set()
        await self.call()
        print(f"then {self.answered:,} calls were answered, and the queue held at most {self.most_queued:,}")
        steady = max(seen[seconds // 2 :]) <= 1.1 * max(seen[: seconds // 2])
        return self.most_queued <= QUEUE and steady and self.answered >= 2


def resident() -> int:
    """The bytes of memory that this process takes."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


async def main(folder: Path, callers: int, seconds: int) -> int:
    async with Engine(embedded=EmbeddedServer(folder / "pg")) as engine:
        await migrate(engine)
        await engine.fetch(
            "INSERT INTO users (id, email, name, created_at, updated_at)"
            " VALUES ('ada', 'a@example.com', 'Ada', $1, $1)",
            to_db(utc_now()),
        )
        assert engine.embedded is not None
        address = await engine.embedded.astart()
        socket = folder / "proxy" / f".s.PGSQL.{address.port}"
        socket.parent.mkdir()
        proxy = Proxy(f"{address.host}/.s.PGSQL.{address.port}")
        async with await anyio.create_unix_listener(socket) as listener, anyio.create_task_group() as group:
            group.start_soon(proxy.serve, listener)
            url = f"postgres:///{address.database}?host={socket.parent}&port={address.port}&user={address.user}"
            settings = Settings(usage_queue_size=QUEUE)
            behind = Engine(url, command_timeout=timedelta(minutes=5))
            async with KitRocket(settings, engine=behind, background=False) as kit:
                tracemalloc.start()
                steady = await Bench(kit, proxy, callers).run(seconds)
            group.cancel_scope.cancel()
    return int(not steady)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Measure the memory of a recorder whose database stands still.")
    options.add_argument("--callers", type=int, default=8_000)
    options.add_argument("--seconds", type=int, default=20)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="kitrocket-bench-") as name:
        Path(name).chmod(0o755)  # the account that runs the server for root must reach its data
        sys.exit(asyncio.run(main(Path(name), chosen.callers, chosen.seconds)))
