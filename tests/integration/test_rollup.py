"""The daily sums: exact at every commit whoever writes, read with the edges of any window, proven, repaired, pruned."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any

import anyio
import anyio.lowlevel
import asyncpg
import pytest
import pytest_asyncio
from racing import until_someone_waits

from factories import make_usage, make_user
from kitrocket import piccolo_migrations
from kitrocket.clock import to_db
from kitrocket.ddl import Connection
from kitrocket.engine import Engine
from kitrocket.errors import (
    ConfigurationError,
    InvalidInputError,
    TransactionError,
    UserNotFoundError,
    WindowNotExactError,
)
from kitrocket.migrations import migrate
from kitrocket.migrations.forwards import APP, modules_of, run
from kitrocket.models import UsageDrift
from kitrocket.rollup import backfill
from kitrocket.sql import statements
from kitrocket.testing import ManualClock
from kitrocket.usage import UsageService
from kitrocket.users import UserService
from servers import Server

pytestmark = pytest.mark.asyncio(loop_scope="session")

DAY = timedelta(days=1)
MICROSECOND = timedelta(microseconds=1)
MIGRATIONS = ["2026-11-24T23:10:01:000000", "2026-11-24T23:10:00:000000"]
FIRST = datetime(2026, 2, 1, tzinfo=UTC)


@pytest.fixture
def usage(engine: Engine, clock: ManualClock) -> UsageService:
    return UsageService(engine, clock=clock)


@pytest.fixture
def plain(engine: Engine, clock: ManualClock) -> UsageService:
    """The same with the rollup off."""
    return UsageService(engine, clock=clock, rollup=False)


@pytest_asyncio.fixture
async def connection(server: Server, database: str) -> AsyncIterator[Connection]:
    """A session of somebody else's, with plain SQL."""
    connection = await asyncpg.connect(server.url(database, direct=True))
    yield connection
    await connection.close()


async def kept(engine: Engine) -> list[tuple[object, ...]]:
    return [
        tuple(row)
        for row in await engine.fetch(
            "SELECT user_id, day, model, tokens, calls FROM kitrocket.usage_daily WHERE calls <> 0 OR tokens <> 0"
            " ORDER BY user_id, day, model"
        )
    ]


async def exact(usage: UsageService) -> bool:
    result = await usage.verify()
    assert result.examples == []
    return result.drift == 0


# -- kept exact by whoever writes ---------------------------------------------------------------------------------


async def test_a_row_is_a_user_a_utc_day_and_a_model(usage: UsageService, engine: Engine) -> None:
    await make_user(engine, id="ada")
    for at, model, tokens in (
        (FIRST - MICROSECOND, "m", 1),
        (FIRST, "m", 2),
        (FIRST + DAY - MICROSECOND, "m", 4),
        (FIRST, "n", 8),
        (FIRST + DAY, "m", 16),
    ):
        await usage.record("ada", tokens=tokens, model=model, at=at)
    assert await kept(engine) == [
        ("ada", date(2026, 1, 31), "m", 1, 1),
        ("ada", date(2026, 2, 1), "m", 6, 2),
        ("ada", date(2026, 2, 1), "n", 8, 1),
        ("ada", date(2026, 2, 2), "m", 16, 1),
    ]
    assert (await usage.verify()).days == 3


async def test_a_repetition_adds_nothing(usage: UsageService, engine: Engine) -> None:
    await make_user(engine, id="ada")
    for _ in range(3):
        await usage.record("ada", tokens=5, model="m", id="a")
        await usage.record_many([{"user_id": "ada", "tokens": 5, "model": "m", "id": id} for id in "abab"])
    assert [row[3:] for row in await kept(engine)] == [(10, 2)]


STATEMENTS = {
    "update of the tokens": "UPDATE usage SET tokens_used = tokens_used + 7 WHERE id < '05'",
    "update of the model": "UPDATE usage SET model = 'other' WHERE id < '05'",
    "update of the user": "UPDATE usage SET user_id = 'bob' WHERE id < '05'",
    "update of the time": "UPDATE usage SET created_at = created_at - interval '36 hours'",
    "update of nothing": "UPDATE usage SET tokens_used = tokens_used",
    "update of all": "UPDATE usage SET user_id = 'bob', model = model || id, created_at = '2020-01-01'",
    "delete": "DELETE FROM usage WHERE id < '05'",
    "delete of all": "DELETE FROM usage",
    "delete of none": "DELETE FROM usage WHERE id = 'none'",
    "deletion of the user": "DELETE FROM users WHERE id = 'ada'",
    "deletion of all users": "DELETE FROM users",
    "truncate": "TRUNCATE usage",
    "truncate of users": "TRUNCATE users CASCADE",
    "upsert": "INSERT INTO usage SELECT id || CASE WHEN id < '05' THEN '' ELSE 'x' END, user_id, 100, 'new', created_at"
    " FROM usage ON CONFLICT (id) DO UPDATE SET tokens_used = excluded.tokens_used, model = excluded.model",
    "merge": "MERGE INTO usage USING (SELECT id, user_id FROM usage WHERE id < '05' UNION SELECT 'new', 'bob') AS s"
    " ON s.id = usage.id WHEN MATCHED AND s.id < '02' THEN DELETE WHEN MATCHED THEN UPDATE SET tokens_used = 3"
    " WHEN NOT MATCHED THEN INSERT VALUES (s.id, s.user_id, 9, 'merged', '2026-02-03')",
    "common table expressions": "WITH gone AS (DELETE FROM usage WHERE id < '05' RETURNING *)"
    " INSERT INTO usage SELECT id || 'x', 'bob', tokens_used, model, created_at FROM gone",
}


