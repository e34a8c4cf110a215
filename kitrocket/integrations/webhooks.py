"""The endpoint that receives DodoPayments' webhooks, for any ASGI framework; the modules beside this one mount it.

Needs no extra.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import NamedTuple

import anyio

from kitrocket.errors import DatabaseError, InvalidInputError, WebhookError, WebhookTooLargeError
from kitrocket.integrations.asgi import Receive, Scope, Send
from kitrocket.kit import KitRocket

logger = logging.getLogger("kitrocket")

#: How long a delivery may take until it is worked on, in seconds: its body to arrive, and a place to become free. With
#: the 9 s that ``receive`` takes at most, the answer is there before the provider gives up, after 15 s.
_ENTRY_SECONDS = 5.0
#: How many of the largest bodies may be in memory at once.
_BODIES_HELD = 32
#: How much of a body that is refused is read on, in bytes, and for how long, in seconds.
_DISCARDED, _DISCARD_SECONDS = 32 * 1024 * 1024, 10.0

_CLOSE = {"connection": "close"}
#: What a sender is told to wait before it tries again, in seconds.
_RETRY_AFTER = {"retry-after": "30"}


class WebhookEndpoint:
    """An ASGI application that hands each POST to ``kit.subscriptions.receive``.

    200 ``{"outcome": …}`` once the delivery is stored, whatever became of it. Refused: 401 (headers, time, signature),
    400 (not an event), 405 (not a POST), 408 (the body takes too long), 413 (larger than ``webhook_max_bytes``). 503
    with Retry-After when no key is configured, the database is away, or ``webhook_concurrency`` others are worked on
    for too long, so that the provider sends it again.

    A delivery takes its place among those only once its body is there: a slow sender holds nobody up.
    """

    def __init__(self, kit: KitRocket) -> None:
        self._kit = kit
        self._places = anyio.CapacityLimiter(kit.settings.webhook_concurrency)
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        body: list[bytes] = []
        try:
            answer = await self._answer(scope, receive, body)
        finally:
            self._held -= sum(len(part) for part in body)
        await answer.send(receive, send)

    async def _answer(self, scope: Scope, receive: Receive, body: list[bytes]) -> _Answer:
        if scope["method"] != "POST":
            return _Answer(405, {"error": "method_not_allowed"}, {"allow": "POST"})
        deadline = anyio.current_time() + _ENTRY_SECONDS
        with anyio.CancelScope(deadline=deadline) as reading:
            refusal = await self._read(scope, receive, body)
            if refusal is not None:
                return refusal
        if reading.cancelled_caught:
            return _Answer(408, {"error": "timeout"}, _CLOSE)
        with anyio.CancelScope(deadline=deadline) as waiting:
            await self._places.acquire()
        if waiting.cancelled_caught:
            logger.warning("a webhook was sent away: webhook_concurrency others were being worked on")
            return _Answer(503, {"error": "busy"}, _RETRY_AFTER)
        try:
            return await self._received(b"".join(body), _headers(scope))
        finally:
            self._places.release()

    async def _read(self, scope: Scope, receive: Receive, body: list[bytes]) -> _Answer | None:
        """Read the body into ``body``, or return why not, as soon as that is known."""
        limit, size = self._kit.settings.webhook_max_bytes, 0
        declared = _headers(scope).get("content-length", "")
        is_number = declared.isascii() and declared.isdigit()
        too_large = _Answer(413, {"error": WebhookTooLargeError("too_large").reason}, _CLOSE, is_early=True)
        if is_number and (len(declared) > 18 or int(declared) > limit):
            return too_large
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return _Answer(400, {"error": "disconnected"}, _CLOSE)
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                return too_large
            if self._held + len(part) > limit * _BODIES_HELD:
                return _Answer(503, {"error": "busy"}, _CLOSE | _RETRY_AFTER, is_early=True)
            self._held += len(part)
            body.append(part)
            if not message.get("more_body"):
                return None

    async def _received(self, body: bytes, headers: Mapping[str, str]) -> _Answer:
        try:
            receipt = await self._kit.subscriptions.receive(body, headers)
        except WebhookError as error:
            return _Answer(error.status_code, {"error": error.reason}, _RETRY_AFTER if error.status_code == 503 else {})
        except InvalidInputError as error:
            return _Answer(400, {"error": error.field})
        except DatabaseError as error:
            logger.error("a webhook could not be stored: %s", error)
            return _Answer(503, {"error": "database_unavailable"}, _RETRY_AFTER)
        return _Answer(200, {"outcome": receipt.outcome})


class _Answer(NamedTuple):
    """A status, an object, and headers. An early one is given before the body was read."""

    status: int
    content: Mapping[str, str]
    headers: Mapping[str, str] = {}
    is_early: bool = False

    async def send(self, receive: Receive, send: Send) -> None:
        body = json.dumps(self.content).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **self.headers}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": raw})
        await send({"type": "http.response.body", "body": body, "more_body": self.is_early})
        if self.is_early:
            await _discard(receive)
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    """Read on for a while: a sender whose body nobody reads gets a reset connection instead of the answer."""
    size = 0
    with anyio.move_on_after(_DISCARD_SECONDS):
        while size < _DISCARDED:
            message = await receive()
            if not message.get("more_body"):
                break
            size += len(message["body"])


def _headers(scope: Scope) -> dict[str, str]:
    found: dict[str, str] = {}
    for raw, value in scope["headers"]:
        name = raw.decode("latin-1").lower()
        # One that came twice stays twice, under another spelling, so that the verifier sees and refuses it.
        found[name.upper() if name in found else name] = value.decode("latin-1")
    return found
