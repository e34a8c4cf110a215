"""What time-ordered ids are worth, beside random ones, on a large table.

    python benchmarks/usage_ids.py [--rows 5000000]

Two tables as the seed has them, in one embedded PostgreSQL, hold so many calls each: one with the ids that
``usage.record`` makes, the other with random ones (UUIDv4), which fall all over the primary key's index. Then the
rounds are interleaved: each adds 20,000 calls to both tables, 1,000 at a time, behind a checkpoint of its own, and
measures the rate and the WAL. What is printed are medians of the ratios. It takes minutes and 3 GB.

It exits with 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import asyncpg

from kitrocket.clock import to_db, utc_now
from kitrocket.embedded import EmbeddedServer
from kitrocket.engine import Engine
from kitrocket.ids import new_usage_id

ROUNDS = 10
ROWS, BATCH = 20_000, 1_000
RATE_GOAL, WAL_GOAL = 3.0, 1 / 3
TABLE = """
CREATE TABLE {0} (
    id text PRIMARY KEY, user_id text NOT NULL, tokens_used integer NOT NULL, model text NOT NULL,
    created_at timestamp NOT NULL
)
"""
#: $1 how many, $2 now: an hour's worth each, up to now.
FILL = """
INSERT INTO {0}
SELECT {1}, 'u' || n % 1000, n % 5000, 'm' || n % 3, at
FROM (
    SELECT n, $2::timestamp - ($1::integer - n) * interval '1 millisecond' AS at, md5(n::text) AS hash
    FROM generate_series(1, $1::integer) AS n
) AS made
"""
IDS: dict[str, str] = {
    "ordered": "(lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7' || substr(hash, 1, 3) || '8'"
    " || substr(hash, 4, 15))::uuid::text",
    "random": "hash::uuid::text",
}
NEW: dict[str, Callable[[], str]] = {"ordered": lambda: new_usage_id(utc_now()), "random": lambda: str(uuid.uuid4())}
INSERT = "INSERT INTO {0} SELECT id, 'u1', 7, 'm1', $2 FROM unnest($1::text[]) AS id"


async def add(connection: asyncpg.Connection, table: str) -> tuple[float, int]:
    """Add a round's calls, and return the rows a second and the bytes of WAL."""
    batches = []
    for _ in range(ROWS // BATCH):
        batches.append([NEW[table]() for _ in range(BATCH)])
        await asyncio.sleep(0.001)  # so that time passes between ids too
    statement = await connection.prepare(INSERT.format(table))
    await connection.execute("CHECKPOINT")
    before = await connection.fetchval("SELECT pg_current_wal_insert_lsn()")
    began = time.perf_counter()
    for batch in batches:
        await statement.fetch(batch, to_db(utc_now()))
    rate = ROWS / (time.perf_counter() - began)
    wal = await connection.fetchval("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), $1)::bigint", before)
    return rate, wal


async def bench(connection: asyncpg.Connection, rows: int) -> bool:
    began = time.perf_counter()
    for table, id in IDS.items():
        await connection.execute(TABLE.format(table))
        await connection.execute(f"ALTER TABLE {table} DROP CONSTRAINT {table}_pkey")
        await connection.execute(FILL.format(table, id), rows, to_db(utc_now() - timedelta(minutes=1)))
        await connection.execute(f"ALTER TABLE {table} ADD PRIMARY KEY (id)")
        await connection.execute(f"VACUUM ANALYZE {table}")
    print(f"{rows:,} calls in each table, in {(time.perf_counter() - began) / 60:.1f} minutes")
    rates, wals, last = [], [], {}
    for number in range(ROUNDS):
        for table in IDS if number % 2 else reversed(IDS):
            last[table] = await add(connection, table)
        rates.append(last["ordered"][0] / last["random"][0])
        wals.append(last["ordered"][1] / last["random"][1])
    rate, wal = statistics.median(rates), statistics.median(wals)
    print(f"rate  {rate:6.2f}x  goal {RATE_GOAL:g}x  {'ok' if rate >= RATE_GOAL else 'MISSED'}")
    print(f"WAL   {wal:6.2f}x  goal {WAL_GOAL:.2f}x  {'ok' if wal <= WAL_GOAL else 'MISSED'}")
    return rate < RATE_GOAL or wal > WAL_GOAL


async def main(folder: Path, rows: int) -> int:
    async with Engine(embedded=EmbeddedServer(folder / "pg")) as engine:
        connection = await engine.get_new_connection(timed=False)
        try:
            return int(await bench(connection, rows))
        finally:
            await connection.close()


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Measure time-ordered ids beside random ones.")
    options.add_argument("--rows", type=int, default=5_000_000)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="kitrocket-bench-") as name:
        Path(name).chmod(0o755)  # the account that runs the server for root must reach its data
        sys.exit(asyncio.run(main(Path(name), chosen.rows)))
