"""``kitrocket sessions sweep`` and ``digest``: on a terminal, in a pipe, and stopped by Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest
from racing import until_someone_waits
from terminals import Terminal

import factories
from kitrocket.clock import to_db, utc_now
from kitrocket.engine import Engine

pytestmark = [pytest.mark.asyncio, pytest.mark.direct]

#: Others write sessions too, with plain tokens.
SHARED = {"KITROCKET_SESSION_TOKENS": "digest+plain"}


async def piped(*arguments: str, url: str) -> tuple[int, str, str]:
    done = await anyio.run_process(
        [sys.executable, "-c", "from kitrocket.cli import main; main()", *arguments],
        env=os.environ | SHARED | {"DATABASE_URL": url},
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


async def fill(engine: Engine, *, expired: int, live: int) -> None:
    user_id = await factories.make_user(engine)
    for kind, count, expires_at in (("expired", expired, "2020-02-01"), ("live", live, "2099-01-01")):
        await engine.fetch(
            "INSERT INTO sessions (id, user_id, token, expires_at, created_at)"
            " SELECT $1::text || i, $2, md5($1::text || i), $4::text::timestamp,"
            "        CASE $1 WHEN 'live' THEN $5 ELSE timestamp '2020-01-01' END"
            " FROM generate_series(1, $3::integer) i",
            kind,
            user_id,
            count,
            expires_at,
            to_db(utc_now()),
        )


@asynccontextmanager
async def held_up(engine: Engine, event: str, left: str) -> AsyncIterator[None]:
    """Let statements of this kind wait once ``left`` is true."""
    await engine.fetch(
        "CREATE FUNCTION hold_up() RETURNS trigger LANGUAGE plpgsql AS"
        f" 'BEGIN IF {left} THEN PERFORM pg_advisory_xact_lock(7); END IF; RETURN NULL; END'"
    )
    await engine.fetch(
        f"CREATE TRIGGER hold_up BEFORE {event} ON sessions FOR EACH STATEMENT EXECUTE FUNCTION hold_up()"
    )
    async with engine.direct() as connection:
        await connection.execute("SELECT pg_advisory_lock(7)")
        yield


async def test_fifty_thousand_are_swept_with_a_bar_that_ends_full(engine: Engine, database_url: str) -> None:
    await fill(engine, expired=50_000, live=100)
    code, screen = await Terminal("sessions", "sweep", url=database_url, **SHARED).ended()
    assert code == 0, screen
    assert "sweeping" in screen
    assert "50000/50000" in screen
    assert re.search(r"[\d,]+/s", screen)
    assert screen.splitlines()[-1] == "Deleted 50,000 expired session(s)."
    assert await engine.fetchval("SELECT count(*) FROM sessions") == 100


async def test_in_a_pipe_there_is_one_plain_line(engine: Engine, database_url: str) -> None:
    await fill(engine, expired=2_500, live=10)
    assert await piped("sessions", "sweep", url=database_url) == (0, "Deleted 2,500 expired session(s).\n", "")
    assert await piped("sessions", "digest", url=database_url) == (0, "Replaced 10 plain token(s).\n", "")
    assert await piped("sessions", "digest", url=database_url) == (0, "Replaced 0 plain token(s).\n", "")


async def test_ctrl_c_stops_a_sweep_and_says_what_is_left(engine: Engine, database_url: str) -> None:
    await fill(engine, expired=5_000, live=10)
    async with held_up(engine, "DELETE", "(SELECT count(*) FROM sessions) <= 2010"):
        running = Terminal("sessions", "sweep", url=database_url, **SHARED)
        await until_someone_waits(engine)
        running.process.send_signal(signal.SIGINT)
        code, screen = await running.ended()
    assert code == 130
    assert "3000/5000" in screen
    assert screen.splitlines()[-2:] == [
        "Stopped with 2,000 left; run it again to go on.",
        "Deleted 3,000 expired session(s).",
    ]
    assert "Traceback" not in screen
    assert await engine.fetchval("SELECT count(*) FROM sessions") == 2_010
    code, out, _ = await piped("sessions", "sweep", url=database_url)
    assert (code, out) == (0, "Deleted 2,000 expired session(s).\n")


async def test_ctrl_c_stops_a_digest_and_says_what_is_left(engine: Engine, database_url: str) -> None:
    await fill(engine, expired=0, live=500)
    plain = "(SELECT count(*) FROM sessions WHERE token NOT LIKE ''k1$%'') <= 200"
    async with held_up(engine, "UPDATE", plain):
        running = Terminal("sessions", "digest", "--batch-size", "100", url=database_url, **SHARED)
        await until_someone_waits(engine)
        running.process.send_signal(signal.SIGINT)
        code, screen = await running.ended()
    assert code == 130
    assert screen.splitlines()[-2:] == [
        "Stopped with 200 left; run it again to go on.",
        "Replaced 300 plain token(s).",
    ]
    code, out, _ = await piped("sessions", "digest", url=database_url)
    assert (code, out) == (0, "Replaced 200 plain token(s).\n")


async def test_digests_are_refused_where_only_plain_tokens_are_accepted(engine: Engine, database_url: str) -> None:
    await fill(engine, expired=0, live=1)
    code, screen = await Terminal("sessions", "digest", url=database_url, KITROCKET_SESSION_TOKENS="plain").ended()
    assert code == 1
    assert "digest+plain" in screen
