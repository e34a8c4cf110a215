from __future__ import annotations

import json
import random
from bisect import bisect
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import anyio
import asyncpg
import pytest

from factories import make_usage, make_user
from kitrocket.clock import from_db, to_db
from kitrocket.engine import Engine
from kitrocket.errors import DatabaseUnavailableError, InvalidInputError, UsageConflictError, UserNotFoundError
from kitrocket.models import RecordedUsage, TopUser, UsageBucket, UsageEntry, UsageRecord
from kitrocket.sql import statements
from kitrocket.testing import ManualClock
from kitrocket.usage import FUTURE_LIMIT, UsageService
from kitrocket.windows import MAX_BUCKETS
from servers import Server

pytestmark = pytest.mark.asyncio(loop_scope="session")

SONNET = "claude-sonnet-4-20250514"
MICROSECOND = timedelta(microseconds=1)
SECOND = timedelta(seconds=1)
DAYS_30 = timedelta(days=30)
SQL = statements("usage")


@pytest.fixture
def usage(engine: Engine, clock: ManualClock) -> UsageService:
    return UsageService(engine, clock=clock)


async def rows(engine: Engine) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in await engine.fetch("SELECT * FROM usage ORDER BY id")]


async def count(engine: Engine) -> int:
    return int(await engine.fetchval("SELECT count(*) FROM usage"))


def entry(user_id: str, **values: object) -> dict[str, object]:
    return {"user_id": user_id, "tokens": 1, "model": SONNET, **values}


# -- recording ----------------------------------------------------------------------------------------------------


