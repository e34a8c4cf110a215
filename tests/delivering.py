"""A service on a fresh database, a provider that signs for it, and what to deliver."""

from __future__ import annotations

import base64
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any

from factories import make_user
from kitrocket.dodo.signature import sign
from kitrocket.engine import Engine
from kitrocket.models import WebhookReceipt
from kitrocket.subscriptions import SubscriptionService
from kitrocket.testing import ManualClock

USER = "usr_01JH8Z6Q4M"
SUBSCRIPTION = "sub_Gx6hJm9wPz3K"
PRODUCTS = {"pdt_starter_m_4Vb7": "starter", "pdt_pro_m_8Kd2": "pro"}
KEY = "whsec_" + base64.b64encode(b"k" * 32).decode()
SECOND, DAY = timedelta(seconds=1), timedelta(days=1)
_numbers = itertools.count(1)


def _payloads() -> dict[str, dict[str, Any]]:
    folder = files("kitrocket.demo") / "payloads"
    return {
        entry.name.partition("_")[0]: json.loads(entry.read_text(encoding="utf-8"))
        for entry in folder.iterdir()
        if entry.name.endswith(".json")
    }


PAYLOADS = _payloads()
SUBSCRIPTION_EVENTS = sorted(number for number, event in PAYLOADS.items() if event["type"].startswith("subscription."))


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def event(number: str, *, type: str | None = None, timestamp: str | None = None, **data: Any) -> dict[str, Any]:
    """An example payload with some fields of its data replaced."""
    known = PAYLOADS[number]
    return known | {
        "type": type or known["type"],
        "timestamp": timestamp or known["timestamp"],
        "data": known["data"] | data,
    }


def anonymous(number: str, **data: Any) -> dict[str, Any]:
    """An example payload whose metadata names nobody."""
    customer = PAYLOADS[number]["data"]["customer"] | {"metadata": {}}
    return event(number, **{"metadata": {}, "customer": customer} | data)


class Desk:
    """A service on a fresh database, and a provider that signs for it."""

    def __init__(self, engine: Engine, clock: ManualClock) -> None:
        self.engine = engine
        self.clock = clock
        self.service = self.open()

    def open(self, **options: Any) -> SubscriptionService:
        options = {"webhook_keys": [KEY], "products": PRODUCTS, "jitter": lambda: 0.5} | options
        return SubscriptionService(self.engine, clock=self.clock, **options)

    async def deliver(self, payload: Mapping[str, Any], webhook_id: str | None = None) -> str:
        return (await self.receipt(payload, webhook_id)).outcome

    async def receipt(self, payload: Mapping[str, Any], webhook_id: str | None = None) -> WebhookReceipt:
        body = json.dumps(payload).encode()
        webhook_id = webhook_id or f"msg_{next(_numbers)}"
        return await self.service.receive(body, sign(body, key=KEY, webhook_id=webhook_id, at=self.clock.now))

    async def rows(self) -> list[dict[str, Any]]:
        """Every row, but for its id."""
        rows = await self.engine.fetch("SELECT * FROM subscriptions ORDER BY user_id, created_at, id")
        return [{name: value for name, value in row.items() if name != "id"} for row in rows]

    async def table(self, name: str) -> list[dict[str, Any]]:
        statements = {
            "subscriptions": "SELECT ctid::text, xmin::text, * FROM subscriptions ORDER BY id",
            "dodo_subscriptions": "SELECT ctid::text, xmin::text, * FROM kitrocket.dodo_subscriptions ORDER BY 1",
            "dodo_payments": "SELECT ctid::text, xmin::text, * FROM kitrocket.dodo_payments ORDER BY 1",
            "webhook_events": "SELECT * FROM kitrocket.webhook_events ORDER BY webhook_id",
        }
        return [dict(row) for row in await self.engine.fetch(statements[name])]

    async def bytes_of_state(self) -> list[Any]:
        return [await self.table(name) for name in ("subscriptions", "dodo_subscriptions", "dodo_payments")]

    async def somebody_waits(self) -> None:
        """Return once a connection of this database waits for a lock."""
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        while not await self.engine.fetchval(waiting):
            pass

    async def inbox(self) -> dict[str, tuple[str, str | None]]:
        return {row["webhook_id"]: (row["state"], row["reason"]) for row in await self.table("webhook_events")}


async def with_user(desk: Desk, **options: Any) -> Desk:
    await make_user(desk.engine, id=USER, **options)
    return desk


def refund(refund_id: str, amount: int | None, timestamp: str, status: str = "succeeded") -> dict[str, Any]:
    data = {"refund_id": refund_id, "payment_id": "pay_Zf4sHc8yUe1D", "status": status, "amount": amount}
    return {"type": "refund.succeeded", "timestamp": timestamp, "data": data}


def dispute(status: str, timestamp: str) -> dict[str, Any]:
    data = {
        "dispute_id": "dsp_1",
        "payment_id": "pay_Zf4sHc8yUe1D",
        "dispute_status": f"dispute_{status}",
        "amount": "18.66",
    }
    return {"type": f"dispute.{status}", "timestamp": timestamp, "data": data}


def junk(now: datetime) -> Iterator[tuple[bytes, dict[str, str]]]:
    """More than 300 deliveries that are none."""
    body = json.dumps(PAYLOADS["02"]).encode()

    def signed(content: bytes, **options: Any) -> tuple[bytes, dict[str, str]]:
        return content, sign(content, **{"key": KEY, "webhook_id": "msg_junk", "at": now} | options)

    good = signed(body)[1]
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
        yield body, {key: value for key, value in good.items() if key != name}
        yield body, good | {name.upper(): good[name]}
        for word in words:
            yield body, good | {name: word}
            # A second entry beside a good one is what a rotation of keys looks like.
            if (name, word) != ("webhook-signature", " "):
                yield body, good | {name: good[name] + word + "x"}
    for signature in ("v1", "v1,", "v1,a,b", "v2," + "A" * 44, "v1," + "A" * 44, "v1," + "=" * 44, "v1,x " * 10_000):
        yield body, good | {"webhook-signature": signature}
    for seconds in (301, -301, 3600, -3600, 86_400 * 365):
        yield signed(body, at=now + timedelta(seconds=seconds))
    rng = random.Random(1)
    for _ in range(60):
        changed = bytearray(body)
        changed[rng.randrange(len(body))] ^= 1 + rng.randrange(255)
        yield bytes(changed), good
        yield signed(body, webhook_id=f"msg_{rng.random()}")[0], good | {"webhook-id": f"msg_{rng.random()}"}
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
    for bad in (b"\xff", b"\xfe\xff" + body, body[:-1] + b"\x80}", body.decode().encode("utf-16")):
        yield bad, good
    yield b"x" * 2_097_153, good
    for cut in range(0, len(body) - 1, len(body) // 60):
        yield signed(body[:cut])
