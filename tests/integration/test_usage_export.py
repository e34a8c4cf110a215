"""Calls reach a provider with Dodo's manners, by its own SDK over HTTP: each once, whatever fails."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import pytest_asyncio
from starlette.responses import JSONResponse, Response

from dodo_server import DodoServer
from factories import AT, make_subscription, make_usage, make_user
from kitrocket import KitRocket, Settings
from kitrocket.clock import to_db
from kitrocket.engine import Engine
from kitrocket.errors import ConfigurationError, InvalidInputError, ProviderError, TransactionError
from kitrocket.migrations import check_outbox, fill_outbox, is_outbox_filled
from kitrocket.testing import ManualClock
from kitrocket.usage import UsageService
from kitrocket.users import UserService

pytestmark = pytest.mark.asyncio(loop_scope="session")

MODEL = "claude-sonnet-4-20250514"
SECOND, MINUTE = timedelta(seconds=1), timedelta(minutes=1)
LEASE = 60 * SECOND


@dataclass
class Desk:
    engine: Engine
    clock: ManualClock
    dodo: DodoServer

    def open(self, **options: Any) -> UsageService:
        options = {"export_event": "tokens", "api_key": "key", "base_url": self.dodo.url} | options
        return UsageService(self.engine, clock=self.clock, **options)

    async def customer(self, customer_id: str = "cus_1") -> str:
        user_id = await make_user(self.engine)
        await make_subscription(self.engine, user_id, dodo_customer_id=customer_id)
        return user_id

    async def insert(self, user_id: str, count: int, prefix: str = "call") -> list[str]:
        """Record calls in one statement of somebody else's."""
        rows = await self.engine.fetch(
            "INSERT INTO usage (id, user_id, tokens_used, model, created_at)"
            " SELECT $2 || lpad(n::text, 5, '0'), $1, n, $3, $4 FROM generate_series(1, $5::int) AS n RETURNING id",
            user_id,
            prefix,
            MODEL,
            to_db(self.clock()),
            count,
        )
        return [row["id"] for row in rows]

    async def outbox(self) -> list[tuple[Any, ...]]:
        rows = await self.engine.fetch("SELECT usage_id, state, error FROM kitrocket.usage_outbox ORDER BY usage_id")
        return [tuple(row) for row in rows]

    def billed_once(self, ids: Sequence[str]) -> bool:
        """Whether the provider has exactly these; it counts a known id never again."""
        return sorted(self.dodo.events) == sorted(ids)


@pytest_asyncio.fixture
async def desk(engine: Engine, clock: ManualClock, dodo: DodoServer) -> Desk:
    dodo.clock = clock
    await fill_outbox(engine, on=True)
    return Desk(engine, clock, dodo)


async def test_a_call_is_sent_as_an_event_with_its_own_id(desk: Desk) -> None:
    user_id = await desk.customer()
    usage = desk.open()
    record = await usage.record(user_id, tokens=1834, model=MODEL)
    result = await usage.export()
    assert (result.sent, result.requests, result.more, result.retry_at) == (1, 1, False, None)
    event = desk.dodo.events[record.id]
    assert event["customer_id"] == "cus_1"
    assert event["event_name"] == "tokens"
    assert event["timestamp"] == "2026-03-01T12:00:00+00:00"
    assert event["metadata"] == {"tokens": 1834, "model": MODEL}
    assert await desk.outbox() == []
    assert (await usage.export()).requests == 0
    # A repetition is no new row, and so no new event.
    await usage.record(user_id, tokens=1834, model=MODEL, id=record.id)
    assert (await usage.export()).requests == 0


