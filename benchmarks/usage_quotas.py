"""How long calls wait that race for one limit, and how many are admitted, beside a sum that is read before an insert.

    python benchmarks/usage_quotas.py

4 processes make 50 calls each at once, for 1,000 tokens of a limit of 50,000, on one embedded PostgreSQL with fsync on.
Every other round is for a user who never called before. The rounds are interleaved: each runs every contender.

* reserve: ``usage.reserve``, admitted or refused.
* sum, then insert: the user's calls are summed, and where the tokens fit a call is inserted, in a transaction.

It exits with 1 when a goal is missed: exactly the limit, and a median of at most 200 ms.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

from kitrocket.clock import to_db, utc_now
from kitrocket.embedded import EmbeddedServer
from kitrocket.engine import Engine
from kitrocket.ids import new_usage_id
from kitrocket.migrations import migrate
from kitrocket.usage import UsageService

ROUNDS = 10
PROCESSES, CALLS = 4, 50
TOKENS, LIMIT = 1_000, 50_000
GOAL = 0.2
CONTENDERS = ("reserve", "sum, then insert")


async def call_many(url: str) -> None:
    """Make the calls that each line asks for, and answer with what was admitted and how long each call took."""
    async with Engine(url, pool_size=10) as engine:
        usage = UsageService(engine)
        held = [await engine.acquire() for _ in range(10)]
        for connection in held:
            await engine.give_back(connection)

        async def reserve(user_id: str) -> bool:
            return (await usage.reserve(user_id, tokens=TOKENS, model="m", limit=LIMIT)).allowed

        async def sum_then_insert(user_id: str) -> bool:
            async with engine.transaction():
                fits = await usage.total(user_id) + TOKENS <= LIMIT
                if fits:
                    await usage.record(user_id, tokens=TOKENS, model="m")
                return fits

        calls: dict[str, Callable[[str], Awaitable[bool]]] = dict(
            zip(CONTENDERS, (reserve, sum_then_insert), strict=True)
        )
        print("ready", flush=True)
        for line in sys.stdin:
            contender, user_id = json.loads(line)
            took: list[float] = []

            async def one(
                call: Callable[[str], Awaitable[bool]] = calls[contender],
                user_id: str = user_id,
                took: list[float] = took,
            ) -> bool:
                start = time.perf_counter()
                try:
                    return await call(user_id)
                finally:
                    took.append(time.perf_counter() - start)

            admitted = await asyncio.gather(*(one() for _ in range(CALLS)))
            print(json.dumps([sum(admitted), took]), flush=True)


async def bench(engine: Engine, url: str) -> int:
    admitted: dict[str, list[int]] = {name: [] for name in CONTENDERS}
    took: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, __file__],
                    env={**os.environ, "BENCH_URL": url},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(PROCESSES)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for number in range(ROUNDS):
            for name in CONTENDERS[:: 1 if number % 2 else -1]:
                user_id = f"{name} {number}"
                await make_user(engine, user_id, old=number % 2 == 1)
                for process in processes:
                    assert process.stdin is not None
                    process.stdin.write(json.dumps([name, user_id]) + "\n")
                    process.stdin.flush()
                answers = [json.loads(process.stdout.readline()) for process in processes if process.stdout is not None]
                admitted[name].append(sum(count for count, _ in answers))
                took[name] += [one for _, some in answers for one in some]
    fitting = LIMIT // TOKENS
    for name in CONTENDERS:
        quantiles = statistics.quantiles(took[name], n=100)
        print(
            f"{name:<18} {min(admitted[name])} to {max(admitted[name])} of {fitting} admitted"
            f"   p50 {quantiles[49] * 1000:6.1f} ms   p99 {quantiles[98] * 1000:6.1f} ms"
        )
    exact = set(admitted["reserve"]) == {fitting}
    fast = statistics.median(took["reserve"]) <= GOAL
    print(f"exactly the limit: {'ok' if exact else 'MISSED'}")
    print(f"p50 at most {GOAL * 1000:g} ms: {'ok' if fast else 'MISSED'}")
    return 0 if exact and fast else 1


async def make_user(engine: Engine, user_id: str, *, old: bool) -> None:
    """Make a user; an old one had a quota before, and 10,000 calls that have left the window."""
    await engine.fetch("INSERT INTO users (id, email, name) VALUES ($1, $1, 'n')", user_id)
    if old:
        await UsageService(engine).reserve(user_id, tokens=0, model="m", limit=LIMIT)
        now = utc_now()
        await engine.fetch(
            "INSERT INTO usage (id, user_id, tokens_used, model, created_at)"
            " SELECT $2 || n, $1, 1000, 'm', $3::timestamp - interval '31 days' - n * interval '1 minute'"
            " FROM generate_series(1, 10000) n",
            user_id,
            new_usage_id(now),
            to_db(now),
        )


async def main(folder: Path) -> int:
    server = EmbeddedServer(folder / "pg", options={"max_connections": "120"})
    async with Engine(embedded=server) as engine:
        await migrate(engine)
        address = server.start()
        try:
            return await bench(
                engine,
                f"postgres://{quote(address.user)}@/{quote(address.database)}"
                f"?host={quote(str(address.host), safe='')}&port={address.port}",
            )
        finally:
            server.release()


if __name__ == "__main__":
    if "BENCH_URL" in os.environ:
        asyncio.run(call_many(os.environ["BENCH_URL"]))
        sys.exit()
    with tempfile.TemporaryDirectory(prefix="kitrocket-bench-") as name:
        Path(name).chmod(0o755)  # the account that runs the server for root must reach its data
        sys.exit(asyncio.run(main(Path(name))))
