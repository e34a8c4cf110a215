"""Hooks: told after the commit, at least once, again when they fail; never inside the transaction."""

from __future__ import annotations

from datetime import UTC, timedelta
from typing import Any

import anyio
import pytest

from delivering import DAY, PAYLOADS, SECOND, SUBSCRIPTION, USER, Desk, at, event, with_user
from kitrocket import BillingEvent, KitRocket, Settings
from kitrocket.engine import Engine
from kitrocket.errors import InvalidInputError
from kitrocket.testing import ManualClock

pytestmark = pytest.mark.asyncio


@pytest.fixture
def desk(engine: Engine, clock: ManualClock) -> Desk:
    return Desk(engine, clock)


def listen(desk: Desk, *types: str) -> list[BillingEvent]:
    told: list[BillingEvent] = []

    @desk.service.on(*types)
    async def note(event: BillingEvent) -> None:
        assert not desk.engine.in_transaction()
        told.append(event)

    return told


async def hook_states(desk: Desk) -> dict[str, tuple[str, int]]:
    return {row["webhook_id"]: (row["hook_state"], row["hook_attempts"]) for row in await desk.table("webhook_events")}


async def test_a_hook_is_told_once_after_the_commit(desk: Desk) -> None:
    await with_user(desk)
    told = listen(desk, "subscription.*")
    await desk.deliver(PAYLOADS["02"], "msg_1")
    await desk.deliver(PAYLOADS["02"], "msg_1")
    await desk.deliver(PAYLOADS["06"], "msg_2")
    assert told == []
    assert await desk.service.run_hooks() == 1
    assert await desk.service.run_hooks() == 0
    (one,) = told
    assert (one.webhook_id, one.type, one.user_id, one.subscription_id) == (
        "msg_1",
        "subscription.renewed",
        USER,
        SUBSCRIPTION,
    )
    assert (one.outcome, one.data) == ("applied", PAYLOADS["02"]["data"])
    assert "maya" not in repr(one)
    assert await hook_states(desk) == {"msg_1": ("done", 1), "msg_2": ("none", 0)}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", ["applied", "stale", "ignored"]),
        ("subscription.*", ["applied", "stale"]),
        ("subscription.on_hold", ["applied"]),
        ("license_key.*", ["ignored"]),
        ("subscription.active", []),
    ],
)
async def test_types_are_matched_whole_by_family_or_all(desk: Desk, pattern: str, expected: list[str]) -> None:
    await with_user(desk)
    told = listen(desk, pattern)
    for number in ("15", "04", "12"):
        await desk.deliver(PAYLOADS[number])
    await desk.service.run_hooks()
    assert sorted(one.outcome for one in told) == sorted(expected)


async def test_a_parked_event_is_told_when_it_is_applied(desk: Desk) -> None:
    told = listen(desk, "*")
    await desk.deliver(PAYLOADS["02"])
    assert await desk.service.run_hooks() == 0
    await with_user(desk)
    assert (await desk.service.retry_parked()).told == 1
    assert [one.user_id for one in told] == [USER]


