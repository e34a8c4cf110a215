"""How fast expired sessions are swept, and what those who validate meanwhile notice.

    python benchmarks/sweep.py [--rows 2000000] [--rounds 3]

Half of the sessions have expired. Each contender gets a copy of its own of the same vacuumed database on the embedded
PostgreSQL; the order rotates from round to round, and what is printed are medians of the rounds' ratios.

* one DELETE: ``DELETE FROM sessions WHERE expires_at <= $1``, one transaction that holds a million row locks and cannot
  be stopped without losing all of its work.
* one sweeper: ``sessions.delete_expired()`` in batches of 1,000, as the kit does it in the background.
* two sweepers: two of them at once.
* validation: one task validates all the time, on a coalescing service, first on the quiet database, then beside the
  sweep; also beside the single DELETE, to compare.
* an empty sweep: nothing has expired; with the index on ``expires_at`` and without it.

It exits with 1 when a goal is missed. Two million rows need about 3 GB of disk.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import anyio

from kitrocket.clock import to_db, utc_now
from kitrocket.embedded import EmbeddedServer
from kitrocket.engine import Engine
from kitrocket.migrations import migrate
from kitrocket.sessions import SessionService

USERS = 20_000
NOW = utc_now()
DAY = timedelta(days=1)
#: How long validation is watched on a quiet database, in seconds.
QUIET = 5.0
EMPTY_SWEEPS = 20


class Bench:
    """A server with a database to copy, of which half the sessions have expired."""

    def __init__(self, server: EmbeddedServer, rows: int) -> None:
        self.server = server
        self.rows = rows
        address = server.start()
        self._query = f"?host={quote(address.host, safe='')}&port={address.port}&user={address.user}"

    def engine(self, database: str) -> Engine:
        return Engine(f"postgres:///{database}{self._query}", command_timeout=timedelta(hours=1))

    async def fill(self) -> None:
        async with self.engine("postgres") as admin:
            await admin.fetch("CREATE DATABASE filled")
        async with self.engine("filled") as engine:
            await migrate(engine)
            await engine.fetch(
                "INSERT INTO users (id, email, name, created_at, updated_at)"
                " SELECT md5(i::text), i || '@example.com', 'Ada', $2::timestamp, $2 FROM generate_series(1, $1) i",
                USERS,
                to_db(NOW),
            )
            await engine.fetch("ALTER TABLE sessions DISABLE TRIGGER ALL")  # no look at users for each row
            await engine.fetch(
                "INSERT INTO sessions (id, user_id, token, expires_at, ip_address, user_agent, created_at)"
                " SELECT 's' || lpad(i::text, 31, '0'), md5((1 + i % $2)::text),"
                " 'k1$' || encode(sha256(lpad(i::text, 32, '0')::bytea), 'hex'),"
                " CASE WHEN i % 2 = 0 THEN $3::timestamp + (1 + i % 604800) * interval '1 second'"
                "  ELSE $3::timestamp - (i % 604800) * interval '1 second' END,"
                " '203.0.113.7', 'Mozilla/5.0 (X11; Linux x86_64; rv:128.0)', $3::timestamp - interval '1 day'"
                " FROM generate_series(1, $1::integer) i",
                self.rows,
                USERS,
                to_db(NOW),
            )
            await engine.fetch("ALTER TABLE sessions ENABLE TRIGGER ALL")
            await engine.fetch("VACUUM ANALYZE")

    @asynccontextmanager
    async def copy(self) -> AsyncIterator[Engine]:
        async with self.engine("postgres") as admin:
            await admin.fetch("CREATE DATABASE copied TEMPLATE filled STRATEGY file_copy")
            await admin.fetch("CHECKPOINT")
        async with self.engine("copied") as engine:
            yield engine
        async with self.engine("postgres") as admin:
            await admin.fetch("DROP DATABASE copied WITH (FORCE)")


def service_of(engine: Engine) -> SessionService:
    # Nothing is due, so that validating only reads.
    return SessionService(engine, clock=lambda: NOW, update_age=timedelta(days=6, hours=23), max_lifetime=None)


async def one_delete(engine: Engine) -> None:
    await engine.fetch("DELETE FROM sessions WHERE expires_at <= $1", to_db(NOW))


async def one_sweeper(engine: Engine) -> None:
    await service_of(engine).delete_expired()


async def two_sweepers(engine: Engine) -> None:
    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(one_sweeper, engine)


SWEEPS: dict[str, Callable[[Engine], Awaitable[None]]] = {
    "one DELETE": one_delete,
    "one sweeper": one_sweeper,
    "two sweepers": two_sweepers,
}


async def validate_until(engine: Engine, rows: int, done: Callable[[], bool]) -> list[float]:
    """Validate live sessions, one after the other, and return what each took, in seconds."""
    service, taken, number = service_of(engine), [], 0
    async with service.coalescing():
        while not done():
            number = (number + 7919 * 2) % rows
            before = time.perf_counter()
            found = await service.validate(str(number or 2).rjust(32, "0"))
            taken.append(time.perf_counter() - before)
            assert found is not None or number < 2, number
    return taken


def p50_p99(taken: list[float]) -> tuple[float, float]:
    return statistics.median(taken), statistics.quantiles(taken, n=100)[98]


async def timed(bench: Bench, name: str) -> float:
    """Run one sweep alone; return its seconds."""
    async with bench.copy() as engine:
        before = time.perf_counter()
        await SWEEPS[name](engine)
        taken = time.perf_counter() - before
        left = await engine.fetchval("SELECT count(*) FROM sessions")
        assert left == bench.rows - bench.rows // 2, f"{name} left {left}"
    return taken


async def watched(bench: Bench, name: str) -> list[tuple[float, float]]:
    """Return p50 and p99 of validating: on the quiet database, and beside a sweep."""
    async with bench.copy() as engine:
        await validate_until(engine, bench.rows, after(1))
        quiet = await validate_until(engine, bench.rows, after(QUIET))
        beside: list[float] = []
        swept = anyio.Event()

        async def validate() -> None:
            beside.extend(await validate_until(engine, bench.rows, swept.is_set))

        async with anyio.create_task_group() as group:
            group.start_soon(validate)
            await SWEEPS[name](engine)
            swept.set()
    return [p50_p99(quiet), p50_p99(beside)]


def after(seconds: float) -> Callable[[], bool]:
    until = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= until


async def empty(bench: Bench) -> tuple[float, float]:
    """Return the seconds of a sweep that finds nothing, with the index and without it."""
    async with bench.copy() as engine:
        await engine.fetch("UPDATE sessions SET expires_at = $1 WHERE expires_at <= $2", to_db(NOW) + DAY, to_db(NOW))
        await engine.fetch("VACUUM ANALYZE sessions")
        medians = []
        for _ in range(2):
            taken = []
            for _ in range(EMPTY_SWEEPS):
                before = time.perf_counter()
                await one_sweeper(engine)
                taken.append(time.perf_counter() - before)
            medians.append(statistics.median(taken))
            await engine.fetch("DROP INDEX IF EXISTS sessions_expires_at_idx")
    return medians[0], medians[1]


async def measure(bench: Bench, rounds: int) -> bool:
    say(f"filling {bench.rows:,} sessions")
    await bench.fill()
    seconds: dict[str, list[float]] = {name: [] for name in SWEEPS}
    noticed: dict[str, list[list[tuple[float, float]]]] = {"one sweeper": [], "one DELETE": []}
    for number in range(rounds):
        names = list(SWEEPS)[number % 3 :] + list(SWEEPS)[: number % 3]
        for name in names:
            say(f"round {number + 1} of {rounds}: {name}")
            seconds[name].append(await timed(bench, name))
        for name, found in noticed.items():
            say(f"round {number + 1} of {rounds}: validating beside {name}")
            found.append(await watched(bench, name))
    say("empty sweeps")
    with_index, without = await empty(bench)
    return report(bench.rows, seconds, noticed, with_index, without)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def report(
    rows: int,
    seconds: dict[str, list[float]],
    noticed: dict[str, list[list[tuple[float, float]]]],
    with_index: float,
    without: float,
) -> bool:
    for name, taken in seconds.items():
        median = statistics.median(taken)
        print(f"{name:14} {median:8.1f} s {rows / 2 / median:12,.0f} rows/s")
    for name, found in noticed.items():
        for when, index in (("quiet", 0), (f"beside {name}", 1)):
            p50, p99 = (statistics.median(each[index][part] for each in found) for part in (0, 1))
            print(f"validate, {when:20} p50 {p50 * 1e6:8,.0f} µs   p99 {p99 * 1e6:8,.0f} µs")
    print(f"empty sweep: {with_index * 1e3:.2f} ms with the index, {without * 1e3:.1f} ms without\n")

    def ratio(name: str, other: str) -> float:
        return statistics.median(theirs / mine for mine, theirs in zip(seconds[name], seconds[other], strict=True))

    p50, p99 = (
        statistics.median(beside[part] / quiet[part] for quiet, beside in noticed["one sweeper"]) for part in (0, 1)
    )
    goals = [
        (ratio("one sweeper", "one DELETE"), 0.3, True, "one sweeper against the single DELETE"),
        (ratio("two sweepers", "one sweeper"), 1.2, True, "two sweepers against one"),
        (p50, 1.25, False, "validation's p50 beside the sweep against quiet"),
        (p99, 3.0, False, "validation's p99 beside the sweep against quiet"),
        (without / with_index, 50.0, True, "empty sweep with the index against without"),
    ]
    fine = True
    for value, goal, at_least, what in goals:
        reached = value >= goal if at_least else value <= goal
        fine = fine and reached
        print("reached" if reached else "MISSED ", f"{value:7.2f} x  {what}, goal {'>=' if at_least else '<='} {goal}")
    return fine


def main() -> int:
    options = argparse.ArgumentParser(description="Measure the sweep of expired sessions.")
    options.add_argument("--rows", type=int, default=2_000_000)
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="kitrocket-benchmark-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # root starts the server under another account
        server = EmbeddedServer(folder / "pg")
        try:
            return 0 if anyio.run(measure, Bench(server, given.rows), given.rounds) else 1
        finally:
            server.release()


if __name__ == "__main__":
    sys.exit(main())