async def test_a_call_is_a_row(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    clock.now = datetime(2026, 3, 1, 12, 0, 0, 123_456, tzinfo=UTC)
    user_id = await make_user(engine)
    record = await usage.record(user_id, tokens=1834, model=SONNET)
    assert record == UsageRecord(
        id=record.id, user_id=user_id, tokens=1834, model=SONNET, at=clock.now, duplicate=False
    )
    assert await rows(engine) == [(record.id, user_id, 1834, SONNET, to_db(clock.now))]


async def test_its_id_follows_the_clock(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    user_id = await make_user(engine)
    ids = []
    for _ in range(5):
        ids.append((await usage.record(user_id, tokens=1, model=SONNET)).id)
        clock.advance(timedelta(milliseconds=1))
    assert ids == sorted(ids)
    assert UUID(ids[0]).version == 7


async def test_it_keeps_the_time_of_the_call_to_the_microsecond(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    at = datetime.fromisoformat("2020-02-29T23:59:59.999999+05:45")
    record = await usage.record(user_id, tokens=0, model=SONNET, id="a", at=at)
    assert record.at == at
    assert record.at.utcoffset() == timedelta(0)
    assert await rows(engine) == [("a", user_id, 0, SONNET, datetime(2020, 2, 29, 18, 14, 59, 999_999))]  # noqa: DTZ001


async def test_the_same_id_counts_once_whatever_its_time(
    usage: UsageService, engine: Engine, clock: ManualClock
) -> None:
    user_id = await make_user(engine)
    first = await usage.record(user_id, tokens=5, model=SONNET, id="a")
    clock.advance(timedelta(hours=1))
    second = await usage.record(user_id, tokens=5, model=SONNET, id="a")
    assert second == first.model_copy(update={"duplicate": True})
    assert await usage.total(user_id) == 5


@pytest.mark.parametrize("other", [{"tokens": 6}, {"model": "gpt"}, {"user_id": "another"}])
async def test_an_id_of_another_call_is_a_conflict(
    usage: UsageService, engine: Engine, other: dict[str, object]
) -> None:
    await make_user(engine, id="one")
    await make_user(engine, id="another")
    await usage.record("one", tokens=5, model=SONNET, id="a")
    before = await rows(engine)
    call = {"user_id": "one", "tokens": 5, "model": SONNET, **other}
    with pytest.raises(UsageConflictError) as caught:
        await usage.record(**call, id="a")  # type: ignore[arg-type]  # a table of values
    assert caught.value.usage_id == "a"
    with pytest.raises(UsageConflictError):
        await usage.record_many([entry("one", id="0"), {**call, "id": "a"}, entry("one", id="z")])
    assert await rows(engine) == before


async def test_an_unknown_user_is_named(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    with pytest.raises(UserNotFoundError) as caught:
        await usage.record("nobody", tokens=1, model=SONNET)
    assert caught.value.user_id == "nobody"
    with pytest.raises(UserNotFoundError):
        await usage.record_many([entry(user_id), entry("nobody"), entry(user_id)])
    assert await count(engine) == 0


async def test_many_calls_in_any_form(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    user_id = await make_user(engine)

    def calls() -> Iterator[UsageEntry | dict[str, object]]:
        yield UsageEntry(user_id=user_id, tokens=1, model=SONNET)
        yield UsageEntry(user_id=user_id, tokens=2, model="gpt", id="b", at=clock.now - SECOND)
        yield {"user_id": user_id, "tokens": 4, "model": SONNET}
        yield {"user_id": user_id, "tokens": 8, "model": SONNET, "id": None, "at": None}

    assert await usage.record_many(calls()) == RecordedUsage(inserted=4, duplicates=0)
    assert await usage.total(user_id) == 15
    assert await usage.record_many(iter([entry(user_id, tokens=2, model="gpt", id="b")])) == RecordedUsage(
        inserted=0, duplicates=1
    )


@pytest.mark.parametrize("nothing", [[], (), iter(())])
async def test_no_calls_are_recorded_without_a_word(usage: UsageService, nothing: Any) -> None:
    assert await usage.record_many(nothing) == RecordedUsage(inserted=0, duplicates=0)


async def test_an_id_that_comes_twice_in_one_call_counts_once(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    twice = [entry(user_id, id="a"), entry(user_id, id="b"), entry(user_id, id="a")]
    assert await usage.record_many(twice) == RecordedUsage(inserted=2, duplicates=1)
    assert await usage.record_many(twice) == RecordedUsage(inserted=0, duplicates=3)
    with pytest.raises(UsageConflictError) as caught:
        await usage.record_many([entry(user_id, id="c"), entry(user_id, id="c", tokens=2)])
    assert caught.value.usage_id == "c"
    assert await count(engine) == 2


async def test_a_long_list_is_written_whole_or_not_at_all(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    long = [entry(user_id, id=f"{number:05}") for number in range(12_000)]
    await usage.record(user_id, tokens=2, model=SONNET, id="11999")
    with pytest.raises(UsageConflictError):
        await usage.record_many(long)
    assert await count(engine) == 1
    assert await usage.record_many(long[:-1]) == RecordedUsage(inserted=11_999, duplicates=0)
    assert await usage.record_many(reversed(long[:-1])) == RecordedUsage(inserted=0, duplicates=11_999)
    assert await usage.total(user_id) == 12_001


@pytest.mark.parametrize("size", [1, 7])
async def test_ids_sent_one_to_five_times_by_eight_tasks_count_once(
    usage: UsageService, engine: Engine, size: int
) -> None:
    users = [await make_user(engine) for _ in range(3)]
    calls = [entry(users[number % 3], id=f"call-{number}", tokens=number) for number in range(200)]
    sent = [call for call in calls for _ in range(random.randint(1, 5))]
    random.shuffle(sent)
    answers: list[RecordedUsage] = []
    lists = iter([sent[start : start + size] for start in range(0, len(sent), size)])

    async def work() -> None:
        answers.extend([await usage.record_many(some) for some in lists])

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(work)
    assert sum(answer.inserted for answer in answers) == 200
    assert sum(answer.inserted + answer.duplicates for answer in answers) == len(sent)
    assert Counter((row[0], row[1], row[2]) for row in await rows(engine)) == Counter(
        (call["id"], call["user_id"], call["tokens"]) for call in calls
    )


async def test_of_eight_conflicting_tasks_one_wins(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    won: list[int] = []

    async def work(tokens: int) -> None:
        try:
            await usage.record_many([entry(user_id, id=id, tokens=tokens) for id in ("a", "b", "c")])
        except UsageConflictError:
            return
        won.append(tokens)

    async with anyio.create_task_group() as group:
        for tokens in range(8):
            group.start_soon(work, tokens)
    assert len(won) == 1
    assert {row[2] for row in await rows(engine)} == set(won)


async def is_waiting(engine: Engine) -> None:
    """Return once a connection of this database waits for a lock."""
    with anyio.fail_after(30):
        while not await engine.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        ):
            await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("tokens", [1, 2])
async def test_a_row_committed_while_the_insert_waits_for_it_is_seen(
    usage: UsageService, engine: Engine, tokens: int
) -> None:
    user_id = await make_user(engine)
    answer: list[UsageRecord | UsageConflictError] = []

    async def work() -> None:
        try:
            answer.append(await usage.record(user_id, tokens=1, model=SONNET, id="a"))
        except UsageConflictError as error:
            answer.append(error)

    waiting = anyio.Event()
    async with anyio.create_task_group() as group:

        async def other() -> None:
            async with engine.transaction():
                await make_usage(engine, user_id, id="a", tokens=tokens)
                waiting.set()
                await is_waiting_outside.wait()

        is_waiting_outside = anyio.Event()
        group.start_soon(other)
        await waiting.wait()
        group.start_soon(work)
        await is_waiting(engine)
        is_waiting_outside.set()
    assert await count(engine) == 1
    if tokens == 1:
        assert isinstance(answer[0], UsageRecord)
        assert answer[0].duplicate
    else:
        assert isinstance(answer[0], UsageConflictError)


Fetch = Callable[..., Awaitable[list[asyncpg.Record]]]


async def test_a_row_deleted_after_the_insert_met_it_is_written_again(
    usage: UsageService, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_id = await make_user(engine)
    await usage.record(user_id, tokens=1, model=SONNET, id="a")
    fetch: Fetch = engine.fetch

    async def interleave(sql: str, *arguments: object, **options: Any) -> list[asyncpg.Record]:
        if sql == SQL["recorded"]:
            await fetch("DELETE FROM usage")
        return await fetch(sql, *arguments, **options)

    monkeypatch.setattr(engine, "fetch", interleave)
    record = await usage.record(user_id, tokens=1, model=SONNET, id="a")
    assert not record.duplicate
    assert await count(engine) == 1


async def test_an_insert_whose_answer_was_lost_is_repeated_and_counts_once(
    usage: UsageService, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_id = await make_user(engine)
    fetch: Fetch = engine.fetch
    lost: list[str] = []

    async def lose(sql: str, *arguments: object, **options: Any) -> list[asyncpg.Record]:
        answer = await fetch(sql, *arguments, **options)
        if sql == SQL["insert_one"] and len(lost) < 3:
            lost.append(sql)
            raise DatabaseUnavailableError("the connection was lost") from ConnectionResetError()
        return answer

    monkeypatch.setattr(engine, "fetch", lose)
    record = await usage.record(user_id, tokens=7, model=SONNET)
    assert len(lost) == 3
    assert not record.duplicate
    assert await rows(engine) == [(record.id, user_id, 7, SONNET, to_db(record.at))]


@pytest.mark.direct
async def test_it_outlives_the_connections_of_the_pool(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    for _ in range(5):
        await engine.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(lambda: usage.record(user_id, tokens=1, model=SONNET))
    assert await usage.total(user_id) == 20


# -- inside the caller's transaction ------------------------------------------------------------------------------


async def test_a_transaction_rolled_back_leaves_nothing(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    with pytest.raises(ZeroDivisionError):
        async with engine.transaction():
            await usage.record(user_id, tokens=1, model=SONNET)
            await usage.record_many([entry(user_id), entry(user_id)])
            assert await usage.total(user_id) == 3
            raise ZeroDivisionError
    assert await count(engine) == 0


async def test_nobody_sees_it_before_the_commit(usage: UsageService, engine: Engine, server: Server) -> None:
    user_id = await make_user(engine)
    database = await engine.fetchval("SELECT current_database()")
    async with server.engine(database) as outside:
        async with engine.transaction():
            await usage.record(user_id, tokens=1, model=SONNET)
            assert await count(outside) == 0
        assert await count(outside) == 1


async def test_an_error_inside_a_transaction_leaves_the_rest_of_it_usable(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    async with engine.transaction():
        await usage.record(user_id, tokens=1, model=SONNET, id="a")
        with pytest.raises(UserNotFoundError):
            await usage.record("nobody", tokens=1, model=SONNET)
        with pytest.raises(UsageConflictError):
            await usage.record_many([entry(user_id, id="0"), entry(user_id, id="a", tokens=2)])
        await usage.record(user_id, tokens=1, model=SONNET, id="b")
    assert [row[0] for row in await rows(engine)] == ["a", "b"]


# -- totals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "counts"), [(-SECOND, 0), (-MICROSECOND, 0), (timedelta(0), 1), (MICROSECOND, 1), (SECOND, 1)]
)
async def test_a_call_counts_from_since_on(
    usage: UsageService, engine: Engine, clock: ManualClock, offset: timedelta, counts: int
) -> None:
    user_id = await make_user(engine)
    await make_usage(engine, user_id, at=clock.now - DAYS_30 + offset)
    assert await usage.total(user_id) == counts
    assert await usage.total(user_id, since=clock.now - DAYS_30) == counts
    assert await usage.total(user_id, until=clock.now) == counts


@pytest.mark.parametrize(
    ("offset", "counts"), [(-SECOND, 1), (-MICROSECOND, 1), (timedelta(0), 0), (MICROSECOND, 0), (SECOND, 0)]
)
async def test_a_call_counts_until_before_until(
    usage: UsageService, engine: Engine, clock: ManualClock, offset: timedelta, counts: int
) -> None:
    user_id = await make_user(engine)
    until = clock.now - timedelta(days=1)
    await make_usage(engine, user_id, at=until + offset)
    assert await usage.total(user_id, until=until) == counts
    assert len(await usage.breakdown(user_id, until=until)) == counts
    assert len(await usage.top_users(until=until)) == counts


async def test_without_until_a_call_at_this_instant_and_a_later_one_count(
    usage: UsageService, engine: Engine, clock: ManualClock
) -> None:
    user_id = await make_user(engine)
    await usage.record(user_id, tokens=1, model=SONNET)
    await usage.record(user_id, tokens=2, model=SONNET, at=clock.now + FUTURE_LIMIT)
    assert await usage.total(user_id) == 3
    assert await usage.total(user_id, until=clock.now) == 0
    assert await usage.total(user_id, until=datetime.max.replace(tzinfo=UTC)) == 0
    assert await usage.total(user_id, since=datetime.min.replace(tzinfo=UTC)) == 3


@pytest.mark.parametrize(("offset", "is_refused"), [(-SECOND, False), (timedelta(0), False), (SECOND, True)])
async def test_a_call_may_be_five_minutes_ahead(
    usage: UsageService, engine: Engine, clock: ManualClock, offset: timedelta, is_refused: bool
) -> None:
    user_id = await make_user(engine)
    at = clock.now + timedelta(minutes=5) + offset
    if not is_refused:
        assert (await usage.record(user_id, tokens=1, model=SONNET, at=at)).at == at
        return
    with pytest.raises(InvalidInputError) as caught:
        await usage.record(user_id, tokens=1, model=SONNET, at=at)
    assert caught.value.field == "at"
    with pytest.raises(InvalidInputError) as caught:
        await usage.record_many([entry(user_id), entry(user_id, at=at)])
    assert caught.value.field == "entries[1].at"
    assert await count(engine) == 0


async def test_an_unknown_user_has_used_nothing(usage: UsageService) -> None:
    total = await usage.total("nobody")
    assert (type(total), total) == (int, 0)
    assert await usage.breakdown("nobody") == []
    assert await usage.top_users() == []


async def test_sums_up_to_ten_million_million_are_ints(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    user_id = await make_user(engine)
    largest, number = 2**31 - 1, 4_657
    assert largest * number > 10**13
    await usage.record_many([entry(user_id, tokens=largest) for _ in range(number)])
    total = await usage.total(user_id)
    [bucket] = await usage.breakdown(user_id, by="day")
    [by_model] = await usage.breakdown(user_id, by="model")
    [top] = await usage.top_users()
    for found in (total, bucket.tokens, by_model.tokens, top.tokens):
        assert (type(found), found) == (int, largest * number)


async def test_one_model_of_several(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    await usage.record_many([entry(user_id, tokens=1), entry(user_id, tokens=2, model="gpt")])
    assert await usage.total(user_id, model="gpt") == 2
    assert await usage.total(user_id, model="GPT") == 0


async def test_the_monthly_total_is_one_statement(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    await usage.record(user_id, tokens=3, model=SONNET)
    seen: list[str] = []
    async with engine.transaction() as transaction:
        connection = transaction.connection
        with connection.query_logger(lambda query: seen.append(query.query)):
            assert await usage.total(user_id) == 3
    assert seen == [SQL["total_rolled"]]


# -- breakdown ----------------------------------------------------------------------------------------------------


def bucket(start: str, end: str | None, tokens: int, calls: int, model: str | None = None) -> UsageBucket:
    def utc(text: str) -> datetime:
        return datetime.fromisoformat(text).astimezone(UTC)

    return UsageBucket(start=utc(start), end=None if end is None else utc(end), model=model, tokens=tokens, calls=calls)


async def test_days_of_a_zone_are_clipped_to_the_window(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    midnight = datetime.fromisoformat("2026-02-10T00:00+01:00")
    for offset, tokens in ((-MICROSECOND, 1), (timedelta(0), 2), (MICROSECOND, 4)):
        await make_usage(engine, user_id, tokens=tokens, at=midnight + offset)
    since, until = midnight - timedelta(hours=6), midnight + timedelta(days=2, hours=6)
    window: dict[str, Any] = {"since": since, "until": until, "tz": "Europe/Berlin"}
    used = [
        bucket("2026-02-09T18:00+01:00", "2026-02-10T00:00+01:00", 1, 1),
        bucket("2026-02-10T00:00+01:00", "2026-02-11T00:00+01:00", 6, 2),
    ]
    assert await usage.breakdown(user_id, by="day", **window) == used
    assert await usage.breakdown(user_id, by="day", fill=True, **window) == [
        *used,
        bucket("2026-02-11T00:00+01:00", "2026-02-12T00:00+01:00", 0, 0),
        bucket("2026-02-12T00:00+01:00", "2026-02-12T06:00+01:00", 0, 0),
    ]
    assert (await usage.breakdown(user_id, **window))[0].start.utcoffset() == timedelta(0)


async def test_the_last_bucket_of_an_open_window_is_open(
    usage: UsageService, engine: Engine, clock: ManualClock
) -> None:
    user_id = await make_user(engine)
    clock.now = datetime(2026, 3, 1, 23, 58, tzinfo=UTC)
    await usage.record(user_id, tokens=1, model=SONNET)
    await usage.record(user_id, tokens=2, model=SONNET, at=clock.now + timedelta(minutes=4))
    assert await usage.breakdown(user_id, by="day") == [bucket("2026-03-01T00:00Z", None, 3, 2)]
    assert await usage.breakdown(user_id, by="model") == [bucket("2026-01-30T23:58Z", None, 3, 2, model=SONNET)]


async def test_models_come_with_the_largest_sum_first(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    user_id = await make_user(engine)
    for model, tokens in (("b", 5), ("a", 5), ("Z", 5), ("c", 4), ("c", 4)):
        await make_usage(engine, user_id, model=model, tokens=tokens, at=clock.now - SECOND)
    found = await usage.breakdown(user_id, by="model", since=clock.now - SECOND, until=clock.now, fill=True)
    assert [(one.model, one.tokens, one.calls) for one in found] == [("c", 8, 2), ("Z", 5, 1), ("a", 5, 1), ("b", 5, 1)]
    assert {(one.start, one.end) for one in found} == {(clock.now - SECOND, clock.now)}


ZONES = [
    *("UTC", "Europe/Berlin", "America/New_York", "America/St_Johns", "America/Sao_Paulo", "America/Havana"),
    *("America/Caracas", "Asia/Kathmandu", "Asia/Kolkata", "Asia/Tehran", "Asia/Beirut", "Asia/Pyongyang"),
    *("Australia/Eucla", "Australia/Lord_Howe", "Pacific/Chatham", "Pacific/Apia", "Pacific/Kiritimati"),
    *("Pacific/Marquesas", "Antarctica/Troll", "Africa/Casablanca"),
]


async def test_buckets_of_twenty_zones_add_up_to_the_total(usage: UsageService, engine: Engine) -> None:
    """A year with each zone's changes of the clocks, and in Apia a day that there was not."""
    user_id = await make_user(engine)
    since, until = datetime(2011, 3, 1, 7, 31, tzinfo=UTC), datetime(2012, 3, 5, 4, 1, 2, 3, tzinfo=UTC)
    span = int((until - since) / MICROSECOND)
    at = [since + MICROSECOND * random.randrange(span) for _ in range(3_000)] + [since, until - MICROSECOND]
    await usage.record_many([entry(user_id, at=one, tokens=number) for number, one in enumerate(at)])
    total = await usage.total(user_id, since=since, until=until)
    assert total == sum(range(len(at)))
    for zone in ZONES:
        for by in ("hour", "day", "month"):
            found = await usage.breakdown(user_id, by=by, since=since, until=until, tz=zone, fill=True)  # type: ignore[arg-type]  # one of the literals
            assert (found[0].start, found[-1].end) == (since, until)
            assert [one.end for one in found[:-1]] == [one.start for one in found[1:]]
            assert sum(one.tokens for one in found) == total
            starts = [one.start for one in found]
            expected = Counter(bisect(starts, when) - 1 for when in at)
            assert [one.calls for one in found] == [expected[number] for number in range(len(found))]


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "America/New_York"])
async def test_the_servers_time_zone_does_not_matter(server: Server, database: str, zone: str) -> None:
    administrator = await asyncpg.connect(server.url(database, direct=True))
    try:
        await administrator.execute(f"ALTER DATABASE {database} SET timezone TO '{zone}'")
    finally:
        await administrator.close()
    clock = ManualClock(datetime(2026, 3, 8, 6, 59, 59, 999_999, tzinfo=UTC))  # New York's clocks change a moment later
    async with server.engine(database) as engine:
        usage = UsageService(engine, clock=clock)
        user_id = await make_user(engine)
        for offset in (-MICROSECOND, timedelta(0), MICROSECOND):
            await usage.record(user_id, tokens=1, model=SONNET, at=clock.now - timedelta(days=1) + offset)
        since = clock.now - timedelta(days=1)
        assert await usage.total(user_id, since=since) == 2
        assert await usage.total(user_id, since=since, until=since + MICROSECOND) == 1
        days = await usage.breakdown(user_id, by="hour", since=since, tz="America/New_York")
        assert [(one.start, one.calls) for one in days] == [(since, 1), (since + MICROSECOND, 1)]
    # A DBA who pastes a statement into a session of that zone reads the same.
    session = await asyncpg.connect(server.url(database, direct=True))
    try:
        assert await session.fetchval("SHOW timezone") == zone
        assert await session.fetchval(SQL["total"], user_id, to_db(since), None, None) == 2
        midnight = to_db(since).replace(hour=0, minute=0, second=0, microsecond=0)
        for first in (midnight, midnight + timedelta(days=1)):
            rolled = await session.fetchrow(SQL["total_rolled"], user_id, to_db(since), None, first, None, None)
            assert rolled is not None
            assert rolled["tokens"] == 2
        bounds = [to_db(since), to_db(since + MICROSECOND)]
        by_time = await session.fetch(SQL["by_time"], user_id, to_db(since), None, bounds)
        assert [tuple(row) for row in by_time] == [(1, 1, 1), (2, 1, 1)]
    finally:
        await session.close()


async def test_more_than_ten_thousand_buckets_are_refused(usage: UsageService, clock: ManualClock) -> None:
    since = clock.now - timedelta(hours=MAX_BUCKETS)
    assert len(await usage.breakdown("nobody", by="hour", since=since, until=clock.now, fill=True)) == MAX_BUCKETS
    with pytest.raises(InvalidInputError) as caught:
        await usage.breakdown("nobody", by="hour", since=since, until=clock.now + MICROSECOND)
    assert caught.value.field == "since"


async def test_the_users_who_used_most(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    for name, tokens in (("b", [5]), ("a", [3, 2]), ("C", [5]), ("most", [6]), ("none", [])):
        await make_user(engine, id=name)
        for some in tokens:
            await make_usage(engine, name, tokens=some, at=clock.now)
    await make_usage(engine, "none", tokens=99, at=clock.now - DAYS_30 - MICROSECOND)
    found = await usage.top_users()
    assert [(one.user_id, one.tokens, one.calls) for one in found] == [
        ("most", 6, 1),
        ("C", 5, 1),
        ("a", 5, 2),
        ("b", 5, 1),
    ]
    assert await usage.top_users(limit=1) == [TopUser(user_id="most", tokens=6, calls=1)]
    earlier = clock.now - DAYS_30 - SECOND
    assert await usage.top_users(since=earlier, until=clock.now) == [TopUser(user_id="none", tokens=99, calls=1)]


# -- the covering index -------------------------------------------------------------------------------------------


def scans(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The leaves of a plan."""
    inner = plan.get("Plans", [])
    return [leaf for one in inner for leaf in scans(one)] if inner else [plan]


PLANS = {
    "total": ("(text, timestamp, timestamp, text)", "'user', '2026-02-01', '2026-02-10', 'gpt'"),
    "by_time": (
        "(text, timestamp, timestamp, timestamp[])",
        "'user', '2026-02-01', '2026-02-10', '{2026-02-01, 2026-02-02}'",
    ),
    "by_model": ("(text, timestamp, timestamp)", "'user', '2026-02-01', NULL"),
}


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_a_users_sums_are_index_only_scans_of_the_window(engine: Engine, mode: str) -> None:
    await make_user(engine, id="user")
    await make_user(engine, id="other")
    await engine.fetch(
        "INSERT INTO usage SELECT 'u' || n, CASE n % 20 WHEN 0 THEN 'user' ELSE 'other' END, n, 'gpt',"
        " timestamp '2026-01-01' + n * interval '4 minutes' FROM generate_series(1, 20000) AS n"
    )
    await engine.fetch("VACUUM ANALYZE usage")
    for name, (types, values) in PLANS.items():
        async with engine.transaction() as transaction:
            await engine.fetch(f"SET LOCAL plan_cache_mode = {mode}")
            await transaction.connection.execute(f"PREPARE plan_{name} {types} AS {SQL[name]}")
            explained = await engine.fetchval(
                f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) EXECUTE plan_{name} ({values})"
            )
            await engine.fetch(f"DEALLOCATE plan_{name}")
        [scan] = scans(json.loads(explained)[0]["Plan"])
        assert scan["Node Type"] == "Index Only Scan", name
        assert scan["Index Name"] == "usage_user_created_idx"
        assert scan["Heap Fetches"] == 0
        assert "created_at >=" in scan["Index Cond"]
        assert "created_at <" in scan["Index Cond"]


# -- bad input ----------------------------------------------------------------------------------------------------

BAD_LABELS: list[object] = ["", "  \t", "a\0b", "\ud800", "x" * 256, "x" * 1_000_000, None, 5, b"x", ["x"]]
BAD_TOKENS: list[object] = [-1, 2**31, 2**70, 1.0, float("nan"), "1", True, None, [1]]
BAD_TIMES: list[object] = [datetime(2026, 1, 1), "2026-01-01T00:00Z", 0, datetime(2026, 1, 1).date()]  # noqa: DTZ001


@pytest.fixture
def unreachable(clock: ManualClock) -> UsageService:
    """A service whose engine cannot connect, so that a statement would raise another error."""
    return UsageService(Engine("postgres://nobody@127.0.0.1:1/none?sslmode=disable"), clock=clock)


async def refused(work: Awaitable[object], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        await work
    assert caught.value.field == field
    assert caught.value.problem
    assert caught.value.expected
    assert len(str(caught.value)) < 300


RECORD: dict[str, list[object]] = {
    "user_id": BAD_LABELS,
    "tokens": BAD_TOKENS,
    "model": BAD_LABELS,
    "id": [one for one in BAD_LABELS if one is not None],
    "at": BAD_TIMES,
}


@pytest.mark.parametrize("field", RECORD)
async def test_a_bad_call_is_refused_before_any_statement(unreachable: UsageService, field: str) -> None:
    for bad in RECORD[field]:
        call: dict[str, Any] = {**entry("ada"), field: bad}
        await refused(unreachable.record(**call), field)
        await refused(unreachable.record_many([entry("ada"), call]), f"entries[1].{field}")


@pytest.mark.parametrize(
    ("entries", "field"),
    [
        (None, "entries"),
        (5, "entries"),
        (["ada"], "entries[0]"),
        ("ada", "entries[0]"),
        ({"user_id": "ada"}, "entries[0]"),
        ([entry("ada"), None], "entries[1]"),
        ([entry("ada", tokns=5)], "entries[0]"),
        ([{5: 5}], "entries[0]"),
        ([{"user_id": "ada", "model": SONNET}], "entries[0].tokens"),
        ([{}], "entries[0].user_id"),
    ],
)
async def test_bad_entries_are_refused(unreachable: UsageService, entries: Any, field: str) -> None:
    await refused(unreachable.record_many(entries), field)


async def test_bad_questions_are_refused_before_any_statement(unreachable: UsageService, clock: ManualClock) -> None:
    reads: list[tuple[Callable[..., Awaitable[object]], tuple[str, ...]]] = [
        (unreachable.total, ("ada",)),
        (unreachable.breakdown, ("ada",)),
        (unreachable.top_users, ()),
    ]
    for read, arguments in reads:
        for bad in BAD_TIMES:
            await refused(read(*arguments, since=bad), "since")
            await refused(read(*arguments, until=bad), "until")
        await refused(read(*arguments, since=clock.now, until=clock.now - MICROSECOND), "since")
    for bad in BAD_LABELS:
        await refused(unreachable.total(bad), "user_id")  # type: ignore[arg-type]  # that is what is refused
        await refused(unreachable.breakdown(bad), "user_id")  # type: ignore[arg-type]  # as above
        if bad is not None:
            await refused(unreachable.total("ada", model=bad), "model")  # type: ignore[arg-type]  # as above
        await refused(unreachable.breakdown("ada", tz=bad), "tz")  # type: ignore[arg-type]  # as above
        await refused(unreachable.breakdown("ada", by=bad), "by")  # type: ignore[arg-type]  # as above
    for bad in (0, 1001, -1, True, 1.0, "20", None):
        await refused(unreachable.top_users(limit=bad), "limit")  # type: ignore[arg-type]  # as above
    await refused(unreachable.breakdown("ada", fill=1), "fill")  # type: ignore[arg-type]  # as above


async def test_what_is_read_back_is_what_was_recorded(usage: UsageService, engine: Engine) -> None:
    """Text at its limits, and of any script, is an id, a user and a model."""
    user_id = await make_user(engine, id="ü" * 255)
    record = await usage.record(user_id, tokens=2**31 - 1, model="模" * 255, id="🎉" * 255)
    [row] = await engine.fetch("SELECT * FROM usage")
    assert tuple(row)[:4] == (record.id, user_id, 2**31 - 1, "模" * 255)
    assert from_db(row["created_at"]) == record.at
    assert await usage.total(user_id, model="模" * 255) == 2**31 - 1