@pytest.mark.parametrize("what", STATEMENTS)
async def test_any_statement_keeps_it_exact(
    usage: UsageService, engine: Engine, connection: Connection, what: str
) -> None:
    for name in ("ada", "bob"):
        await make_user(engine, id=name)
    for number in range(10):
        at = FIRST + number * timedelta(hours=13)
        await make_usage(engine, "ada", id=f"{number:02}", tokens=number, model=f"m{number % 2}", at=at)
    await connection.execute(STATEMENTS[what])
    assert await exact(usage)
    if what.startswith(("truncate", "delete of all", "deletion of")):
        assert await kept(engine) == []


async def test_copy_keeps_it_exact(usage: UsageService, engine: Engine, connection: Connection) -> None:
    await make_user(engine, id="ada")
    rows = [(f"{number}", "ada", number, f"m{number % 3}", to_db(FIRST) + number * DAY / 7) for number in range(100)]
    await connection.copy_records_to_table("usage", records=rows)
    assert await exact(usage)
    assert await usage.total("ada", since=FIRST) == sum(range(100))


async def test_what_is_rolled_back_adds_nothing(usage: UsageService, engine: Engine) -> None:
    await make_user(engine, id="ada")
    with pytest.raises(ZeroDivisionError):
        async with engine.transaction():
            await usage.record("ada", tokens=5, model="m")
            raise ZeroDivisionError
    assert await kept(engine) == []


async def test_a_role_without_rights_on_the_schema_can_write(
    usage: UsageService, engine: Engine, connection: Connection
) -> None:
    await make_user(engine, id="ada")
    role = f"writer_{random.randrange(10**9)}"
    await connection.execute(f"CREATE ROLE {role}")
    try:
        await connection.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON usage TO {role}")
        await connection.execute(f"SET ROLE {role}")
        # A schema of the writer's own, ahead of all others, takes nothing over.
        await connection.execute("SET search_path = pg_temp, public")
        await connection.execute("CREATE TEMPORARY TABLE usage_daily (x int)")
        await connection.execute("INSERT INTO public.usage VALUES ('a', 'ada', 5, 'm', '2026-02-01')")
        await connection.execute("UPDATE public.usage SET tokens_used = 6")
        assert [row[3:] for row in await kept(engine)] == [(6, 1)]
        await connection.execute("DELETE FROM public.usage")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("SELECT FROM kitrocket.usage_daily")
        await connection.execute("TRUNCATE public.usage")
    finally:
        await connection.execute("RESET ROLE")
        await connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
    assert await exact(usage)


# -- exact under a storm ------------------------------------------------------------------------------------------