async def test_only_what_is_written_while_it_is_on_is_sent_whoever_writes(engine: Engine) -> None:
    async def outbox() -> list[str]:
        return [row[0] for row in await engine.fetch("SELECT usage_id FROM kitrocket.usage_outbox ORDER BY 1")]

    user_id = await make_user(engine)
    assert not await is_outbox_filled(engine)
    with pytest.raises(ConfigurationError, match="kitrocket db migrate"):
        await check_outbox(engine)
    await make_usage(engine, user_id, id="before")
    assert await fill_outbox(engine, on=True)
    assert not await fill_outbox(engine, on=True)
    await check_outbox(engine)
    await make_usage(engine, user_id, id="a")
    async with engine.direct() as connection:
        await connection.copy_records_to_table(
            "usage", records=[("b", user_id, 1, "m", to_db(AT)), ("c", user_id, 1, "m", to_db(AT))]
        )
        await connection.execute(
            "CREATE ROLE kitrocket_test_clerk; GRANT USAGE ON SCHEMA public TO kitrocket_test_clerk;"
            "GRANT INSERT ON usage TO kitrocket_test_clerk; SET ROLE kitrocket_test_clerk"
        )
        try:
            await connection.execute(
                f"INSERT INTO usage (id, user_id, tokens_used, model) VALUES ('d', '{user_id}', 1, 'm')"
            )
        finally:
            await connection.execute("RESET ROLE; DROP OWNED BY kitrocket_test_clerk; DROP ROLE kitrocket_test_clerk")
    await engine.fetch("INSERT INTO usage SELECT id, user_id, 5, 'm' FROM usage ON CONFLICT DO NOTHING")
    assert await outbox() == ["a", "b", "c", "d"]
    assert await fill_outbox(engine, on=False)
    await make_usage(engine, user_id, id="after")
    assert await outbox() == ["a", "b", "c", "d"]
    # With the user goes what was to be billed.
    await engine.fetch("DELETE FROM users")
    assert await outbox() == []


async def test_an_outage_of_three_hours_leaves_nothing_unbilled_and_bills_nothing_twice(desk: Desk) -> None:
    user_id = await desk.customer()
    usage = desk.open()
    bad = [
        JSONResponse({}, 500),
        JSONResponse({}, 429, {"retry-after": "90"}),
        JSONResponse({}, 503),
    ]
    began = desk.clock()

    async def down(path: str, number: int) -> Response | None:
        return bad[number % 3] if desk.clock() < began + timedelta(hours=3) else None

    desk.dodo.trouble = down
    ids: list[str] = []
    for minute in range(0, 186, 6):
        ids += await desk.insert(user_id, 50, f"m{minute:03}-")
        result = await usage.export()
        if minute < 180:
            assert result.sent == 0
            assert (result.requests == 0) == (result.postponed == 0)
        desk.clock.advance(6 * MINUTE)
    backlog = await usage.export_backlog()
    while backlog.pending:
        await usage.export()
        desk.clock.advance(MINUTE)
        backlog = await usage.export_backlog()
    assert desk.billed_once(ids)
    assert max(desk.dodo.calls) <= 1000
    late = [event for event in desk.dodo.events.values() if "recorded_at" in event["metadata"]]
    assert len(late) >= 50 * 20
    assert desk.dodo.events["m000-00001"]["metadata"]["recorded_at"] == began.isoformat()


async def test_rows_sent_by_who_died_before_deleting_them_are_billed_once(desk: Desk) -> None:
    ids = await desk.insert(await desk.customer(), 50)
    accepted, over = anyio.Event(), anyio.Event()

    async def hang() -> None:
        accepted.set()
        await over.wait()

    desk.dodo.aftermath = hang
    async with anyio.create_task_group() as group:
        group.start_soon(desk.open().export)
        await accepted.wait()
        group.cancel_scope.cancel()
    over.set()
    assert len(await desk.outbox()) == 50
    assert desk.billed_once(ids)

    async def crash() -> Response:
        return JSONResponse({}, 502)

    # The same on the provider's side: it has them and says that it failed.
    desk.dodo.aftermath = crash
    usage = desk.open()
    for wait, requests in ((LEASE - SECOND, 0), (SECOND, 1)):
        desk.clock.advance(wait)
        assert (await usage.export()).requests == requests
    desk.dodo.aftermath = None
    desk.clock.advance(LEASE)
    assert (await usage.export()).sent == 50
    assert await desk.outbox() == []
    assert desk.billed_once(ids)
    assert set(desk.dodo.sent.values()) == {3}


