"""Load millions of AI calls, for whoever wants to see kitrocket at that size.

    python benchmarks/usage_load.py [--url postgres://…] [--rows 10000000] [--users 10000] [--heavy 500000] [--days 40]

Without a URL it loads into an embedded PostgreSQL that goes away again, and tells how long that took. The calls are
spread evenly over the days before now and over the users; one user more, ``heavy``, has made its own share in the last
30 days.

A day is a transaction that also sums its calls into the rollup, so that what was killed goes on from where it was. The
server makes the rows: sending them would take longer than storing them. Foreign keys and triggers rest meanwhile, so
the role must be a superuser; the large index is built at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path

import asyncpg

from kitrocket.cli.progress import progress
from kitrocket.clock import to_db, utc_now
from kitrocket.ddl import USAGE_USER_CREATED
from kitrocket.embedded import EmbeddedServer
from kitrocket.engine import Engine
from kitrocket.migrations import migrate

HEAVY = "heavy"
#: How many days the heavy user's calls take: the window of a total.
WINDOW = 30

USERS = """
INSERT INTO users (id, email, name, created_at, updated_at)
SELECT id, id || '@example.com', 'Ada', $2::timestamp, $2::timestamp
FROM (SELECT 'u' || n AS id FROM generate_series(0, $1::integer - 1) n UNION ALL SELECT 'heavy') AS made
ON CONFLICT DO NOTHING
"""
#: $1 the day, $2 how many calls, $3 how many of them are the heavy user's, $4 users, $5 now. Ids ascend with the time.
CALLS = """
INSERT INTO usage (id, user_id, tokens_used, model, created_at)
SELECT (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7' || substr(hash, 1, 3) || '8'
        || substr(hash, 4, 15))::uuid::text,
       CASE WHEN n % $2 < $3 THEN 'heavy' ELSE 'u' || ('x' || substr(hash, 20, 7))::bit(28)::integer % $4 END,
       ('x' || substr(hash, 25, 5))::bit(20)::integer % 5000,
       (ARRAY['claude-sonnet-4-20250514', 'gpt-5', 'gemini-3'])[1 + n % 3],
       at
FROM (
    SELECT n * 48271 AS n,
           md5($1::date || '/' || n) AS hash,
           $1::date + n * (least(interval '1 day', $5::timestamp - $1::date) / $2) AS at
    FROM generate_series(0, $2::bigint - 1) AS n
) AS made
"""
SUMS = """
INSERT INTO kitrocket.usage_daily (user_id, day, model, tokens, calls)
SELECT user_id, $1::date, model, sum(tokens_used), count(*)
FROM usage
WHERE created_at >= $1::date AND created_at < $1::date + 1
GROUP BY user_id, model
ORDER BY user_id, model
"""


@dataclass(frozen=True)
class Load:
    """How much is loaded: ``rows`` calls in all, of which ``heavy`` are one user's in the last 30 days."""

    rows: int = 10_000_000
    users: int = 10_000
    heavy: int = 500_000
    days: int = 40

    def day(self, today: date, ago: int) -> tuple[date, int, int]:
        """The day so many days ago, how many calls it has, and how many of them are the heavy user's."""
        heavy = self.heavy // (WINDOW + 1) if ago <= WINDOW else 0
        others = (self.rows - self.heavy) // (self.days + 1)
        return today - timedelta(days=ago), heavy + others, heavy


async def load(engine: Engine, what: Load, now: datetime, *, report: Callable[[int], None] = lambda _done: None) -> int:
    """Load what is not there yet, and return how many calls this made. ``report`` is told how many there are."""
    today = to_db(now).date()
    connection = await engine.get_new_connection(timed=False)
    made = done = 0
    try:
        await connection.execute(USERS, what.users, to_db(now))
        await connection.execute("SET session_replication_role = 'replica'")
        await connection.execute(f"DROP INDEX IF EXISTS {USAGE_USER_CREATED.name}")
        there = {row["day"] for row in await connection.fetch("SELECT DISTINCT day FROM kitrocket.usage_daily")}
        for ago in range(what.days, -1, -1):
            day, calls, heavy = what.day(today, ago)
            if day not in there:
                await _load_day(connection, day, calls, heavy, what.users, now)
                made += calls
            done += calls
            report(done)
        await connection.execute(USAGE_USER_CREATED.create.replace("CONCURRENTLY ", ""))
        for table in ("usage", "users", "kitrocket.usage_daily"):
            await connection.execute(f"VACUUM ANALYZE {table}")
    finally:
        await connection.close()
    return made


async def _load_day(
    connection: asyncpg.Connection, day: date, calls: int, heavy: int, users: int, now: datetime
) -> None:
    async with connection.transaction():
        await connection.execute(CALLS, day, calls, heavy, users, to_db(now))
        await connection.execute(SUMS, day)


async def load_shown(engine: Engine, what: Load, now: datetime) -> None:
    """Load with a progress bar, and say how long it took."""
    began = time.perf_counter()
    with progress("loading", what.rows) as report:
        made = await load(engine, what, now, report=report)
    took = time.perf_counter() - began
    print(f"{made:,} calls of {what.users:,} users loaded in {took / 60:.1f} minutes, {made / took:,.0f} a second")


async def main(engine: Engine, what: Load) -> None:
    async with engine:
        if engine.is_embedded:
            await migrate(engine)
        await load_shown(engine, what, utc_now())


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how much is loaded."""
    for name in ("rows", "users", "heavy", "days"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Load, name))


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Load millions of AI calls.")
    options.add_argument("--url")
    arguments(options)
    chosen = vars(options.parse_args())
    url = chosen.pop("url")
    with tempfile.TemporaryDirectory(prefix="kitrocket-bench-") as name:
        Path(name).chmod(0o755)  # the account that runs the server for root must reach its data
        target = Engine(url) if url else Engine(embedded=EmbeddedServer(Path(name) / "pg"))
        asyncio.run(main(target, Load(**chosen)))
