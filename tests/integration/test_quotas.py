"""Reservations: what is admitted, what is counted, when it is free again, and what a decision says."""

from __future__ import annotations

from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import asyncpg
import pytest
from racing import together, until_someone_waits, warm_up

from factories import make_mirror, make_subscription, make_usage, make_user
from kitrocket.clock import from_db, to_db
from kitrocket.engine import Engine
from kitrocket.errors import (
    InvalidInputError,
    NoBillingPeriodError,
    ReservationNotFoundError,
    TransactionError,
    UsageConflictError,
    UserNotFoundError,
    WindowNotExactError,
)
from kitrocket.models import Decision, Limit
from kitrocket.testing import ManualClock
from kitrocket.usage import UsageService
from kitrocket.users import UserService
from servers import Server

pytestmark = pytest.mark.asyncio(loop_scope="session")

MICROSECOND = timedelta(microseconds=1)
SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)
DAYS_30 = timedelta(days=30)
TTL = timedelta(seconds=600)
MODEL = "m"


@pytest.fixture
def usage(engine: Engine, clock: ManualClock) -> UsageService:
    return UsageService(engine, clock=clock)


async def rows(engine: Engine) -> list[tuple[Any, ...]]:
    found = await engine.fetch("SELECT id, user_id, tokens_used, model FROM usage ORDER BY id")
    return [tuple(row) for row in found]


async def reservations(engine: Engine) -> int:
    return int(await engine.fetchval("SELECT count(*) FROM kitrocket.usage_reservations"))


def numbers(decision: Decision) -> tuple[bool, int, int, int, int | None]:
    return decision.allowed, decision.used, decision.reserved, decision.remaining, decision.retry_after