class Storm:
    """Eight writers on twenty users, some through services and some in plain SQL, and a reader that compares."""

    def __init__(self, usage: UsageService, engine: Engine, connections: list[Connection]) -> None:
        self.usage = usage
        self.engine = engine
        self.connections = connections
        self.now = datetime(2026, 3, 1, 12, tzinfo=UTC)
        self.numbers = itertools.count()
        self.ids: list[str] = []
        self.done: Counter[str] = Counter()
        self.over = False

    async def run(self, *, times: int, seconds: float = 0) -> None:
        """Let everybody work until each kind of work was done so many times, and for at least so long."""
        until = anyio.current_time() + seconds
        for number in range(20):
            await make_user(self.engine, id=f"u{number:02}")
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(self.repeat, "record", self.record)
            for connection in self.connections:
                group.start_soon(self.repeat, "plain", lambda connection=connection: self.plain(connection))
            group.start_soon(self.repeat, "lose a user", self.lose_a_user)
            group.start_soon(self.repeat, "compare", self.compare)
            while len(self.done) < 4 or min(self.done.values()) < times or anyio.current_time() < until:
                await anyio.sleep(0.01)
            self.over = True

    async def repeat(self, kind: str, work: Callable[[], Any]) -> None:
        while not self.over:
            await anyio.lowlevel.checkpoint()
            await work()
            self.done[kind] += 1

    def user(self) -> str:
        return f"u{random.randrange(20):02}"

    def at(self) -> datetime:
        return self.now - random.choice([timedelta(0), DAY, 400 * DAY]) * random.random()

    async def record(self) -> None:
        entries = [
            {"user_id": self.user(), "tokens": random.randrange(100), "model": random.choice("abc"), "at": self.at()}
            for _ in range(random.randrange(1, 40))
        ]
        for entry in entries:
            entry["id"] = f"{next(self.numbers):08}"
        try:
            await self.usage.record_many(entries)
            await self.usage.record_many(random.sample(entries, len(entries) // 2))
        except UserNotFoundError:
            return
        self.ids += [str(entry["id"]) for entry in entries[:5]]

    async def plain(self, connection: Connection) -> None:
        some = sorted(random.sample(self.ids, min(3, len(self.ids))))
        statement = random.choice(
            [
                "UPDATE usage SET tokens_used = tokens_used + 1 WHERE id = $1",
                "UPDATE usage SET model = 'd', created_at = created_at - interval '30 days' WHERE id = $1",
                "DELETE FROM usage WHERE id = $1",
                "INSERT INTO usage SELECT $1 || gen_random_uuid(), id, 5, 'plain', timestamp '2026-02-28'"
                " FROM users WHERE id <> 'gone'",
            ]
        )
        for id in some:
            try:
                await connection.execute(statement, id)
            except asyncpg.ForeignKeyViolationError:
                assert "INSERT" in statement
            except asyncpg.DeadlockDetectedError:
                # An edit that moves a call to a new key wants the user, whose deletion may already wait for the call.
                assert "SET model" in statement

    async def lose_a_user(self) -> None:
        user_id = self.user()
        await UserService(self.engine).delete(user_id)
        await make_user(self.engine, id=user_id)
        await anyio.sleep(0.02)

    async def compare(self) -> None:
        result = await self.usage.verify()
        assert result.drift == 0, result.examples


@asynccontextmanager
async def storm(usage: UsageService, engine: Engine, server: Server) -> AsyncIterator[Storm]:
    database = await engine.fetchval("SELECT current_database()")
    connections = [await asyncpg.connect(server.url(database, direct=True)) for _ in range(3)]
    try:
        yield Storm(usage, engine, connections)
    finally:
        for connection in connections:
            await connection.close()


async def test_it_is_exact_at_every_snapshot(usage: UsageService, engine: Engine, server: Server) -> None:
    async with storm(usage, engine, server) as weather:
        await weather.run(times=8)
    assert (await usage.verify()).days > 10


@pytest.mark.storm
async def test_it_is_exact_at_every_snapshot_of_a_minute(usage: UsageService, engine: Engine, server: Server) -> None:
    async with storm(usage, engine, server) as weather:
        await weather.run(times=50, seconds=60)
    print(f"\n{dict(weather.done)}")


# -- read with the edges of any window ----------------------------------------------------------------------------

#: Instants around which windows begin and end.
MARKS = [FIRST, FIRST + timedelta(hours=7), FIRST + DAY, FIRST + 2 * DAY, FIRST + 2 * DAY + timedelta(hours=23)]


async def everything(
    usage: UsageService, since: datetime | None, until: datetime | None, *, raw: bool = True
) -> list[object]:
    """All answers for a window; ``raw`` with those that come from single rows in any case."""
    window: dict[str, Any] = {"since": since, "until": until}
    answers: list[object] = [await usage.total("ada", **window), await usage.total("ada", model="m1", **window)]
    answers += [await usage.breakdown("ada", by=by, **window) for by in ("day", "month", "model")]  # type: ignore[arg-type]  # its own words
    answers.append(await usage.breakdown("ada", by="day", fill=True, **window))
    answers.append(await usage.top_users(**window))
    if raw:
        answers.append(await usage.breakdown("ada", by="hour", **window))
        answers.append(await usage.breakdown("ada", by="day", tz="Asia/Kathmandu", **window))
    return answers


async def fill_days(engine: Engine, clock: ManualClock) -> None:
    clock.now = FIRST + 3 * DAY
    for name in ("ada", "bob"):
        await make_user(engine, id=name)
    offsets = (-MICROSECOND, timedelta(0), MICROSECOND, timedelta(hours=1))
    rows = [(mark + offset, model) for mark in MARKS for offset in offsets for model in ("m1", "m2")]
    for number, (at, model) in enumerate(rows):
        await make_usage(engine, "ada", tokens=2**number % 2**31, model=model, at=at)
        await make_usage(engine, "bob", tokens=number, model=model, at=at)


async def test_with_and_without_the_rollup_every_window_is_the_same(
    usage: UsageService, plain: UsageService, engine: Engine, clock: ManualClock
) -> None:
    await fill_days(engine, clock)
    ends = [mark + offset for mark in MARKS for offset in (-MICROSECOND, timedelta(0), MICROSECOND)]
    windows = [(since, until) for since in ends for until in ends if since <= until]
    for since, until in [*random.sample(windows, 40), *((end, None) for end in ends), (None, None), (None, ends[-1])]:
        assert await everything(usage, since, until) == await everything(plain, since, until), (since, until)
        total = await usage.total("ada", since=since, until=until)
        assert total == await engine.fetchval(
            "SELECT coalesce(sum(tokens_used), 0)::bigint FROM usage"
            " WHERE user_id = 'ada' AND created_at >= $1 AND created_at < coalesce($2::timestamp, 'infinity')",
            to_db(since or (until or clock.now) - 30 * DAY),
            None if until is None else to_db(until),
        )


async def test_days_before_the_rollup_is_complete_are_read_from_single_rows(
    usage: UsageService, plain: UsageService, engine: Engine, clock: ManualClock
) -> None:
    await fill_days(engine, clock)
    for complete_from in (date(2026, 1, 1), date(2026, 2, 1), date(2026, 2, 2), date(2026, 2, 3), date.max):
        await engine.fetch("UPDATE kitrocket.usage_state SET rollup_from = $1", complete_from)
        await engine.fetch("UPDATE kitrocket.usage_daily SET tokens = 0, calls = 0 WHERE day < $1", complete_from)
        for since in (FIRST - DAY, FIRST + MICROSECOND, FIRST + 2 * DAY):
            for until in (None, FIRST + 2 * DAY, FIRST + 2 * DAY + timedelta(hours=5), FIRST + 3 * DAY - MICROSECOND):
                expected = await everything(plain, since, until, raw=False)
                assert await everything(usage, since, until, raw=False) == expected


async def test_without_a_state_single_rows_are_read(
    usage: UsageService, plain: UsageService, engine: Engine, clock: ManualClock
) -> None:
    await fill_days(engine, clock)
    await engine.fetch("DELETE FROM kitrocket.usage_state")
    assert await everything(usage, FIRST, None) == await everything(plain, FIRST, None)


async def test_whole_days_are_read_from_the_rollup_alone(usage: UsageService, engine: Engine) -> None:
    """What stands in the rollup counts, and only there; single rows are read on the shorter side of an end."""
    await make_user(engine, id="ada")
    await make_usage(engine, "ada", tokens=1, at=FIRST)
    await engine.fetch("UPDATE kitrocket.usage_daily SET tokens = 1000")
    noon = FIRST + DAY / 2
    cases: list[tuple[datetime, datetime | None, int]] = [
        (FIRST, None, 1000),
        (FIRST, FIRST + DAY, 1000),
        (FIRST, FIRST + DAY - MICROSECOND, 1000),
        (FIRST - MICROSECOND, FIRST + DAY, 1000),
        (FIRST + MICROSECOND, None, 999),
        (noon - MICROSECOND, None, 999),
        (noon, None, 0),
        (FIRST - DAY, noon, 1),
        (FIRST - DAY, noon + MICROSECOND, 1000),
        (FIRST, noon, 1),
        (FIRST, noon + MICROSECOND, 1000),
        (FIRST + timedelta(hours=7), noon + timedelta(hours=5), 0),
    ]
    for since, until, expected in cases:
        assert await usage.total("ada", since=since, until=until) == expected, (since, until)


async def test_while_the_rollup_is_filled_a_sum_is_asked_for_again_once(
    usage: UsageService, plain: UsageService, engine: Engine, clock: ManualClock
) -> None:
    await fill_days(engine, clock)
    await engine.fetch("UPDATE kitrocket.usage_state SET rollup_from = '2026-02-02'")
    await engine.fetch("UPDATE kitrocket.usage_daily SET tokens = 0, calls = 0 WHERE day < '2026-02-02'")
    expected = await plain.total("ada", since=FIRST)
    seen: list[str] = []
    async with engine.transaction() as transaction:
        with transaction.connection.query_logger(lambda query: seen.append(query.query)):
            assert await usage.total("ada", since=FIRST) == expected  # asked for twice
            assert await usage.total("ada", since=FIRST) == expected
            await usage.total("ada", since=FIRST + DAY)
    assert seen == [statements("usage")["total_rolled"]] * 4


async def test_the_ends_of_time_are_the_same_with_and_without_the_rollup(
    usage: UsageService, plain: UsageService, engine: Engine, clock: ManualClock
) -> None:
    await fill_days(engine, clock)
    for at in ("-infinity", "0001-01-01 00:00:00.5", "9999-12-31 20:00", "infinity"):
        await engine.fetch(f"INSERT INTO usage SELECT gen_random_uuid(), 'ada', 5, 'm1', '{at}'")
    beginning, end = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
    sinces = [beginning, beginning + MICROSECOND, beginning + timedelta(hours=1), FIRST, end - timedelta(hours=5), end]
    for since in sinces:
        for until in (None, beginning + timedelta(hours=20), FIRST + DAY, end - timedelta(hours=1), end):
            if until is None or since <= until:
                window: dict[str, Any] = {"since": since, "until": until}
                assert await usage.total("ada", **window) == await plain.total("ada", **window), window
                assert await usage.top_users(**window) == await plain.top_users(**window), window


def scans(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The leaves of a plan that read a table."""
    if "Relation Name" in plan:
        yield plan
    for part in plan.get("Plans", []):
        yield from scans(part)


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize(
    ("name", "first"),
    [("total_rolled", "2026-02-02"), ("by_model_rolled", "2026-02-01"), ("by_time_rolled", "2026-02-01")],
)
async def test_a_users_sums_read_the_key_and_the_covering_index(
    engine: Engine, mode: str, name: str, first: str
) -> None:
    for user_id in ("ada", "bob"):
        await make_user(engine, id=user_id)
    await engine.fetch(
        "INSERT INTO usage SELECT 'u' || n, CASE n % 20 WHEN 0 THEN 'ada' ELSE 'bob' END, n, 'm' || n % 40,"
        " timestamp '2026-01-01' + n * interval '4 minutes' FROM generate_series(1, 20000) AS n"
    )
    for table in ("usage", "kitrocket.usage_daily"):
        await engine.fetch(f"VACUUM ANALYZE {table}")
    more = {"total_rolled": ", NULL", "by_model_rolled": "", "by_time_rolled": ", '{2026-02-01 07:00, 2026-02-02}'"}
    bounds = f"'2026-02-01 07:00', '2026-02-20 17:00', '{first}', '2026-02-21'"
    async with engine.transaction() as transaction:
        await engine.fetch(f"SET LOCAL plan_cache_mode = {mode}")
        await transaction.connection.execute(f"PREPARE rolled AS {statements('usage')[name]}")
        explained = await engine.fetchval(
            f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) EXECUTE rolled('ada', {bounds}{more[name]})"
        )
        await engine.fetch("DEALLOCATE rolled")
    found = {(scan["Relation Name"], scan["Node Type"]) for scan in scans(json.loads(explained)[0]["Plan"])}
    assert {type for table, type in found if table == "usage"} == {"Index Only Scan"}
    assert "Seq Scan" not in {type for table, type in found if table == "usage_daily"}


async def test_sums_of_all_users_do_not_search_the_covering_index_for_each(engine: Engine) -> None:
    await engine.fetch("INSERT INTO users (id, email, name) SELECT n, n, n FROM generate_series(1, 50) n")
    await engine.fetch(
        "INSERT INTO usage SELECT 'u' || n, n % 50 + 1, n, 'm', timestamp '2026-01-01' + n * interval '4 minutes'"
        " FROM generate_series(1, 20000) AS n"
    )
    await engine.fetch("VACUUM ANALYZE usage")
    async with engine.transaction():
        await engine.fetch("SET LOCAL enable_seqscan = off")
        top = f"EXPLAIN (FORMAT JSON) {statements('usage')['top_users_rolled']}"
        since, first, until, last = (to_db(FIRST + hour * DAY / 24) for hour in (-1, 0, 49, 48))
        explained = await engine.fetchval(top, since, until, first, last, 20)
    found = [scan for scan in scans(json.loads(explained)[0]["Plan"]) if scan["Relation Name"] == "usage"]
    assert len(found) == 2
    assert "Index Only Scan" not in {scan["Node Type"] for scan in found}


# -- filled on a table that has rows ------------------------------------------------------------------------------


async def without_rollup(engine: Engine) -> None:
    """Take the database back to before the rollup."""
    async with engine.direct() as connection:
        for migration in MIGRATIONS:
            manager = await modules_of(piccolo_migrations)[migration].forwards()
            await run(connection, APP, manager, backwards=True)


async def test_there_and_back_leaves_nothing(usage: UsageService, engine: Engine) -> None:
    await without_rollup(engine)
    left = "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'kitrocket_usage%'"
    assert await engine.fetchval(left) == 0
    functions = ["usage_inserted", "usage_updated", "usage_deleted", "usage_truncated"]
    assert await engine.fetchval("SELECT count(*) FROM pg_proc WHERE proname = ANY ($1)", functions) == 0
    assert await engine.fetchval("SELECT to_regclass('kitrocket.usage_daily')") is None
    await migrate(engine)
    assert await engine.fetchval(left) == 4


async def test_a_full_table_is_filled_from_the_newest_day_back_beside_writers(
    usage: UsageService, plain: UsageService, engine: Engine, clock: ManualClock
) -> None:
    await without_rollup(engine)
    for number in range(10):
        await make_user(engine, id=f"u{number}")
    await engine.fetch(
        "INSERT INTO usage SELECT 'old' || n, 'u' || n % 10, n, 'm' || n % 7,"
        " timestamp '2026-03-01' - n * interval '5 minutes' FROM generate_series(1, 3000) AS n"
    )
    lines: list[str] = []
    over = False

    async def write() -> None:
        while not over:
            day = clock.now - random.randrange(20) * DAY
            await plain.record_many(
                [{"user_id": f"u{number}", "tokens": 3, "model": f"m{number % 7}", "at": day} for number in range(10)]
            )
            assert await usage.total("u1", since=clock.now - 20 * DAY) >= 0

    async def killed() -> None:
        """Fill two days and be cut."""
        with anyio.CancelScope() as scope:

            def report(line: str) -> None:
                lines.append(line)
                if len(lines) == 2:
                    scope.cancel()

            await backfill(engine, report=report)

    with anyio.CancelScope() as scope:
        await migrate(engine, report=lambda line: scope.cancel() if line.startswith("summed") else None)
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(write)
        await killed()
        complete_from = await engine.fetchval("SELECT rollup_from FROM kitrocket.usage_state")
        assert date(2026, 2, 20) < complete_from < date(2026, 3, 2)
        assert await migrate(engine) == []
        over = True
    assert await engine.fetchval("SELECT rollup_from FROM kitrocket.usage_state") == date.min
    assert (await usage.verify()).drift == 0
    assert lines[0] > lines[1]
    assert await usage.total("u3") == await plain.total("u3")


async def test_triggers_that_come_back_find_what_happened_meanwhile(usage: UsageService, engine: Engine) -> None:
    for name in ("ada", "bob", "eve"):
        await make_user(engine, id=name)
        await make_usage(engine, name, id=name, tokens=5, model="m", at=FIRST)
    async with engine.direct() as connection:
        manager = await modules_of(piccolo_migrations)[MIGRATIONS[0]].forwards()
        await run(connection, APP, manager, backwards=True)
    await engine.fetch("DELETE FROM usage WHERE id = 'ada'")
    await engine.fetch("UPDATE usage SET tokens_used = 7 WHERE id = 'bob'")
    await make_usage(engine, "eve", tokens=9, model="n", at=FIRST - DAY)
    await migrate(engine)
    assert await exact(usage)
    assert [row[:1] + row[3:] for row in await kept(engine)] == [("bob", 7, 1), ("eve", 9, 1), ("eve", 5, 1)]


# -- proven and repaired ------------------------------------------------------------------------------------------


async def spoil(connection: Connection, *statements: str) -> None:
    """Change rows behind the triggers' back."""
    await connection.execute("SET session_replication_role = replica")
    for statement in statements:
        await connection.execute(statement)
    await connection.execute("SET session_replication_role = origin")


async def test_verify_names_what_differs(usage: UsageService, engine: Engine, connection: Connection) -> None:
    for name in ("ada", "bob", "eve"):
        await make_user(engine, id=name)
        await make_usage(engine, name, id=name, tokens=5, model="m", at=FIRST)
    await spoil(
        connection,
        "UPDATE usage SET tokens_used = 6 WHERE id = 'ada'",
        "DELETE FROM usage WHERE id = 'bob'",
        "INSERT INTO usage VALUES ('new', 'eve', 1, 'n', '2026-02-02')",
    )
    found = await usage.verify()
    assert (found.days, found.drift) == (2, 3)
    assert found.examples == [
        UsageDrift(user_id="eve", day=date(2026, 2, 2), model="n", tokens=1, calls=1, kept_tokens=0, kept_calls=0),
        UsageDrift(user_id="ada", day=date(2026, 2, 1), model="m", tokens=6, calls=1, kept_tokens=5, kept_calls=1),
        UsageDrift(user_id="bob", day=date(2026, 2, 1), model="m", tokens=0, calls=0, kept_tokens=5, kept_calls=1),
    ]
    assert (await usage.rebuild(since=FIRST + DAY)).corrected == 1
    assert (await usage.verify()).drift == 2
    rebuilt = await usage.rebuild(since=FIRST + timedelta(hours=23))
    assert (rebuilt.days, rebuilt.corrected) == (2, 2)
    assert await exact(usage)


ONE_KEY = "(SELECT ctid FROM kitrocket.usage_daily ORDER BY random() LIMIT 1)"
LOSE_A_KEY = f"DELETE FROM kitrocket.usage_daily WHERE ctid = {ONE_KEY}"
SPOIL_A_KEY = f"UPDATE kitrocket.usage_daily SET tokens = tokens + 1 WHERE ctid = {ONE_KEY}"


class Writers:
    """Tasks that record twenty calls at a time, of 300 users and three models."""

    def __init__(self, plain: UsageService, engine: Engine, clock: ManualClock) -> None:
        self.plain = plain
        self.engine = engine
        self.clock = clock
        self.users = [f"u{number:03}" for number in range(300)]
        self.calls = 0
        self.over = False

    async def write(self, pause: float) -> None:
        while not self.over:
            await self.plain.record_many(
                [
                    {
                        "user_id": random.choice(self.users),
                        "tokens": 3,
                        "model": random.choice("abc"),
                        "at": self.clock.now,
                    }
                    for _ in range(20)
                ]
            )
            self.calls += 20
            await anyio.sleep(pause)

    @asynccontextmanager
    async def at_work(self, count: int, *, pause: float = 0) -> AsyncIterator[None]:
        await self.engine.fetch(
            "INSERT INTO users (id, email, name) SELECT id, id || '@example.com', 'n' FROM unnest($1::text[]) AS id",
            self.users,
        )
        async with anyio.create_task_group() as group:
            for _ in range(count):
                group.start_soon(self.write, pause)
            while not self.calls:
                await anyio.lowlevel.checkpoint()
            yield
            self.over = True


async def test_rebuild_repairs_beside_writers(
    usage: UsageService,
    plain: UsageService,
    engine: Engine,
    connection: Connection,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    locked: list[int] = []
    fetch = engine.fetch

    async def watched(sql: str, *arguments: Any, node: str | None = None) -> list[asyncpg.Record]:
        if sql == statements("rollup")["lock_keys"]:
            assert engine.in_transaction()
            locked.append(len(arguments[1]))
        return await fetch(sql, *arguments, node=node)

    monkeypatch.setattr(engine, "fetch", watched)
    async with Writers(plain, engine, clock).at_work(4):
        for _ in range(5):
            # A key at a time, or this would be the one that deadlocks.
            await spoil(connection, *[LOSE_A_KEY, SPOIL_A_KEY] * 20)
            await usage.rebuild(since=clock.now - DAY)
    assert await exact(usage)
    # Who writes waits for few keys at a time.
    assert max(locked) <= 200
    assert len(locked) > 5


@pytest.mark.storm
async def test_rebuild_blocks_no_writer_for_long(
    usage: UsageService, plain: UsageService, engine: Engine, connection: Connection, clock: ManualClock
) -> None:
    writers = Writers(plain, engine, clock)
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while not writers.over:
            waited = await engine.fetchval(
                "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - waitstart)), 0)::float FROM pg_locks"
                " WHERE NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
                " OR NOT granted AND locktype = 'transactionid'"
            )
            longest = max(longest, waited)
            await anyio.sleep(0.005)

    rebuilt = 0
    began = anyio.current_time()
    async with writers.at_work(25, pause=1.0), anyio.create_task_group() as group:
        group.start_soon(watch)
        while anyio.current_time() < began + 20:
            await spoil(connection, *[LOSE_A_KEY, SPOIL_A_KEY] * 20)
            await usage.rebuild(since=clock.now - DAY)
            rebuilt += 1
        writers.over = True
    took = anyio.current_time() - began
    print(f"\n{rebuilt} times beside {writers.calls / took:.0f} rows/s; the longest wait {longest * 1000:.0f} ms")
    assert rebuilt > 5
    assert await exact(usage)
    assert longest <= 0.2


async def test_rebuild_and_prune_commit_by_themselves(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    async with engine.transaction():
        with pytest.raises(TransactionError):
            await usage.rebuild(since=clock.now)
        with pytest.raises(TransactionError):
            await usage.prune(clock.now - DAY)


async def test_without_the_rollup_there_is_nothing_to_keep(plain: UsageService, clock: ManualClock) -> None:
    for work in (plain.verify(), plain.rebuild(since=clock.now), plain.prune(clock.now - 40 * DAY)):
        with pytest.raises(ConfigurationError):
            await work


# -- pruned -------------------------------------------------------------------------------------------------------


async def test_pruning_changes_no_sum(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    await fill_days(engine, clock)
    clock.now = FIRST + 40 * DAY
    floor = FIRST + 2 * DAY
    windows = [
        (FIRST - DAY, None),
        (FIRST, FIRST + DAY),
        (FIRST, floor + timedelta(hours=5)),
        (FIRST + DAY, floor),
        (floor + MICROSECOND, None),
        (floor + timedelta(hours=23), None),
        (FIRST - DAY, floor + timedelta(hours=23)),
    ]
    before = [await everything(usage, *window, raw=False) for window in windows]
    counted = await engine.fetchval("SELECT count(*) FROM usage WHERE created_at < $1", to_db(floor))
    done = await usage.prune(floor + timedelta(hours=3), batch_size=3)
    assert (done.deleted, done.more, done.kept_from) == (counted, False, floor)
    assert done.batches >= counted / 3
    assert await engine.fetchval("SELECT min(created_at) FROM usage") >= to_db(floor)
    assert [await everything(usage, *window, raw=False) for window in windows] == before
    assert await exact(usage)
    again = await usage.prune(floor)
    assert (again.deleted, again.batches, again.more) == (0, 0, False)
    assert (await usage.prune(FIRST)).kept_from == floor


async def test_a_window_that_cuts_into_pruned_days_is_refused(
    usage: UsageService, engine: Engine, clock: ManualClock
) -> None:
    await fill_days(engine, clock)
    clock.now = FIRST + 40 * DAY
    floor = FIRST + 2 * DAY
    await usage.prune(floor)
    cases: list[tuple[datetime, datetime | None, datetime, datetime | None]] = [
        (FIRST + MICROSECOND, None, FIRST, None),
        (FIRST + timedelta(hours=13), None, FIRST + DAY, None),
        (FIRST, FIRST + timedelta(hours=11), FIRST, FIRST),
        (floor - MICROSECOND, clock.now, floor, clock.now),
    ]
    for since, until, nearest_since, nearest_until in cases:
        reads: list[Callable[..., Any]] = [
            lambda **window: usage.total("ada", **window),
            lambda **window: usage.breakdown("ada", by="day", **window),
            lambda **window: usage.breakdown("nobody", by="model", **window),
            lambda **window: usage.top_users(**window),
        ]
        for read in reads:
            with pytest.raises(WindowNotExactError) as caught:
                await read(since=since, until=until)
            assert (caught.value.nearest_since, caught.value.nearest_until) == (nearest_since, nearest_until)
            await read(since=nearest_since, until=nearest_until)
    for options in ({"by": "hour"}, {"by": "day", "tz": "Asia/Kathmandu"}):
        with pytest.raises(WindowNotExactError) as caught:
            await usage.breakdown("ada", since=FIRST, **options)  # type: ignore[arg-type]  # a table of options
        assert caught.value.nearest_since == floor
        await usage.breakdown("ada", since=floor, **options)  # type: ignore[arg-type]  # as above


@pytest.mark.parametrize("offset", [-MICROSECOND, timedelta(0), MICROSECOND])
async def test_a_call_of_a_pruned_day_is_refused(
    usage: UsageService, engine: Engine, clock: ManualClock, offset: timedelta
) -> None:
    await make_user(engine, id="ada")
    await usage.record("ada", tokens=5, model="m", id="old", at=FIRST - DAY)
    await usage.prune(FIRST)
    call = {"user_id": "ada", "tokens": 5, "model": "m", "at": FIRST + offset}
    if offset < timedelta(0):
        with pytest.raises(InvalidInputError) as caught:
            await usage.record(**call)  # type: ignore[arg-type]  # a table of values
        assert caught.value.field == "at"
        with pytest.raises(InvalidInputError) as caught:
            await usage.record_many([{**call, "at": clock.now}, call])
        assert caught.value.field == "entries[1].at"
        with pytest.raises(InvalidInputError):
            await usage.record("ada", tokens=5, model="m", id="old", at=FIRST - DAY)
        assert await usage.total("ada", since=FIRST - DAY) == 5
        with pytest.raises(InvalidInputError):
            await usage.rebuild(since=FIRST + offset)
    else:
        await usage.record(**call)  # type: ignore[arg-type]  # as above
        await usage.rebuild(since=FIRST + offset)
        assert await exact(usage)


async def test_pruning_waits_for_late_calls_that_it_would_miss(
    usage: UsageService, engine: Engine, clock: ManualClock
) -> None:
    """The floor cannot move between a late call's look at it and its commit."""
    await make_user(engine, id="ada")
    order: list[str] = []
    is_recorded, is_waiting = anyio.Event(), anyio.Event()

    async def record() -> None:
        async with engine.transaction():
            await usage.record("ada", tokens=5, model="m", at=FIRST)
            is_recorded.set()
            await is_waiting.wait()
            order.append("recorded")

    async def prune() -> None:
        await usage.prune(FIRST + DAY)
        order.append("pruned")

    async with anyio.create_task_group() as group:
        group.start_soon(record)
        await is_recorded.wait()
        group.start_soon(prune)
        await until_someone_waits(engine)
        is_waiting.set()
    assert order == ["recorded", "pruned"]
    assert await usage.total("ada", since=FIRST) == 5
    assert await engine.fetchval("SELECT count(*) FROM usage") == 0


async def test_pruning_stops_at_its_budget(usage: UsageService, engine: Engine) -> None:
    await make_user(engine, id="ada")
    await usage.record_many([{"user_id": "ada", "tokens": 1, "model": "m", "at": FIRST} for _ in range(10)])
    done = await usage.prune(FIRST + DAY, batch_size=2, budget=timedelta(0))
    assert (done.deleted, done.batches, done.more) == (2, 1, True)
    assert (await usage.prune(FIRST + DAY, batch_size=2)).deleted == 8


async def test_pruning_wants_complete_sums(usage: UsageService, engine: Engine) -> None:
    await engine.fetch("UPDATE kitrocket.usage_state SET rollup_from = '2026-02-01'")
    with pytest.raises(ConfigurationError, match="kitrocket db migrate"):
        await usage.prune(FIRST)


@pytest.mark.parametrize(("offset", "is_refused"), [(-MICROSECOND, False), (timedelta(0), True)])
async def test_a_day_that_is_not_a_day_past_is_never_pruned(
    usage: UsageService, clock: ManualClock, offset: timedelta, is_refused: bool
) -> None:
    clock.now = FIRST + DAY + timedelta(hours=23)
    if is_refused:
        with pytest.raises(InvalidInputError):
            await usage.prune(FIRST + DAY + offset)
    else:
        assert (await usage.prune(FIRST + DAY + offset)).kept_from == FIRST
