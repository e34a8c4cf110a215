"""What the outbox of usage costs who writes, and what telling watchers costs who records.

    python benchmarks/usage_export.py

All write to one embedded PostgreSQL, with fsync on. The rounds are interleaved, and what is printed are medians of
their ratios, with the tenth and ninetieth percentile.

* outbox: plain INSERTs of 1, 500 and 10,000 rows, the trigger switched off, as every database has it, and switched on,
  against none.
* live: ``usage.record`` in a running kit by 1, 16 and 64 callers, with ``usage_live`` on against off.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path

import asyncpg

from kitrocket import KitRocket, Settings
from kitrocket.clock import to_db, utc_now
from kitrocket.embedded import EmbeddedServer
from kitrocket.engine import Engine
from kitrocket.ids import new_usage_id
from kitrocket.migrations import migrate

ROUNDS = 15
USERS = 1_000
INSERT = (
    "INSERT INTO usage (id, user_id, tokens_used, model, created_at)"
    " SELECT * FROM unnest($1::text[], $2::text[], $3::integer[], $4::text[], $5::timestamp[])"
)
TRIGGER = (
    "CREATE TRIGGER kitrocket_write_outbox AFTER INSERT ON usage REFERENCING NEW TABLE AS new_rows"
    " FOR EACH STATEMENT EXECUTE FUNCTION kitrocket.usage_queued()"
)
GONE = "DROP TRIGGER IF EXISTS kitrocket_write_outbox ON usage"
#: Each state of the trigger, and the statements that bring it about.
STATES = {
    "none": [GONE],
    "off": [GONE, TRIGGER, "ALTER TABLE usage DISABLE TRIGGER kitrocket_write_outbox"],
    "on": [GONE, TRIGGER],
}

Row = tuple[str, str, int, str, datetime]


def new_rows(count: int) -> list[Row]:
    now = utc_now()
    return [(new_usage_id(now), f"u{random.randrange(USERS)}", 7, "m", to_db(now)) for _ in range(count)]


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    start = time.perf_counter()
    await work()
    return time.perf_counter() - start


async def outbox(connection: asyncpg.Connection, rows: int, statements: int) -> None:
    rates: dict[str, list[float]] = {state: [] for state in STATES}
    for number in range(ROUNDS):
        states = list(STATES)
        for state in states[number % 3 :] + states[: number % 3]:
            for sql in STATES[state]:
                await connection.execute(sql)
            batches = [[list(column) for column in zip(*new_rows(rows), strict=True)] for _ in range(statements)]
            await connection.execute(INSERT, *batches[0])

            async def write(batches: list[list[list[object]]] = batches[1:]) -> None:
                for batch in batches:
                    await connection.execute(INSERT, *batch)

            rates[state].append(rows * (statements - 1) / await timed(write))
    for state in ("off", "on"):
        say(f"outbox {state}, {rows:,} row(s) a statement", rates[state], rates["none"])


async def live(kits: dict[bool, KitRocket], callers: int) -> None:
    rates: dict[bool, list[float]] = {True: [], False: []}
    each = max(2_048 // callers, 32) if callers > 1 else 256
    for number in range(ROUNDS):
        for is_on in (True, False) if number % 2 else (False, True):
            kit = kits[is_on]

            async def many(_caller: int, kit: KitRocket = kit) -> None:
                for _ in range(each):
                    await kit.usage.record(f"u{random.randrange(USERS)}", tokens=7, model="m")

            took = await timed(lambda many=many: asyncio.gather(*map(many, range(callers))))  # type: ignore[misc]  # bound at once
            rates[is_on].append(each * callers / took)
    say(f"record with usage_live, {callers} callers", rates[True], rates[False])


def say(what: str, ours: list[float], theirs: list[float]) -> None:
    ratios = sorted(mine / his for mine, his in zip(ours, theirs, strict=True))
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    rates = f"{statistics.median(ours):>9,.0f} / {statistics.median(theirs):>9,.0f} rows a second"
    print(f"{what:<40} {statistics.median(ratios):5.2f}x ({low:.2f}-{high:.2f})  {rates}", flush=True)


async def main(folder: Path) -> None:
    server = EmbeddedServer(folder / "pg")
    async with Engine(embedded=server) as engine, AsyncExitStack() as stack:
        await migrate(engine)
        await engine.fetch(
            "INSERT INTO users (id, email, name)"
            " SELECT 'u' || n, n || '@example.com', 'n' FROM generate_series(0, $1) n",
            USERS,
        )
        async with engine.direct() as connection:
            for rows, statements in ((1, 301), (500, 9), (10_000, 3)):
                await outbox(connection, rows, statements)
            for sql in STATES["off"]:
                await connection.execute(sql)
        kits = {
            is_on: await stack.enter_async_context(
                KitRocket(Settings(usage_live=is_on), engine=engine, background=False)
            )
            for is_on in (True, False)
        }
        for callers in (1, 16, 64):
            await live(kits, callers)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="kitrocket-bench-") as name:
        Path(name).chmod(0o755)  # the account that runs the server for root must reach its data
        asyncio.run(main(Path(name)))