async def test_a_failing_hook_is_told_again_until_it_is_dead_and_replay_tells_it_once_more(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    await with_user(desk)
    failing = True
    told: list[str] = []

    @desk.service.on("subscription.renewed")
    async def fails(event: BillingEvent) -> None:
        told.append(event.webhook_id)
        if failing:
            raise ValueError(str(event.data))

    await desk.deliver(PAYLOADS["02"], "msg_1")
    pauses: list[timedelta] = []
    for _ in range(8):
        await desk.service.run_hooks()
        (stored,) = await desk.table("webhook_events")
        if stored["hook_state"] == "pending":
            due = stored["hook_next_at"].replace(tzinfo=UTC)
            pauses.append(due - desk.clock.now)
            desk.clock.now = due - SECOND
            await desk.service.run_hooks()
            desk.clock.now = due
    assert pauses == [timedelta(seconds=60 * 4**n) for n in range(5)] + [timedelta(hours=6)] * 2
    assert len(told) == 8
    assert (stored["hook_state"], stored["state"]) == ("dead", "applied")
    assert "ValueError" in caplog.text
    assert "maya" not in caplog.text

    desk.clock.advance(DAY)
    assert await desk.service.run_hooks() == 0
    failing = False
    await desk.service.replay("msg_1")
    assert await desk.service.run_hooks() == 0
    await desk.service.replay("msg_1", hooks=True)
    assert await desk.service.run_hooks() == 1
    assert await hook_states(desk) == {"msg_1": ("done", 1)}


async def test_a_process_without_hooks_has_them_told_in_another(desk: Desk) -> None:
    await with_user(desk)
    told = listen(desk, "subscription.*")
    await desk.deliver(PAYLOADS["02"], "msg_1")
    assert await desk.service.run_hooks() == 1
    shell = desk.open()
    await shell.replay("msg_1", hooks=True)
    assert await shell.run_hooks() == 0
    assert await hook_states(desk) == {"msg_1": ("pending", 0)}
    assert await desk.service.run_hooks() == 1
    assert [one.webhook_id for one in told] == ["msg_1", "msg_1"]


@pytest.mark.parametrize(("offset", "again"), [(-SECOND, 0), (0 * SECOND, 1), (SECOND, 1)])
async def test_a_hook_whose_process_died_is_told_again_after_its_lease(
    desk: Desk, offset: timedelta, again: int
) -> None:
    await with_user(desk)

    @desk.service.on("*")
    async def dies(_event: BillingEvent) -> None:
        raise KeyboardInterrupt

    await desk.deliver(PAYLOADS["02"])
    with pytest.raises(KeyboardInterrupt):
        await desk.service.run_hooks()
    desk.service = desk.open()
    told = listen(desk, "*")
    desk.clock.advance(timedelta(minutes=5) + offset)
    assert await desk.service.run_hooks() == again
    assert len(told) == again


async def test_many_processes_tell_each_event_once(desk: Desk) -> None:
    await with_user(desk)
    services = [desk.open() for _ in range(4)]
    told: list[str] = []

    async def note(event: BillingEvent) -> None:
        told.append(event.webhook_id)

    for service in services:
        service.on("*")(note)
    desk.service = services[0]
    for number in range(40):
        await desk.deliver(PAYLOADS["12"], f"msg_{number:02}")
    async with anyio.create_task_group() as group:
        for service in services:
            group.start_soon(service.run_hooks)
    assert sorted(told) == [f"msg_{number:02}" for number in range(40)]


async def test_an_incident_is_told(desk: Desk) -> None:
    await with_user(desk)
    desk.clock.now = at("2026-03-17")
    told = listen(desk, "incident.double_billing")
    await desk.deliver(PAYLOADS["02"])
    await desk.deliver(event("02", subscription_id="sub_2"))
    await desk.service.run_hooks()
    (one,) = told
    assert (one.type, one.user_id, one.at, one.outcome) == ("incident.double_billing", USER, desk.clock.now, "opened")
    assert one.data == {"subscriptions": ["sub_2", SUBSCRIPTION]}


async def test_an_open_kit_tells_its_hooks_by_itself(engine: Engine, clock: ManualClock) -> None:
    desk = Desk(engine, clock)
    async with KitRocket(Settings(), engine=engine, clock=clock) as kit:
        desk.service = kit.subscriptions
        told = anyio.Event()

        @kit.subscriptions.on("license_key.created")
        async def note(_event: BillingEvent) -> None:
            told.set()

        desk.service._verifier = desk.open()._verifier  # the kit has no key, and its settings no need of one
        await desk.deliver(PAYLOADS["12"])
        with anyio.fail_after(30):
            await told.wait()


async def test_junk_is_refused(desk: Desk) -> None:
    async def hook(_event: BillingEvent) -> None: ...

    junk: list[Any] = ["", "a b", "payment.", ".x", None, 7, "**"]
    for type in junk:
        with pytest.raises(InvalidInputError):
            desk.service.on(type)
    with pytest.raises(InvalidInputError):
        desk.service.on()
    with pytest.raises(InvalidInputError):
        desk.service.on("*")(lambda _event: None)  # type: ignore[arg-type,type-var]  # that is what is bad about it
    assert desk.service.on("*")(hook) is hook