async def test_what_fits_is_reserved_and_settled(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    user_id = await make_user(engine)
    first = await usage.reserve(user_id, tokens=600, model=MODEL, limit=1000)
    assert first.id is not None
    assert numbers(first) == (True, 0, 600, 400, 0)
    assert (first.limit, first.window, first.reset_at, first.crossed) == (1000, DAYS_30, None, [])
    refused = await usage.reserve(user_id, tokens=401, model=MODEL, limit=1000)
    assert numbers(refused) == (False, 0, 600, 400, 600)
    assert refused.id is None
    assert (await usage.reserve(user_id, tokens=400, model=MODEL, limit=1000)).allowed

    settled = await usage.settle(first.id, used=100)
    assert (settled.tokens, settled.overrun, settled.duplicate, settled.at) == (100, 0, False, clock.now)
    assert await rows(engine) == [(first.id, user_id, 100, MODEL)]
    assert await reservations(engine) == 1
    last = await usage.reserve(user_id, tokens=500, model=MODEL, limit=1000)
    assert numbers(last) == (True, 100, 900, 0, 0)
    assert last.reset_at == clock.now + DAYS_30 + MICROSECOND


async def test_settling_twice_counts_once(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    decision = await usage.reserve(user_id, tokens=10, model=MODEL, limit=1000)
    assert decision.id is not None
    first = await usage.settle(decision.id, used=25)
    assert (first.overrun, first.duplicate) == (15, False)
    second = await usage.settle(decision.id, used=25)
    assert second == first.model_copy(update={"duplicate": True, "overrun": 0})
    assert await usage.release(decision.id) is False
    assert await rows(engine) == [(decision.id, user_id, 25, MODEL)]


async def test_racing_settlements_count_once(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    await warm_up(engine)
    decision = await usage.reserve(user_id, tokens=10, model=MODEL, limit=1000, id="one")
    answers = await together([lambda: usage.settle("one", used=7)] * 10)
    assert sorted(answer.duplicate for answer in answers) == [False] + [True] * 9  # type: ignore[attr-defined]
    assert decision.id == "one"
    assert await rows(engine) == [("one", user_id, 7, MODEL)]
    assert await reservations(engine) == 0


async def test_what_is_released_is_free(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    decision = await usage.reserve(user_id, tokens=1000, model=MODEL, limit=1000)
    assert decision.id is not None
    assert await usage.release(decision.id) is True
    assert await usage.release(decision.id) is False
    assert (await usage.reserve(user_id, tokens=1000, model=MODEL, limit=1000)).allowed
    with pytest.raises(ReservationNotFoundError) as caught:
        await usage.settle(decision.id, used=1)
    assert caught.value.reservation_id == decision.id
    assert await rows(engine) == []


async def test_the_same_id_is_reserved_once(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    user_id, other = await make_user(engine), await make_user(engine)
    call = {"tokens": 700, "model": MODEL, "limit": 1000, "id": "mine"}
    first = await usage.reserve(user_id, **call)  # type: ignore[arg-type]  # a table of values
    clock.advance(TTL - SECOND)
    assert await usage.reserve(user_id, **call) == first  # type: ignore[arg-type]  # as above
    clock.advance(SECOND)
    assert (await usage.reserve(user_id, tokens=301, model=MODEL, limit=1000)).allowed is False
    for changed in ({"tokens": 1}, {"model": "another"}):
        with pytest.raises(UsageConflictError):
            await usage.reserve(user_id, **{**call, **changed})  # type: ignore[arg-type]  # as above
    with pytest.raises(UsageConflictError):
        await usage.reserve(other, **call)  # type: ignore[arg-type]  # as above
    await usage.settle("mine", used=1)
    with pytest.raises(UsageConflictError):
        await usage.reserve(user_id, **call)  # type: ignore[arg-type]  # as above


@pytest.mark.parametrize("rollup", [True, False])
async def test_a_leaked_reservation_is_free_at_its_time(engine: Engine, clock: ManualClock, rollup: bool) -> None:
    usage = UsageService(engine, clock=clock, rollup=rollup)
    user_id = await make_user(engine)
    assert (await usage.reserve(user_id, tokens=1000, model=MODEL, limit=1000)).allowed
    start = clock.now
    for late, free in ((-SECOND, False), (-MICROSECOND, False), (timedelta(0), True), (SECOND, True)):
        clock.now = start + TTL + late
        decision = await usage.reserve(user_id, tokens=1000, model=MODEL, limit=1000)
        assert decision.allowed is free
        assert decision.retry_after == (0 if free else 1)
        if decision.id is not None:
            await usage.release(decision.id)


async def test_a_row_counts_until_it_leaves_the_window(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    user_id = await make_user(engine)
    await make_usage(engine, user_id, tokens=1000, at=clock.now)
    start = clock.now
    for length in (timedelta(minutes=1), HOUR, DAYS_30):
        for late, free in ((-SECOND, False), (timedelta(0), False), (MICROSECOND, True), (SECOND, True)):
            clock.now = start + length + late
            decision = await usage.reserve(user_id, tokens=1, model=MODEL, limit=1000, window=length)
            assert decision.allowed is free
            assert decision.retry_after == {-SECOND: 2, timedelta(0): 1}.get(late, 0)
            assert decision.reset_at == (None if free else start + length + MICROSECOND)
            if decision.id is not None:
                await usage.release(decision.id)


async def test_every_limit_must_have_room(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    user_id = await make_user(engine)
    await make_usage(engine, user_id, tokens=90, at=clock.now - timedelta(seconds=30))
    await make_usage(engine, user_id, tokens=400, at=clock.now - timedelta(days=20))
    limits = [Limit(tokens=100, window=timedelta(minutes=1)), Limit(tokens=500), Limit(tokens=10_000, window="month")]
    call = {"model": MODEL, "limits": limits}
    first = await usage.reserve(user_id, tokens=5, **call)  # type: ignore[arg-type]  # a table of values
    assert (first.limit, *numbers(first)) == (100, True, 90, 5, 5, 0)
    both = await usage.reserve(user_id, tokens=11, **call)  # type: ignore[arg-type]  # as above
    assert (both.limit, *numbers(both)) == (500, False, 490, 5, 5, 864_001)
    minute = await usage.reserve(user_id, tokens=6, model=MODEL, limit=100, window=timedelta(minutes=1))
    assert numbers(minute) == (False, 90, 5, 5, 31)
    never = await usage.reserve(user_id, tokens=101, **call)  # type: ignore[arg-type]  # as above
    assert (never.limit, never.retry_after) == (100, None)
    assert await reservations(engine) == 1


async def test_the_month_ends_at_a_utc_midnight(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    clock.now = datetime(2026, 3, 31, 23, 59, 59, tzinfo=UTC)
    user_id = await make_user(engine)
    await make_usage(engine, user_id, tokens=5000, at=datetime(2026, 2, 28, 23, 59, 59, 999_999, tzinfo=UTC))
    await make_usage(engine, user_id, tokens=1000, at=datetime(2026, 3, 1, tzinfo=UTC))
    refused = await usage.reserve(user_id, tokens=1, model=MODEL, limit=1000, window="month")
    assert numbers(refused) == (False, 1000, 0, 0, 1)
    assert refused.reset_at == datetime(2026, 4, 1, tzinfo=UTC)
    clock.advance(SECOND - MICROSECOND)
    assert not (await usage.reserve(user_id, tokens=1, model=MODEL, limit=1000, window="month")).allowed
    clock.advance(MICROSECOND)
    assert (await usage.reserve(user_id, tokens=1, model=MODEL, limit=1000, window="month")).allowed


async def test_a_billing_period_is_that_of_the_subscription(
    usage: UsageService, engine: Engine, clock: ManualClock
) -> None:
    user_id, row_only, none = await make_user(engine), await make_user(engine), await make_user(engine)
    since, until = clock.now - timedelta(days=3), clock.now + timedelta(days=27)
    await make_mirror(engine, "sub_1", user_id=user_id)
    await engine.fetch(
        "UPDATE kitrocket.dodo_subscriptions SET previous_billing_date = $1, next_billing_date = $2",
        to_db(since),
        to_db(until),
    )
    await make_usage(engine, user_id, tokens=900, at=since - MICROSECOND)
    await make_usage(engine, user_id, tokens=100, at=since)
    call = {"model": MODEL, "limit": 1000, "window": "billing"}
    decision = await usage.reserve(user_id, tokens=901, **call)  # type: ignore[arg-type]  # a table of values
    assert numbers(decision) == (False, 100, 0, 900, (until - clock.now).total_seconds())
    assert decision.reset_at == until
    # A renewal that was not heard of yet opens no hole: calls count on until it is.
    clock.now = until + SECOND
    await make_usage(engine, user_id, tokens=900, at=clock.now)
    decision = await usage.reserve(user_id, tokens=1, **call)  # type: ignore[arg-type]  # as above
    assert (numbers(decision), decision.reset_at) == ((False, 1000, 0, 0, None), None)

    await make_subscription(engine, row_only, current_period_end=clock.now + HOUR)
    decision = await usage.reserve(row_only, tokens=1, **call)  # type: ignore[arg-type]  # as above
    assert decision.reset_at == clock.now + HOUR
    with pytest.raises(NoBillingPeriodError):
        await usage.reserve(none, tokens=1, **call)  # type: ignore[arg-type]  # as above


async def test_a_window_that_begins_in_a_pruned_day_is_refused(
    usage: UsageService, engine: Engine, clock: ManualClock
) -> None:
    user_id = await make_user(engine)
    await make_usage(engine, user_id, tokens=10, at=clock.now - timedelta(days=50))
    await usage.prune(clock.now - timedelta(days=40))
    assert (await usage.reserve(user_id, tokens=1, model=MODEL, limit=10)).allowed
    with pytest.raises(WindowNotExactError):
        await usage.reserve(user_id, tokens=1, model=MODEL, limit=100, window=timedelta(days=60))
    assert await reservations(engine) == 1


async def test_it_is_refused_inside_a_transaction(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    async with engine.transaction():
        with pytest.raises(TransactionError):
            await usage.reserve(user_id, tokens=1, model=MODEL, limit=10)
        with pytest.raises(TransactionError):
            await usage.expire_reservations()
        with pytest.raises(TransactionError):
            async with usage.meter(user_id, model=MODEL):
                raise AssertionError
    assert await reservations(engine) == 0


async def test_a_settlement_inside_a_transaction_is_part_of_it(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    await usage.reserve(user_id, tokens=9, model=MODEL, limit=10, id="a", thresholds=[50])
    with pytest.raises(ZeroDivisionError):
        async with engine.transaction():
            assert (await usage.settle("a", used=9)).crossed == []
            raise ZeroDivisionError
    assert (await rows(engine), await reservations(engine)) == ([], 1)
    async with engine.transaction():
        await usage.settle("a", used=9)
    assert (await rows(engine), await reservations(engine)) == ([("a", user_id, 9, MODEL)], 0)


async def test_a_role_whose_transactions_keep_one_snapshot_admits_no_more(
    engine: Engine, clock: ManualClock, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under REPEATABLE READ whoever waited for the lock would fail, or count what stood before."""
    await engine.fetch(f"ALTER DATABASE {database} SET default_transaction_isolation = 'repeatable read'")
    user_id = await make_user(engine)
    await engine.close()
    await engine.open()
    await warm_up(engine)

    async def once(unit: Any, **_options: object) -> object:
        return await unit()

    monkeypatch.setattr(engine, "retry", once)
    # A service each, as in a process each: one alone takes turns before it asks for the lock.
    services = [UsageService(engine, clock=clock) for _ in range(20)]
    answers = await together(
        [lambda one=one: one.reserve(user_id, tokens=10, model=MODEL, limit=50) for one in services]
    )
    assert sum(answer.allowed for answer in answers) == 5  # type: ignore[attr-defined]


async def test_a_deleted_user_leaves_nothing(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    user_id = await make_user(engine)
    await make_usage(engine, user_id, tokens=10)
    await usage.reserve(user_id, tokens=9, model=MODEL, limit=10, id="a", thresholds=[50])
    await usage.reserve(user_id, tokens=9, model=MODEL, limit=100, id="b", thresholds=[10])
    await UserService(engine, clock=clock).delete(user_id)
    for table in ("usage_quotas", "usage_reservations", "usage_alerts"):
        assert await engine.fetchval(f"SELECT count(*) FROM kitrocket.{table}") == 0
    with pytest.raises(UserNotFoundError) as caught:
        await usage.reserve(user_id, tokens=1, model=MODEL, limit=10)
    assert caught.value.user_id == user_id
    with pytest.raises(ReservationNotFoundError):
        await usage.settle("b", used=1)


async def test_users_deleted_under_their_calls_hold_nobody_up(engine: Engine, clock: ManualClock) -> None:
    usage, users = UsageService(engine, clock=clock), UserService(engine, clock=clock)
    await warm_up(engine)

    async def call(user_id: str) -> None:
        for _ in range(5):
            decision = await usage.reserve(user_id, tokens=1, model=MODEL, limit=100, thresholds=[1])
            assert decision.id is not None
            await usage.settle(decision.id, used=1)

    for _ in range(4):
        ids = [await make_user(engine) for _ in range(4)]
        calls = [lambda one=one: call(one) for one in ids] + [lambda one=one: users.delete(one) for one in ids]
        for error in await together(calls):
            assert (
                error is None
                or isinstance(error, UserNotFoundError | ReservationNotFoundError)
                or (type(error).__name__ == "DeletedUser")
            )
    assert await engine.fetchval("SELECT count(*) FROM usage") == 0
    assert await reservations(engine) == 0


async def test_nobody_holds_what_a_deletion_wants_while_waiting_for_it(
    usage: UsageService, engine: Engine, server: Server, database: str
) -> None:
    deleter = await asyncpg.connect(server.url(database, direct=True))
    try:
        for name in ("reserving", "settling"):
            user_id = await make_user(engine)
            await usage.reserve(user_id, tokens=1, model=MODEL, limit=100, id=name)
            call = (
                (lambda user_id=user_id: usage.reserve(user_id, tokens=1, model=MODEL, limit=100))
                if name == "reserving"
                else (lambda: usage.settle("settling", used=1))
            )
            answers: list[object] = []

            async def race(call: Any = call, answers: list[object] = answers) -> None:
                answers.extend(await together([call]))

            async with anyio.create_task_group() as group:
                await deleter.execute("BEGIN; SET LOCAL lock_timeout = '500ms'")
                await deleter.execute("SELECT FROM users WHERE id = $1 FOR UPDATE", user_id)
                group.start_soon(race)
                await until_someone_waits(engine)
                await deleter.execute("DELETE FROM users WHERE id = $1", user_id)
                await deleter.execute("COMMIT")
            assert isinstance(answers[0], UserNotFoundError)
    finally:
        await deleter.close()


# -- expiry -------------------------------------------------------------------------------------------------------


async def test_what_an_expired_reservation_had_used_becomes_its_row(
    usage: UsageService, engine: Engine, clock: ManualClock
) -> None:
    user_id = await make_user(engine)
    for name, used in (("a", 300), ("b", 0), ("c", 5)):
        await usage.reserve(user_id, tokens=500, model=MODEL, limit=10_000, id=name)
        await engine.fetch("UPDATE kitrocket.usage_reservations SET used = $1 WHERE id = $2", used, name)
    clock.advance(TTL - MICROSECOND)
    assert (await usage.expire_reservations()).recorded == 0
    clock.advance(MICROSECOND)
    expired_at = clock.now
    clock.advance(HOUR)
    result = await usage.expire_reservations()
    assert (result.renewed, result.recorded, result.deleted) == (0, 2, 0)
    assert await rows(engine) == [("a", user_id, 300, MODEL), ("c", user_id, 5, MODEL)]
    assert from_db(await engine.fetchval("SELECT created_at FROM usage WHERE id = 'a'")) == expired_at
    assert (await usage.expire_reservations()).recorded == 0

    late = await usage.settle("a", used=450)
    assert (late.tokens, late.duplicate) == (450, False)
    assert (await usage.settle("a", used=450)).duplicate
    assert not (await usage.settle("b", used=40)).duplicate
    less = await usage.settle("c", used=3)
    assert (less.tokens, less.duplicate) == (5, True)
    with pytest.raises(UsageConflictError):
        await usage.settle("a", used=460)
    assert await rows(engine) == [
        ("a", user_id, 300, MODEL),
        ("a.late", user_id, 150, MODEL),
        ("b", user_id, 40, MODEL),
        ("c", user_id, 5, MODEL),
    ]
    assert await usage.total(user_id) == 495


async def test_an_expired_reservation_with_nothing_used_is_remembered_for_a_day(
    usage: UsageService, engine: Engine, clock: ManualClock
) -> None:
    user_id = await make_user(engine)
    await usage.reserve(user_id, tokens=500, model=MODEL, limit=10_000, id="a")
    clock.advance(TTL + timedelta(days=1) - MICROSECOND)
    assert (await usage.expire_reservations()).deleted == 0
    clock.advance(MICROSECOND)
    assert (await usage.expire_reservations()).deleted == 1
    with pytest.raises(ReservationNotFoundError):
        await usage.settle("a", used=1)


async def test_a_reservation_found_long_after_is_recorded_where_rows_are_kept(
    usage: UsageService, engine: Engine, clock: ManualClock
) -> None:
    user_id = await make_user(engine)
    await usage.reserve(user_id, tokens=500, model=MODEL, limit=10_000, id="a")
    await engine.fetch("UPDATE kitrocket.usage_reservations SET used = 7")
    clock.advance(timedelta(days=90))
    await usage.prune(clock.now - timedelta(days=40))
    assert (await usage.expire_reservations()).recorded == 1
    assert await usage.total(user_id, since=clock.now - timedelta(days=1)) == 7


async def test_settlement_and_expiry_race_to_one_total(engine: Engine, clock: ManualClock) -> None:
    usage = UsageService(engine, clock=clock)
    user_id = await make_user(engine)
    await warm_up(engine)
    names = [f"{number:03}" for number in range(40)]
    for name in names:
        await usage.reserve(user_id, tokens=10, model=MODEL, limit=10_000, id=name)
    await engine.fetch("UPDATE kitrocket.usage_reservations SET used = 4")
    clock.advance(TTL)
    calls = [lambda name=name: usage.settle(name, used=9) for name in names] + [usage.expire_reservations] * 8
    assert [answer for answer in await together(calls) if isinstance(answer, Exception)] == []
    assert await usage.total(user_id) == 40 * 9
    assert await reservations(engine) == 0


# -- thresholds ---------------------------------------------------------------------------------------------------


async def test_each_threshold_is_told_once(usage: UsageService, engine: Engine) -> None:
    user_id = await make_user(engine)
    await warm_up(engine)
    told: list[tuple[int, int]] = []
    broken: list[int] = []

    @usage.on_threshold
    async def tell(alert: Any) -> None:
        told.append((alert.limit, alert.percent))

    @usage.on_threshold
    def fail(alert: Any) -> None:
        broken.append(alert.percent)
        raise ZeroDivisionError

    async def call() -> list[int]:
        decision = await usage.reserve(user_id, tokens=20, model=MODEL, limit=1000, thresholds=(100, 50, 80))
        assert decision.id is not None
        return [*decision.crossed, *(await usage.settle(decision.id, used=20)).crossed]

    answers = await together([call] * 50)
    assert sorted(percent for answer in answers for percent in answer) == [50, 80, 100]  # type: ignore[attr-defined]
    assert sorted(told) == [(1000, 50), (1000, 80), (1000, 100)]
    assert sorted(broken) == [50, 80, 100]


async def test_a_sliding_window_fires_again_ten_points_lower(
    usage: UsageService, engine: Engine, clock: ManualClock
) -> None:
    user_id = await make_user(engine)
    start = clock.now
    for number, tokens in enumerate((1, 10, 69)):
        await make_usage(engine, user_id, tokens=tokens, at=start + number * SECOND)

    async def crossed(now: datetime) -> list[int]:
        clock.now = now
        decision = await usage.reserve(user_id, tokens=0, model=MODEL, limit=100, window=HOUR, thresholds=[80])
        return decision.crossed

    assert await crossed(start + HOUR) == [80]
    assert await crossed(start + HOUR) == []
    await make_usage(engine, user_id, tokens=1, at=start + HOUR)
    # 80 - 1, 80 - 1 - 10 + 11: between the threshold and ten points below it nothing changes.
    assert await crossed(start + HOUR + MICROSECOND) == []
    await make_usage(engine, user_id, tokens=0, at=start + HOUR)
    assert await crossed(start + HOUR + SECOND) == []
    assert await engine.fetchval("SELECT count(*) FROM kitrocket.usage_alerts") == 1
    # 70 is not below 70; 69 is.
    assert await crossed(start + HOUR + SECOND + MICROSECOND) == []
    assert await engine.fetchval("SELECT count(*) FROM kitrocket.usage_alerts") == 1
    await engine.fetch("DELETE FROM usage WHERE tokens_used = 1")
    assert await crossed(start + HOUR + SECOND + MICROSECOND) == []
    assert await engine.fetchval("SELECT count(*) FROM kitrocket.usage_alerts") == 0
    await make_usage(engine, user_id, tokens=11, at=clock.now)
    assert await crossed(clock.now) == [80]


async def test_a_period_fires_each_threshold_once(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    user_id = await make_user(engine)
    months = [datetime(2026, 3 + number, 10, tzinfo=UTC) for number in range(6)]
    for clock.now in months:
        await make_usage(engine, user_id, id=f"{clock.now:%m}", tokens=90, at=clock.now)
        for expected in ([80], []):
            decision = await usage.reserve(
                user_id, tokens=1, model=MODEL, limit=100, window="month", thresholds=[80, 95]
            )
            assert decision.crossed == expected
        await engine.fetch("UPDATE usage SET tokens_used = 0 WHERE id = $1", f"{clock.now:%m}")
        await usage.reserve(user_id, tokens=1, model=MODEL, limit=100, window="month", thresholds=[80])
        await engine.fetch("UPDATE usage SET tokens_used = 90 WHERE id = $1", f"{clock.now:%m}")
        decision = await usage.reserve(user_id, tokens=1, model=MODEL, limit=100, window="month", thresholds=[80])
        assert decision.crossed == []
    assert await engine.fetchval("SELECT count(*) FROM kitrocket.usage_alerts") == 4, "older than 100 days are gone"


# -- bad input ----------------------------------------------------------------------------------------------------

BAD_LABELS: list[object] = ["", "  \t", "a\0b", "\ud800", "x" * 256, "x" * 1_000_000, None, 5, b"x", ["x"]]
BAD_TOKENS: list[object] = [-1, 2**31, 2**70, 1.0, float("nan"), "1", True, None, [1]]
BAD_WINDOWS: list[object] = ["", "year", 30, None, timedelta(0), SECOND - MICROSECOND, timedelta(days=3661), -HOUR]
BAD_THRESHOLDS: list[object] = [None, 80, "80", [0], [1001], [80.0], [True], ["80"], range(1, 18)]
RESERVE: dict[str, list[object]] = {
    "user_id": BAD_LABELS,
    "model": BAD_LABELS,
    "id": [*(one for one in BAD_LABELS if one is not None), "x" * 251],
    "limit": [-1, 10**15 + 1, 1.0, True, "1", None],
    "window": BAD_WINDOWS,
    "limits": [None, 5, "month", [Limit(tokens=1)] * 17],
    "ttl": [None, 600, timedelta(0), -TTL, SECOND - MICROSECOND, timedelta(days=1, seconds=1)],
    "thresholds": BAD_THRESHOLDS,
}


async def refused(work: Awaitable[object], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        await work
    assert caught.value.field.startswith(field)
    assert caught.value.problem
    assert caught.value.expected
    assert len(str(caught.value)) < 300


async def metered(usage: UsageService, **values: Any) -> None:
    user_id = values.pop("user_id")
    async with usage.meter(user_id, **values):
        raise AssertionError


async def test_bad_values_are_refused_before_any_statement(clock: ManualClock) -> None:
    usage = UsageService(Engine("postgres://nobody@127.0.0.1:1/none?sslmode=disable"), clock=clock)
    good: dict[str, Any] = {"user_id": "ada", "model": MODEL, "limit": 10}
    for field, values in RESERVE.items():
        for bad in values:
            call = {**good, field: bad}
            await refused(usage.reserve(call.pop("user_id"), tokens=1, **call), field)
            if not (field == "limit" and bad is None):
                await refused(metered(usage, **{**good, "reserve": 1, field: bad}), field)
    for bad in BAD_TOKENS:
        await refused(usage.reserve("ada", tokens=bad, model=MODEL, limit=10), "tokens")  # type: ignore[arg-type]
        await refused(metered(usage, **good, reserve=bad), "reserve")
        await refused(usage.settle("a", used=bad), "used")  # type: ignore[arg-type]  # that is what is refused
    for bad in RESERVE["id"]:
        await refused(usage.settle(bad, used=1), "id")  # type: ignore[arg-type]  # as above
        await refused(usage.release(bad), "id")  # type: ignore[arg-type]  # as above
    for limit in (Limit(tokens=-1), Limit(tokens=1, window=timedelta(0)), "month"):
        await refused(usage.reserve("ada", tokens=1, model=MODEL, limits=[limit]), "limits[0]")  # type: ignore[list-item]
    with pytest.raises(ValueError):
        Limit(tokens="10")  # type: ignore[arg-type]  # as above