async def test_one_bad_row_in_a_thousand_is_parked_alone(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    ids = await desk.insert(await desk.customer(), 1001)
    desk.dodo.dislikes = lambda event: event["metadata"]["tokens"] == 617
    usage = desk.open()
    seen: list[int] = []
    result = await usage.export(on_progress=seen.append)
    assert (result.sent, result.parked) == (1000, 1)
    assert result.requests <= 2 * 10 + 2
    assert seen[-1] == 1001
    bad = ids[616]
    assert await desk.outbox() == [(bad, "parked", "HTTP 422")]
    [parked] = await usage.parked_exports()
    assert (parked.usage_id, parked.at, parked.attempts, parked.error) == (bad, AT, 1, "HTTP 422")
    assert bad in caplog.text
    assert (await usage.export()).requests == 0
    desk.dodo.dislikes = lambda _event: False
    assert await usage.retry_parked_exports() == 1
    assert (await usage.export()).sent == 1
    assert desk.billed_once(ids)


async def test_who_exports_at_the_same_time_gets_other_rows_and_meets_no_lock(desk: Desk) -> None:
    ids = await desk.insert(await desk.customer(), 1500)
    other = await desk.customer("cus_2")
    ids += await desk.insert(other, 10, "other")
    arrived, go_on = anyio.Event(), anyio.Event()

    async def hold(path: str, number: int) -> None:
        if number == 1:
            arrived.set()
            await go_on.wait()

    desk.dodo.trouble = hold
    async with anyio.create_task_group() as group:
        group.start_soon(desk.open().export)
        await arrived.wait()
        # While the provider takes its time: no transaction is open, and no row that was claimed is locked.
        assert await desk.engine.fetch(
            "SELECT count(*) AS n FROM kitrocket.usage_outbox WHERE usage_id IN"
            " (SELECT usage_id FROM kitrocket.usage_outbox FOR UPDATE SKIP LOCKED)"
        ) == [(1510,)]
        result = await desk.open().export()
        assert result.sent == 510
        go_on.set()
    assert desk.billed_once(ids)
    assert set(desk.dodo.sent.values()) == {1}
    assert await desk.outbox() == []


async def test_many_exporters_share_the_work(desk: Desk) -> None:
    ids = await desk.insert(await desk.customer(), 5000)
    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(desk.open().export)
    assert desk.billed_once(ids)
    assert set(desk.dodo.sent.values()) == {1}
    assert await desk.outbox() == []


async def test_what_an_exporter_says_after_its_lease_does_not_count(desk: Desk) -> None:
    ids = await desk.insert(await desk.customer(), 1)
    arrived, go_on = anyio.Event(), anyio.Event()

    async def refuse_late(path: str, number: int) -> Response | None:
        if number > 1:
            return JSONResponse({}, 503)
        arrived.set()
        await go_on.wait()
        return JSONResponse({}, 422)

    desk.dodo.trouble = refuse_late
    async with anyio.create_task_group() as group:
        group.start_soon(desk.open().export)
        await arrived.wait()
        desk.clock.advance(LEASE)
        assert (await desk.open().export()).postponed == 1
        go_on.set()
    assert await desk.outbox() == [(ids[0], "pending", "HTTP 503")]


async def test_pauses_grow_and_the_provider_may_ask_for_more(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await desk.insert(await desk.customer(), 3)
    usage = desk.open()
    answers: list[Response | None] = [JSONResponse({}, status) for status in (500, 503, 429, 500, 500, 500, 500)]
    answers += [JSONResponse({}, 429, {"retry-after": "300"}), None]

    async def trouble(path: str, number: int) -> Response | None:
        return answers[number - 1]

    desk.dodo.trouble = trouble
    pauses = []
    for _ in answers[:-1]:
        result = await usage.export()
        assert (result.sent, result.postponed, result.requests) == (0, 3, 1)
        assert result.retry_at is not None
        pauses.append((result.retry_at - desk.clock()).total_seconds())
        desk.clock.now = result.retry_at - SECOND
        assert (await usage.export()).requests == 0
        desk.clock.advance(SECOND)
    assert all(min(2**n, 60) / 2 <= pause <= min(2**n, 60) for n, pause in enumerate(pauses[:-1], start=1))
    assert pauses[-1] == 300
    assert (await usage.export()).sent == 3
    assert "usage is not exported for 300 s: HTTP 429" in caplog.text

    # No answer at all: the port is closed.
    await desk.insert(await desk.customer(), 1, "silence")
    result = await desk.open(base_url="http://127.0.0.1:9").export()
    assert result.postponed == 1
    assert (await desk.outbox())[0][2] == "no answer"


@pytest.mark.parametrize("status", [401, 403])
async def test_a_wrong_key_stops_it_and_loses_nothing(desk: Desk, status: int) -> None:
    ids = await desk.insert(await desk.customer(), 2)

    async def trouble(path: str, number: int) -> Response:
        return JSONResponse({}, status)

    desk.dodo.trouble = trouble
    usage = desk.open()
    with pytest.raises(ProviderError, match="DODO_PAYMENTS_API_KEY"):
        await usage.export()
    assert (await usage.export()).requests == 0
    desk.dodo.trouble = None
    desk.clock.advance(LEASE)
    assert (await usage.export()).sent == 2
    assert desk.billed_once(ids)


async def test_users_without_a_customer_deleted_calls_and_calls_ahead_wait_or_go(desk: Desk) -> None:
    lead = await make_user(desk.engine)
    usage = desk.open()
    ids = await desk.insert(lead, 2)
    desk.clock.advance(SECOND)
    result = await usage.export()
    assert (result.waiting, result.requests) == (2, 0)
    backlog = await usage.export_backlog()
    assert (backlog.pending, backlog.waiting, backlog.parked, backlog.oldest_at) == (2, 2, 0, None)
    await desk.engine.fetch("DELETE FROM usage WHERE id = $1", ids[0])
    # A customer of before is as good as none only where there is a live one.
    await make_subscription(desk.engine, lead, status="cancelled", dodo_customer_id="cus_old", at=AT + MINUTE)
    await make_subscription(desk.engine, lead, dodo_customer_id="cus_new")
    for wait, sent in ((5 * MINUTE - SECOND, 0), (SECOND, 1)):
        desk.clock.advance(wait)
        result = await usage.export()
        assert (result.sent, result.dropped) == (sent, sent)
    assert desk.dodo.events[ids[1]]["customer_id"] == "cus_new"
    ahead = await usage.record(lead, tokens=1, model=MODEL, at=desk.clock() + 5 * MINUTE)
    for wait, sent in ((5 * MINUTE - SECOND, 0), (SECOND, 1)):
        desk.clock.advance(wait)
        assert (await usage.export()).sent == sent
    assert "recorded_at" not in desk.dodo.events[ahead.id]["metadata"]


async def test_late_calls_are_dated_anew_or_parked(desk: Desk) -> None:
    user_id = await desk.customer()
    fresh, late = desk.clock() - 55 * MINUTE, desk.clock() - 55 * MINUTE - timedelta(microseconds=1)
    await make_usage(desk.engine, user_id, id="fresh", at=fresh)
    await make_usage(desk.engine, user_id, id="late", at=late)
    usage = desk.open(export_late="park")
    assert (await usage.export_backlog()).oldest_at == late
    result = await usage.export()
    assert (result.sent, result.parked) == (1, 1)
    assert await desk.outbox() == [("late", "parked", "late")]
    assert desk.dodo.events["fresh"]["timestamp"] == fresh.isoformat()
    usage = desk.open()
    await usage.retry_parked_exports()
    assert (await usage.export()).sent == 1
    assert desk.dodo.events["late"]["timestamp"] == desk.clock().isoformat()
    assert desk.dodo.events["late"]["metadata"]["recorded_at"] == late.isoformat()


async def test_pruning_leaves_what_is_still_to_be_sent(desk: Desk) -> None:
    user_id = await desk.customer()
    await make_usage(desk.engine, user_id, id="unsent")
    await desk.engine.fetch("INSERT INTO usage SELECT 'sent', user_id, 1, model, created_at FROM usage")
    await desk.engine.fetch("DELETE FROM kitrocket.usage_outbox WHERE usage_id = 'sent'")
    desk.clock.advance(timedelta(days=40))
    usage = desk.open()
    assert await usage.count_prunable(desk.clock() - timedelta(days=5)) == 1
    assert (await usage.prune(desk.clock() - timedelta(days=5))).deleted == 1
    assert (await usage.export()).sent == 1
    assert (await usage.prune(desk.clock() - timedelta(days=5))).deleted == 1


async def test_it_refuses_what_cannot_work(desk: Desk) -> None:
    usage = desk.open()
    async with desk.engine.transaction():
        with pytest.raises(TransactionError):
            await usage.export()
    for options in ({"export_event": None}, {"api_key": None}):
        with pytest.raises(ConfigurationError, match="KITROCKET_USAGE_EXPORT_EVENT"):
            await desk.open(**options).export()
    with pytest.raises(InvalidInputError):
        await usage.export(budget=1)  # type: ignore[arg-type]  # bad input is the subject
    for limit in (0, 10_001, True):
        with pytest.raises(InvalidInputError):
            await usage.parked_exports(limit=limit)


async def test_a_kit_exports_in_the_background_and_wants_the_outbox_filled(
    desk: Desk, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(
        usage_export_event="tokens",
        usage_export_interval=timedelta(milliseconds=10),
        dodo_payments_api_key="key",  # type: ignore[arg-type]  # pydantic makes the secret
        dodo_payments_base_url=desk.dodo.url,
    )
    user_id = await desk.customer()
    accepted = anyio.Event()

    async def told() -> None:
        accepted.set()

    desk.dodo.aftermath = told
    caplog.set_level(logging.ERROR)
    async with KitRocket(settings, engine=desk.engine, clock=desk.clock) as kit:
        record = await kit.usage.record(user_id, tokens=5, model=MODEL)
        with anyio.fail_after(30):
            await accepted.wait()
    assert desk.billed_once([record.id])
    assert caplog.text == ""
    await fill_outbox(desk.engine, on=False)
    with pytest.raises(ConfigurationError, match="kitrocket db migrate"):
        async with KitRocket(settings, engine=desk.engine, clock=desk.clock):
            pass


async def test_writers_deletions_and_exporters_at_once_never_deadlock(desk: Desk) -> None:
    users = [await desk.customer(f"cus_{number}") for number in range(8)]
    usage, service = desk.open(), UserService(desk.engine, clock=desk.clock)
    writing = True

    async def write(number: int) -> None:
        for turn in range(12):
            rows = [
                {"user_id": user_id, "tokens": 1, "model": MODEL, "id": f"{turn}-{copy}-{user_id}"}
                for copy in range(5)
                for user_id in (users[:4] if number % 2 else users[3::-1])
            ]
            await usage.record_many(rows)

    async def delete() -> None:
        for user_id in users[4:]:
            await desk.insert(user_id, 40, user_id)
            await anyio.lowlevel.checkpoint()
            await service.delete(user_id)

    async def export(one: UsageService) -> None:
        while writing:
            await one.export()

    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(export, desk.open())
        async with anyio.create_task_group() as writers:
            for number in range(4):
                writers.start_soon(write, number)
            writers.start_soon(delete)
        writing = False
    await usage.export()
    kept = [row[0] for row in await desk.engine.fetch("SELECT id FROM usage")]
    assert len(kept) == 12 * 5 * 4
    assert set(kept) <= set(desk.dodo.events)
    assert await desk.outbox() == []
    assert await desk.engine.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == 0
