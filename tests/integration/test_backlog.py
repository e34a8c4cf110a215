"""A neglected table: the backlog is swept in the background, while people validate their sessions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta

import anyio
import pytest

from factories import make_user
from kitrocket import KitRocket, Settings
from kitrocket.clock import to_db
from kitrocket.engine import Engine
from kitrocket.testing import ManualClock
from servers import Server

pytestmark = pytest.mark.asyncio


async def fill(engine: Engine, clock: ManualClock, *, expired: int, live: int) -> None:
    """Store sessions of which those with a number up to ``live`` are live; a token is its number, as a digest."""
    user_id = await make_user(engine)
    # Checking the foreign key once takes less time than for each row.
    await engine.fetch("ALTER TABLE sessions DROP CONSTRAINT sessions_user_id_users_id_fk")
    for first, last, expires_in in ((1, live, timedelta(days=7)), (live + 1, live + expired, -timedelta(days=1))):
        await engine.fetch(
            "INSERT INTO sessions (id, user_id, token, expires_at, created_at)"
            " SELECT 's' || lpad(i::text, 31, '0'), $1, 'k1$' || encode(sha256(lpad(i::text, 32, '0')::bytea), 'hex'),"
            " $4::timestamp - (i % 1000) * interval '1 second', $5"
            " FROM generate_series($2::integer, $3::integer) i",
            user_id,
            first,
            last,
            to_db(clock.now + expires_in),
            to_db(clock.now - timedelta(hours=1)),
        )
    await engine.fetch(
        "ALTER TABLE sessions ADD CONSTRAINT sessions_user_id_users_id_fk FOREIGN KEY (user_id) REFERENCES users (id)"
        " ON DELETE CASCADE"
    )


async def validate_while(kit: KitRocket, live: int, goes_on: Callable[[], Awaitable[bool]]) -> list[float]:
    """Validate one live session after the other; return what each took, in seconds."""
    taken: list[float] = []
    number = 0
    while await goes_on():
        for _ in range(200):
            number = number % live + 1
            before = time.perf_counter()
            found = await kit.sessions.validate(str(number).rjust(32, "0"))
            taken.append(time.perf_counter() - before)
            assert found is not None
    return taken


async def sweep_in_the_background(
    server: Server, database: str, clock: ManualClock, *, expired: int, live: int
) -> tuple[float, float, float]:
    """Return how long the sweep took, and the 99th hundredth of validating before and meanwhile; in seconds."""
    async with Engine(server.url(database, direct=True), command_timeout=timedelta(hours=1)) as engine:
        await fill(engine, clock, expired=expired, live=live)
        await engine.fetch("VACUUM ANALYZE sessions")
    rounds = iter(range(5))
    kit = KitRocket(Settings(), engine=server.engine(database), clock=clock, background=False)

    async def five_rounds() -> bool:
        return next(rounds, None) is not None

    async with kit:
        quiet = await validate_while(kit, live, five_rounds)
    kit = KitRocket(Settings(), engine=server.engine(database), clock=clock)

    async def is_left() -> bool:
        return bool(await kit.engine.fetchval("SELECT EXISTS (SELECT FROM sessions WHERE expires_at <= $1)", now))

    now = to_db(clock.now)
    async with kit:
        began = time.perf_counter()
        meanwhile = await validate_while(kit, live, is_left)
        duration = time.perf_counter() - began
        assert await kit.engine.fetchval("SELECT count(*) FROM sessions") == live
    return duration, statistics.quantiles(quiet, n=100)[98], statistics.quantiles(meanwhile, n=100)[98]


async def test_fifty_thousand_go_in_the_background(server: Server, database: str, clock: ManualClock) -> None:
    with anyio.fail_after(110):
        await sweep_in_the_background(server, database, clock, expired=50_000, live=1_000)


@pytest.mark.scale
@pytest.mark.timeout(3_600)
async def test_five_million_go_in_the_background_and_no_one_waits(
    server: Server, database: str, clock: ManualClock, capsys: pytest.CaptureFixture[str]
) -> None:
    duration, quiet, meanwhile = await sweep_in_the_background(
        server, database, clock, expired=5_000_000, live=1_000_000
    )
    with capsys.disabled():
        print(
            f"\n5,000,000 swept in {duration:.0f} s, {5_000_000 / duration:,.0f}/s; validating: "
            f"p99 {quiet * 1e3:.2f} ms before, {meanwhile * 1e3:.2f} ms meanwhile"
        )
    assert meanwhile < 0.5
