"""The provider's side: sign events, deliver each twice in any order over HTTP, and send junk that must be refused."""

from __future__ import annotations

import http.client
import json
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import anyio
import anyio.to_thread
from standardwebhooks import Webhook

from kitrocket.clock import utc_now
from kitrocket.demo.lifecycles import Event

_PATH = "/webhooks/dodo"
_SENDERS = 16
_TIMEOUT = 30.0


@dataclass(frozen=True)
class Request:
    """One POST to the webhook endpoint."""

    webhook_id: str
    body: bytes
    headers: dict[str, str]


@dataclass(frozen=True)
class Junk:
    """A request that must be refused with ``status``."""

    what: str
    request: Request
    status: int


@dataclass(frozen=True)
class Answer:
    """What the endpoint said; ``outcome`` is missing from a refusal."""

    webhook_id: str
    status: int
    outcome: str | None


def twice_and_shuffled(events: Sequence[Event], key: str, *, seed: int) -> list[Request]:
    """Sign every event as two deliveries of the same id, as a provider that retries does, and shuffle them all."""
    requests = [_signed(event.webhook_id, event.body, key) for event in events for _ in range(2)]
    random.Random(seed).shuffle(requests)  # noqa: S311 - the order is to be repeatable, not secret
    return requests


def junk(event: Event, key: str, *, max_bytes: int) -> list[Junk]:
    """Return what strangers and broken senders would post, with the status that each must get."""
    good = _signed("msg_junk", event.body, key)
    now = utc_now()
    stranger = "whsec_" + "A" * 32
    unsigned = {name: value for name, value in good.headers.items() if name != "webhook-signature"}
    return [
        Junk("no signature", Request("msg_junk", event.body, unsigned), 401),
        Junk("a stranger's key", _signed("msg_junk", event.body, stranger), 401),
        Junk("a changed body", Request("msg_junk", event.body.replace(b"active", b"paused"), good.headers), 401),
        Junk("another id", Request("msg_junk", event.body, good.headers | {"webhook-id": "msg_other"}), 401),
        Junk("signed ten minutes ago", _signed("msg_junk", event.body, key, now - timedelta(minutes=10)), 401),
        Junk("a timestamp in words", Request("msg_junk", event.body, good.headers | {"webhook-timestamp": "now"}), 401),
        Junk("not UTF-8", Request("msg_junk", b"\xff\xfe", good.headers), 400),
        Junk("signed, not JSON", _signed("msg_junk", b"hello", key), 400),
        Junk("signed, a list", _signed("msg_junk", b"[1, 2, 3]", key), 400),
        Junk("signed, too large", _signed("msg_junk", event.body.ljust(max_bytes + 1), key), 413),
    ]


async def deliver(requests: Iterable[Request], port: int, *, advance: Callable[[], object]) -> list[Answer]:
    """Post every request to the server on the loopback ``port`` over kept connections, 16 at a time."""
    waiting, answers = deque(requests), list[Answer]()

    def send() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)
        try:
            while True:
                answers.append(_post(connection, waiting.popleft()))
                advance()
        except IndexError:
            return
        finally:
            connection.close()

    async with anyio.create_task_group() as group:
        for _ in range(_SENDERS):
            group.start_soon(anyio.to_thread.run_sync, send)
    return answers


@dataclass(frozen=True)
class Tally:
    """What became of deliveries: HTTP statuses, outcomes of first and second deliveries, and what was unexpected."""

    statuses: Counter[int]
    first: Counter[str]
    second: Counter[str]
    surprises: list[str]


def tally(events: Sequence[Event], answers: Sequence[Answer]) -> Tally:
    """Count the answers. Of two deliveries of an event the one that is no duplicate was the first."""
    outcomes: dict[str, list[str]] = {event.webhook_id: [] for event in events}
    for answer in answers:
        outcomes[answer.webhook_id].append(answer.outcome or f"status {answer.status}")
    first, second, surprises = Counter[str](), Counter[str](), list[str]()
    for event in events:
        earlier, later = sorted(outcomes[event.webhook_id], key=lambda outcome: outcome == "duplicate")
        first[earlier] += 1
        second[later] += 1
        if earlier not in event.first or later != "duplicate":
            surprises.append(f"{event.webhook_id}: {earlier}, then {later}")
    return Tally(Counter(answer.status for answer in answers), first, second, surprises)


def _signed(webhook_id: str, body: bytes, key: str, at: datetime | None = None) -> Request:
    at = (at or utc_now()).replace(microsecond=0)
    headers = {
        "content-type": "application/json",
        "webhook-id": webhook_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(key).sign(webhook_id, at, body.decode()),
    }
    return Request(webhook_id, body, headers)


def _post(connection: http.client.HTTPConnection, request: Request) -> Answer:
    connection.request("POST", _PATH, body=request.body, headers=request.headers)
    response = connection.getresponse()
    text = response.read()
    if response.status != 200:
        return Answer(request.webhook_id, response.status, None)
    return Answer(request.webhook_id, response.status, json.loads(text)["outcome"])
