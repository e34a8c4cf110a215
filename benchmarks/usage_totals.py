"""How fast usage is summed, beside the covering index alone and the seed's query on the seed's schema.

    python benchmarks/usage_totals.py [--rows 10000000] [--users 10000] [--heavy 500000] [--days 40]

One embedded PostgreSQL holds what ``usage_load.py`` makes: 10 million calls of 40 days by 10,000 users, and 500,000 of
one more in the last 30 days. The same calls stand in a table as the seed has it, without kitrocket's index. It takes
some five minutes and 5 GB. The rounds are interleaved; what is printed are medians of the ratios. All statements run
prepared on one held connection.

* rolled: whole UTC days from the daily sums, the edges from single calls, as ``usage.total`` and its siblings read.
* index: the same answer from single calls through kitrocket's covering index, freshly vacuumed.
* seed: the seed's second query, on the seed's schema; an ORM in between would not show beside it.

It exits with 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
from usage_load import Load, arguments, load_shown

from kitrocket.clock import to_db, utc_now
from kitrocket.embedded import EmbeddedServer
from kitrocket.engine import Engine
from kitrocket.migrations import migrate
from kitrocket.sql import statements
from kitrocket.windows import bucket_starts, whole_days, window

ROUNDS = 11
SQL = statements("usage")
SEED = "SELECT sum(tokens_used) AS tokens FROM seed.usage WHERE user_id = $1 AND created_at >= $2"


@dataclass(frozen=True)
class Question:
    """``name`` is asked in two ways, whose ratio is to be at least ``goal``."""

    name: str
    fast: str
    fast_arguments: Sequence[Any]
    slow: str
    slow_arguments: Sequence[Any]
    goal: float


async def prepare(connection: asyncpg.Connection) -> None:
    await connection.execute("SET timezone = 'UTC'")
    await connection.execute("CREATE SCHEMA seed")
    await connection.execute("CREATE TABLE seed.usage AS SELECT * FROM usage ORDER BY created_at")
    await connection.execute("ALTER TABLE seed.usage ADD PRIMARY KEY (id)")
    await connection.execute("VACUUM ANALYZE seed.usage")


def questions(now: datetime) -> list[Question]:
    asked = window(since=now - timedelta(days=30), until=None, now=now)
    since = to_db(asked.since)
    first, _ = whole_days(asked, complete_from=date.min)
    whole = (None if first is None else to_db(first), None)
    starts = bucket_starts(asked, by="day", zone=now.tzinfo, now=now)  # type: ignore[arg-type]  # it has one
    days = [to_db(start) for start in starts]
    heavy, typical = ("heavy", since, None), ("u7", since, None)
    total, rolled = SQL["total"], SQL["total_rolled"]
    by_model, by_day = (SQL["by_model_rolled"], SQL["by_model"]), (SQL["by_time_rolled"], SQL["by_time"])
    return [
        Question("30-day sum, heavy user, index", rolled, (*heavy, *whole, None), total, (*heavy, None), 10),
        Question("30-day sum, heavy user, seed", rolled, (*heavy, *whole, None), SEED, heavy[:2], 100),
        Question("30-day sum, typical user, index", rolled, (*typical, *whole, None), total, (*typical, None), 1 / 1.6),
        Question("by model, heavy user, index", by_model[0], (*heavy, *whole), by_model[1], heavy, 10),
        Question("by day, heavy user, index", by_day[0], (*heavy, *whole, days), by_day[1], (*heavy, days), 10),
        Question(
            "all users, raw", SQL["top_users_rolled"], (since, None, *whole, 20), SQL["top_users"], (since, None, 20), 8
        ),
    ]


async def timed(statement: Any, arguments: Sequence[Any]) -> tuple[float, list[asyncpg.Record]]:
    start = time.perf_counter()
    rows = await statement.fetch(*arguments)
    return time.perf_counter() - start, rows


def answer(rows: list[asyncpg.Record]) -> list[tuple[object, ...]]:
    """What both ways must agree on: everything but the state that the rolled one adds, as numbers."""
    return sorted(
        tuple(
            int(value) if key == "tokens" else value
            for key, value in row.items()
            if key not in {"rollup_from", "raw_from"}
        )
        for row in rows
    )


async def bench(connection: asyncpg.Connection, now: datetime) -> bool:
    failed = False
    for question in questions(now):
        fast, slow = await connection.prepare(question.fast), await connection.prepare(question.slow)
        repeat = 20 if question.goal < 1 else 1
        ratios: list[float] = []
        times: list[float] = []
        for _ in range(ROUNDS):
            quick = slowest = 0.0
            for _ in range(repeat):
                taken, mine = await timed(fast, question.fast_arguments)
                quick += taken
                taken, theirs = await timed(slow, question.slow_arguments)
                slowest += taken
            if answer(mine) != answer(theirs):
                raise RuntimeError(f"{question.name}: the answers differ")
            ratios.append(slowest / quick)
            times.append(quick / repeat)
        ratio = statistics.median(ratios)
        failed |= ratio < question.goal
        print(
            f"{question.name:<34} {ratio:8.2f}x  {statistics.median(times) * 1000:8.2f} ms  goal {question.goal:.3g}x"
            f"  {'ok' if ratio >= question.goal else 'MISSED'}",
            flush=True,
        )
    return failed


async def main(folder: Path, what: Load) -> int:
    now = utc_now()
    async with Engine(embedded=EmbeddedServer(folder / "pg")) as engine:
        await migrate(engine)
        connection = await engine.get_new_connection(timed=False)
        try:
            await load_shown(engine, what, now)
            await prepare(connection)
            return int(await bench(connection, now))
        finally:
            await connection.close()


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Measure how fast usage is summed.")
    arguments(options)
    chosen = Load(**vars(options.parse_args()))
    with tempfile.TemporaryDirectory(prefix="kitrocket-bench-") as name:
        Path(name).chmod(0o755)  # the account that runs the server for root must reach its data
        sys.exit(asyncio.run(main(Path(name), chosen)))
