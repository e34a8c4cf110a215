"""How fast calls are recorded, beside one INSERT each, plain multi-row inserts and COPY.

    python benchmarks/usage_record.py

All write to one embedded PostgreSQL, with fsync on, into the migrated schema, so that whatever stands on the table is
paid by all. The rounds are interleaved: each runs every contender, and gives a ratio; what is printed are medians.

* record: ``usage.record`` in a running kit, by 1, 16 and 64 callers at once, each acknowledged after its commit.
* INSERT: the same callers, each with a held asyncpg connection and a prepared one-row INSERT.
* Piccolo, SQLAlchemy: the same callers with an object each, ten and fifteen pooled connections.
* record_many: 1,000 and 10,000 rows in a call, with the rollup's triggers and without.
* plain: one multi-row INSERT of the same rows. COPY: the same rows through the protocol's bulk load.

It exits with 1 when a goal is missed.
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path

import asyncpg
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from kitrocket import KitRocket
from kitrocket.clock import to_db, utc_now
from kitrocket.embedded import EmbeddedServer
from kitrocket.engine import Engine
from kitrocket.ids import new_usage_id
from kitrocket.migrations import migrate
from kitrocket.tables import Usage
from kitrocket.usage import UsageService

USERS = 1_000
ROUNDS = 11
CALLS = 4_096
MODELS = ["claude-sonnet-4-20250514", "gpt-5", "gemini-3"]
ONE = "INSERT INTO usage (id, user_id, tokens_used, model, created_at) VALUES ($1, $2, $3, $4, $5)"
PLAIN = (
    "INSERT INTO usage (id, user_id, tokens_used, model, created_at)"
    " SELECT * FROM unnest($1::text[], $2::text[], $3::integer[], $4::text[], $5::timestamp[])"
)
#: Callers → how many times as fast as one INSERT each.
RECORD_GOALS = {1: 0.9, 16: 2.0, 64: 4.0}
PLAIN_GOAL, COPY_GOAL = 0.6, 0.7
COLUMNS = ["id", "user_id", "tokens_used", "model", "created_at"]

Row = tuple[str, str, int, str, datetime]
Recording = Callable[[int, Row], Awaitable[None]]


class Base(DeclarativeBase):
    """SQLAlchemy wants one."""


class UsageRow(Base):
    """A call, for SQLAlchemy."""

    __tablename__ = "usage"

    id: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[str]
    tokens_used: Mapped[int]
    model: Mapped[str]
    created_at: Mapped[datetime]


def new_rows(count: int) -> list[Row]:
    now = utc_now()
    return [
        (new_usage_id(now), f"u{random.randrange(USERS)}", random.randrange(5_000), random.choice(MODELS), to_db(now))
        for _ in range(count)
    ]


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    gc.collect()
    start = time.perf_counter()
    await work()
    return time.perf_counter() - start


class Bench:
    def __init__(self, kit: KitRocket, alchemy: AsyncEngine, connections: list[asyncpg.Connection]) -> None:
        self.kit = kit
        self.alchemy = alchemy
        self.connections = connections
        self.failed = False

    async def record(self, callers: int) -> None:
        """Compare ``record`` with one INSERT each, by the driver, by Piccolo and by SQLAlchemy."""
        statements = [await connection.prepare(ONE) for connection in self.connections[:callers]]
        sessions = async_sessionmaker(self.alchemy)

        async def ours(_caller: int, row: Row) -> None:
            await self.kit.usage.record(row[1], tokens=row[2], model=row[3])

        async def theirs(caller: int, row: Row) -> None:
            await statements[caller].fetch(*row)

        async def by_piccolo(_caller: int, row: Row) -> None:
            await self.kit.engine.run(Usage.insert(Usage(**dict(zip(COLUMNS, row, strict=True)))))

        async def by_sqlalchemy(_caller: int, row: Row) -> None:
            async with sessions() as session:
                session.add(UsageRow(**dict(zip(COLUMNS, row, strict=True))))
                await session.commit()

        contenders = [
            ("ours", ours, 1),
            ("INSERT", theirs, 1),
            ("Piccolo", by_piccolo, 8),
            ("SQLAlchemy", by_sqlalchemy, 8),
        ]
        rates: dict[str, list[float]] = {name: [] for name, _, _ in contenders}
        for number in range(ROUNDS):
            turn = number % len(contenders)
            for name, one, share in contenders[turn:] + contenders[:turn]:
                each = max((CALLS if callers > 1 else 512) // callers // share, 1)
                rows = [new_rows(each) for _ in range(callers)]

                async def many(caller: int, one: Recording = one, rows: list[list[Row]] = rows) -> None:
                    for row in rows[caller]:
                        await one(caller, row)

                took = await timed(lambda many=many: asyncio.gather(*map(many, range(callers))))  # type: ignore[misc]  # bound at once
                rates[name].append(each * callers / took)
        for name, goal in (("INSERT", RECORD_GOALS[callers]), ("Piccolo", None), ("SQLAlchemy", None)):
            self.say(f"record, {callers} callers", rates["ours"], name, rates[name], goal)

    async def record_many(self, count: int, *, rollup: bool) -> None:
        """Compare ``record_many`` with a plain multi-row INSERT and with COPY."""
        connection = self.connections[0]
        usage = UsageService(self.kit.engine, rollup=rollup)
        rates: dict[str, list[float]] = {"ours": [], "plain": [], "copy": []}
        for number in range(ROUNDS):
            batches = [new_rows(count) for _ in range(3)]
            entries = [
                {"id": row[0], "user_id": row[1], "tokens": row[2], "model": row[3]} for row in batches[0]
            ]  # as an application has them
            works: list[tuple[str, Callable[[], Awaitable[object]]]] = [
                ("ours", lambda entries=entries: usage.record_many(entries)),  # type: ignore[misc]  # bound at once
                (
                    "plain",
                    lambda batch=batches[1]: connection.execute(  # type: ignore[misc]  # as above
                        PLAIN, *(list(column) for column in zip(*batch, strict=True))
                    ),
                ),
                (
                    "copy",
                    lambda batch=batches[2]: connection.copy_records_to_table(  # type: ignore[misc]  # as above
                        "usage", records=batch, columns=COLUMNS
                    ),
                ),
            ]
            for name, work in works[number % 3 :] + works[: number % 3]:
                rates[name].append(count / await timed(work))
        what = f"record_many, {count:,} rows" + ("" if rollup else ", no rollup")
        self.say(what, rates["ours"], "plain INSERT", rates["plain"], PLAIN_GOAL if rollup else None)
        self.say(what, rates["ours"], "COPY", rates["copy"], None if rollup else COPY_GOAL)

    def say(self, what: str, ours: list[float], other: str, theirs: list[float], goal: float | None) -> None:
        ratio = statistics.median(mine / his for mine, his in zip(ours, theirs, strict=True))
        verdict = "" if goal is None else f"goal {goal:g}x  {'ok' if ratio >= goal else 'MISSED'}"
        self.failed |= goal is not None and ratio < goal
        rates = f"{statistics.median(ours):>9,.0f} / {statistics.median(theirs):>9,.0f} rows a second"
        print(f"{what:<36} against {other:<14} {ratio:5.2f}x  {rates}  {verdict}", flush=True)


async def bench(engine: Engine) -> bool:
    async with AsyncExitStack() as stack:
        kit = await stack.enter_async_context(KitRocket(engine=engine, background=False))
        connections = [await engine.get_new_connection() for _ in range(max(RECORD_GOALS))]
        for connection in connections:
            stack.push_async_callback(connection.close)
        await engine.fetch(
            "INSERT INTO users (id, email, name)"
            " SELECT 'u' || n, n || '@example.com', 'n' FROM generate_series(0, $1) n",
            USERS,
        )
        assert engine.embedded is not None
        address = await engine.embedded.astart()
        url = URL.create(
            "postgresql+asyncpg",
            username=address.user,
            database=address.database,
            query={"host": str(address.host), "port": str(address.port)},
        )
        alchemy = create_async_engine(url)
        stack.push_async_callback(alchemy.dispose)
        found = Bench(kit, alchemy, connections)
        for callers in RECORD_GOALS:
            await found.record(callers)
        for rollup in (True, False):
            if not rollup:
                await engine.fetch("ALTER TABLE usage DISABLE TRIGGER USER")
            for count in (1_000, 10_000):
                await found.record_many(count, rollup=rollup)
        return found.failed


async def main(folder: Path) -> int:
    embedded = EmbeddedServer(folder / "pg", options={"max_connections": "120"})
    async with Engine(embedded=embedded) as engine:
        await migrate(engine)
        return int(await bench(engine))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="kitrocket-bench-") as name:
        Path(name).chmod(0o755)  # the account that runs the server for root must reach its data
        sys.exit(asyncio.run(main(Path(name))))
