"""What stands before Piccolo Admin: it answers to its host names alone, and to junk with a 4xx."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import anyio
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("kitrocket")

#: The largest body, in bytes: a form of one row.
_BODY_LIMIT = 1_048_576
#: How long one may take to arrive, in seconds.
_BODY_SECONDS = 20.0
#: No other page may frame the Studio, and no cache may keep a row.
_HEADERS = [
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
]
_PRIVATE = (b"cache-control", b"no-store")


class _Unreadable(logging.Filter):
    """Keeps out of the log what Piccolo Admin could not read: the traceback quotes what was sent."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], ValueError))


_UNREADABLE = _Unreadable()


class Front:
    """An ASGI application around Piccolo Admin.

    ``hosts`` are the host names it answers to; empty: any. Bodies must be JSON objects of at most 1 MiB, with text for
    user names and passwords: Piccolo Admin answers anything else with a 500.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = {host.lower() for host in hosts}
        logging.getLogger("piccolo_admin.endpoints").addFilter(_UNREADABLE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if self._hosts and _host(scope) not in self._hosts:
            await JSONResponse({"detail": "Not here."}, 404)(scope, receive, send)
            return
        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            try:
                with anyio.fail_after(_BODY_SECONDS):
                    body = await _body(Request(scope, receive))
            except ClientDisconnect:
                return
            except TimeoutError:
                late = JSONResponse({"detail": "The body takes too long."}, 408, {"connection": "close"})
                await late(scope, receive, send)
                return
            refusal = _refusal(scope, body)
            if refusal is not None:
                await refusal(scope, receive, send)
                return
            receive = _replay(body or b"", receive)
        await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                private = [] if "/assets/" in scope["path"] else [_PRIVATE]
                message = {**message, "headers": [*message["headers"], *_HEADERS, *private]}
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except ValueError as error:
            # pydantic's, json's and Piccolo's way of saying that they cannot read what was sent.
            if started:
                raise
            logger.info("the Studio refused a request: %s", type(error).__name__)
            await JSONResponse({"detail": "The request cannot be read."}, 400)(scope, receive, send)


async def _body(request: Request) -> bytes | None:
    """Return the body, or ``None`` when it is too large."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > _BODY_LIMIT:
            return None
        parts.append(part)
    return b"".join(parts)


def _refusal(scope: Scope, body: bytes | None) -> JSONResponse | None:
    if body is None:
        return JSONResponse({"detail": f"The body is larger than {_BODY_LIMIT} bytes."}, 413, {"connection": "close"})
    path: str = scope["path"]
    if not body and (scope["method"] == "DELETE" or path.endswith("/logout/")):
        return None
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        return JSONResponse({"detail": "A JSON object is expected."}, 400)
    if path.endswith(("/login/", "/change-password/")) and not all(
        isinstance(value, str) for value in content.values()
    ):
        return JSONResponse({"detail": "User name and password are text."}, 400)
    return None


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that begins with a body that was read already."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


def _host(scope: Scope) -> str:
    """Return the host name a request is for, without its port."""
    header = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1").lower()
    before, colon, port = header.rpartition(":")
    return before if colon and port.isdigit() else header
