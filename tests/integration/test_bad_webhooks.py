"""Junk is refused and stores nothing; what is odd but signed is stored, raises nothing and downgrades nobody."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from delivering import KEY, PAYLOADS, SUBSCRIPTION_EVENTS, USER, Desk, at, event, with_user
from kitrocket.dodo.signature import sign
from kitrocket.engine import Engine
from kitrocket.errors import WebhookError
from kitrocket.testing import ManualClock

pytestmark = pytest.mark.asyncio

BODY = json.dumps(PAYLOADS["02"]).encode()


@pytest.fixture
def desk(engine: Engine, clock: ManualClock) -> Desk:
    return Desk(engine, clock)


def junk(now: Any) -> Iterator[tuple[bytes, dict[str, str]]]:
    """More than 300 deliveries that are none."""

    def signed(body: bytes, **options: Any) -> tuple[bytes, dict[str, str]]:
        return body, sign(body, **{"key": KEY, "webhook_id": "msg_junk", "at": now} | options)

    good = signed(BODY)[1]
    words = [
        "",
        " ",
        "\0",
        "é",
        "\n",
        "x" * 300,
        "nan",
        "1e400",
        "1.5",
        "-1",
        "\u0661",
        "0x10",
        "null",
        "[]",
        "'",
        "💥",
    ]
    for name in good:
        yield BODY, {key: value for key, value in good.items() if key != name}
        yield BODY, good | {name.upper(): good[name]}
        for word in words:
            yield BODY, good | {name: word}
            # A second entry beside a good one is what a rotation of keys looks like.
            if (name, word) != ("webhook-signature", " "):
                yield BODY, good | {name: good[name] + word + "x"}
    for signature in ("v1", "v1,", "v1,a,b", "v2," + "A" * 44, "v1," + "A" * 44, "v1," + "=" * 44, "v1,x " * 10_000):
        yield BODY, good | {"webhook-signature": signature}
    for seconds in (301, -301, 3600, -3600, 86_400 * 365):
        yield signed(BODY, at=now + timedelta(seconds=seconds))
    rng = random.Random(1)
    for _ in range(60):
        changed = bytearray(BODY)
        changed[rng.randrange(len(BODY))] ^= 1 + rng.randrange(255)
        yield bytes(changed), good
        yield signed(BODY, webhook_id=f"msg_{rng.random()}")[0], good | {"webhook-id": f"msg_{rng.random()}"}
    for text in (
        *(
            "",
            " ",
            "null",
            "1",
            '"x"',
            "[]",
            "{",
            "{}",
            "[" * 100_000,
            '{"a":' * 10_000,
            "1" * 5000,
            "NaN",
            '{"a": NaN}',
        ),
        *('{"type": 1}', '{"type": ""}', '{"type": "x"}', '{"type": "x", "timestamp": "soon", "data": {}}'),
        *('{"type": "x", "timestamp": 1, "data": {}}', '{"type": "x", "timestamp": "2026-03-01", "data": []}'),
        '{"type": "' + "x" * 256 + '", "timestamp": "2026-03-01", "data": {}}',
        '{"type": "x\\ud800", "timestamp": "2026-03-01", "data": {}}',
    ):
        yield signed(text.encode())
    for bad in (b"\xff", b"\xfe\xff" + BODY, BODY[:-1] + b"\x80}", BODY.decode().encode("utf-16")):
        yield bad, good
    yield b"x" * 2_097_153, good
    for cut in range(0, len(BODY) - 1, len(BODY) // 60):
        yield signed(BODY[:cut])


async def test_junk_is_refused_and_leaves_the_database_as_it_was(desk: Desk) -> None:
    await with_user(desk)
    await desk.deliver(PAYLOADS["01"], "msg_known")
    before = [*await desk.bytes_of_state(), await desk.table("webhook_events")]
    statuses: dict[int, int] = {}
    for body, headers in junk(desk.clock.now):
        with pytest.raises(WebhookError) as caught:
            await desk.service.receive(body, headers)
        statuses[caught.value.status_code] = statuses.get(caught.value.status_code, 0) + 1
        assert len(str(caught.value)) < 80
    assert sum(statuses.values()) >= 300
    assert set(statuses) == {400, 401, 413}
    assert [*await desk.bytes_of_state(), await desk.table("webhook_events")] == before


ODD: list[Any] = [None, "", "1", 1, 1.5, -1, True, [], {}, "x" * 300, "\0", "new_value", "2026-13-45", 10**30, [None]]


def odd(rng: random.Random, payload: dict[str, Any]) -> dict[str, Any]:
    """Take out, add or change a few fields of a payload's data, somewhere in it."""
    changed = copy.deepcopy(payload)
    for _ in range(rng.randrange(1, 4)):
        place: Any = changed["data"]
        while rng.random() < 0.4 and (inner := [v for v in place.values() if isinstance(v, dict) and v]):
            place = rng.choice(inner)
        name = rng.choice(sorted(place))
        match rng.randrange(3):
            case 0:
                del place[name]
            case 1:
                place[f"new_{rng.randrange(9)}"] = rng.choice(ODD)
            case _:
                place[name] = rng.choice(ODD)
        if not place:
            break
    if rng.random() < 0.1:
        changed["type"] = f"{payload['type'].partition('.')[0]}.invented_{rng.randrange(20)}"
    return changed


async def test_a_thousand_odd_payloads_are_stored_raise_nothing_and_downgrade_nobody(desk: Desk) -> None:
    """Each is older than what is known, and as active as that: whatever it says, access may not get less."""
    await with_user(desk)
    desk.clock.now = at("2026-03-20")
    await desk.deliver(event("02", timestamp="2026-03-19T00:00:00Z"), "msg_newest")
    rows = await desk.table("subscriptions")
    rng = random.Random(5)
    outcomes: dict[str, int] = {}
    for number in range(1000):
        payload = odd(rng, PAYLOADS[rng.choice(["01", "02", "12", "13", "x1", *SUBSCRIPTION_EVENTS])])
        payload["timestamp"] = "2026-03-18T00:00:00Z"
        outcome = await desk.deliver(payload, f"msg_odd_{number}")
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert set(outcomes) <= {"applied", "stale", "parked", "ignored"}
    assert await desk.engine.fetchval("SELECT count(*) FROM kitrocket.webhook_events") == 1001
    assert await desk.engine.fetchval("SELECT count(*) FROM kitrocket.webhook_events WHERE state = 'received'") == 0
    assert (await desk.service.access(USER)).allowed
    mine = [row for row in await desk.table("subscriptions") if row["user_id"] == USER]
    assert [row["status"] for row in mine] == [row["status"] for row in rows]


async def test_fifty_unknown_statuses_and_products_leave_every_byte_of_the_row(desk: Desk) -> None:
    await with_user(desk)
    desk.clock.now = at("2026-03-20")
    await desk.deliver(PAYLOADS["02"])
    before = await desk.bytes_of_state()
    for number in range(50):
        change = {"status": f"status_{number}"} if number % 2 else {"product_id": f"pdt_{number}"}
        assert await desk.deliver(event("02", timestamp="2026-03-19T00:00:00Z", **change)) == "parked"
    assert await desk.bytes_of_state() == before
