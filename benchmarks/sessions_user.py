"""How long it takes to list and to revoke the sessions of a user who has 10,000 of them.

    python benchmarks/sessions_user.py [--sessions 10000] [--rounds 15]

The table holds 200,000 sessions of other users too. The rounds are interleaved, and what is printed are medians; each
revocation is rolled back before the next.

* list: ``sessions.list(user_id)``, the first 50 as pydantic models; raw: its statement on a held connection; all rows:
  a plain SELECT of every session of the user, as libraries without pages do it.
* revoke_others: one statement, rows locked in id order; plain DELETE: without that order, so that two of them can
  deadlock, which is what the difference buys; row by row: a DELETE for each session, as libraries do it that load the
  rows first.
* without the index on ``user_id``, as a table that ``drizzle-kit push`` has cleaned up.

It exits with 1 when a goal is missed.
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

import anyio
import asyncpg

from kitrocket.clock import to_db, utc_now
from kitrocket.embedded import EmbeddedServer
from kitrocket.engine import Engine
from kitrocket.migrations import migrate
from kitrocket.sessions import SessionService
from kitrocket.sql import statements

NOW = utc_now()
KEEP = "1".rjust(32, "0")
OTHERS = 200_000
LIST = statements("sessions")["list"]
#: What is run, how often in a round.
Call = Callable[[], Awaitable[object]]


class RolledBackError(Exception):
    """Ends a measured transaction."""


async def fill(engine: Engine, sessions: int) -> None:
    await engine.fetch(
        "INSERT INTO users (id, email, name, created_at, updated_at)"
        " SELECT 'u' || i, i || '@example.com', 'Ada', $1::timestamp, $1 FROM generate_series(0, 20000) i",
        to_db(NOW),
    )
    await engine.fetch(
        "INSERT INTO sessions (id, user_id, token, expires_at, ip_address, user_agent, created_at)"
        " SELECT md5('s' || i), CASE WHEN i <= $1 THEN 'u0' ELSE 'u' || 1 + i % 20000 END,"
        " 'k1$' || encode(sha256(lpad(i::text, 32, '0')::bytea), 'hex'), $3::timestamp + interval '6 days',"
        " '203.0.113.7', 'Mozilla/5.0 (X11; Linux x86_64; rv:128.0)', $3::timestamp - (i % 86400) * interval '1 second'"
        " FROM generate_series(1, $1::integer + $2::integer) i",
        sessions,
        OTHERS,
        to_db(NOW),
    )
    await engine.fetch("VACUUM ANALYZE")


async def seconds(call: Call, times: int = 1) -> float:
    before = time.perf_counter()
    for _ in range(times):
        await call()
    return (time.perf_counter() - before) / times


async def rolled_back(engine: Engine, call: Call) -> float:
    """How long a call takes in a transaction that is then rolled back."""
    taken = 0.0
    try:
        async with engine.transaction():
            taken = await seconds(call)
            raise RolledBackError
    except RolledBackError:
        return taken


async def row_by_row(engine: Engine) -> None:
    rows = await engine.fetch("SELECT id, token FROM sessions WHERE user_id = 'u0'")
    for row in rows[1:]:
        await engine.fetch("DELETE FROM sessions WHERE id = $1", row["id"])


@asynccontextmanager
async def bench(server: EmbeddedServer, sessions: int) -> AsyncIterator[tuple[Engine, asyncpg.Connection]]:
    async with Engine(embedded=server, command_timeout=timedelta(minutes=10)) as engine:
        await migrate(engine)
        await fill(engine, sessions)
        connection = await asyncpg.connect(**(await server.astart()).dsn_kwargs())
        yield engine, connection
        await connection.close()


async def measure(server: EmbeddedServer, sessions: int, rounds: int) -> bool:
    async with bench(server, sessions) as (engine, raw):
        service = SessionService(engine, clock=lambda: NOW)
        arguments = ("u0", to_db(NOW), timedelta(days=7), timedelta(days=30), [], 50, None, None)
        lists: dict[str, Call] = {
            "list": lambda: service.list("u0"),
            "raw list": lambda: raw.fetch(LIST, *arguments),
            "all rows": lambda: raw.fetch("SELECT * FROM sessions WHERE user_id = 'u0'"),
        }
        revocations: dict[str, Call] = {
            "revoke_others": lambda: service.revoke_others("u0", keep=KEEP),
            "plain DELETE": lambda: engine.fetch("DELETE FROM sessions WHERE user_id = 'u0' AND token <> $1", KEEP),
            "row by row": lambda: row_by_row(engine),
        }
        taken: dict[str, list[float]] = {name: [] for name in [*lists, *revocations, "list, no index"]}
        for number in range(-1, rounds):
            for name in rotated(list(lists), number):
                taken[name].append(await seconds(lists[name], 20))
            for name in rotated(list(revocations), number):
                taken[name].append(await rolled_back(engine, revocations[name]))
            await engine.fetch("VACUUM sessions")
            if number < 0:
                for each in taken.values():
                    each.clear()
        await engine.fetch("DROP INDEX sessions_user_id_idx")
        for _ in range(rounds):
            taken["list, no index"].append(await seconds(lists["list"]))
    return report(sessions, taken)


def rotated(names: list[str], number: int) -> list[str]:
    turn = number % len(names)
    return names[turn:] + names[:turn]


def report(sessions: int, taken: dict[str, list[float]]) -> bool:
    print(f"a user with {sessions:,} sessions, among {OTHERS:,} of others")
    for name, each in taken.items():
        print(f"{name:16}{statistics.median(each) * 1e3:10.2f} ms")
    print()
    fine = True
    for name, other, goal in (
        ("list", "raw list", 0.5),
        ("list", "all rows", 2.0),
        ("list", "list, no index", 2.0),
        ("revoke_others", "row by row", 10.0),
    ):
        times = statistics.median(theirs / mine for mine, theirs in zip(taken[name], taken[other], strict=True))
        fine = fine and times >= goal
        print("reached" if times >= goal else "MISSED ", f"{times:7.2f} x  {name} against {other}, goal >= {goal}")
    return fine


def main() -> int:
    options = argparse.ArgumentParser(description="Measure a user with very many sessions.")
    options.add_argument("--sessions", type=int, default=10_000)
    options.add_argument("--rounds", type=int, default=15)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="kitrocket-benchmark-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # root starts the server under another account
        server = EmbeddedServer(folder / "pg")
        try:
            return 0 if anyio.run(measure, server, given.sessions, given.rounds) else 1
        finally:
            server.release()


if __name__ == "__main__":
    sys.exit(main())
