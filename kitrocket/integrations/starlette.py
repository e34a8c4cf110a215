"""Starlette: the route that receives DodoPayments' webhooks, and who is signed in.

``Starlette(routes=[webhook_route(kit)], middleware=[Middleware(SessionMiddleware, kit=kit)])``; then
``await current_user(request)`` in a route. Without the middleware a route sets, reads and clears the cookie by
:func:`set_session_cookie`, :func:`read_session_token` and :func:`clear_session_cookie`. The extra is
``pip install "kitrocket[starlette]"``.
"""

from __future__ import annotations

import logging

import anyio

from kitrocket.errors import (
    DatabaseError,
    InvalidInputError,
    MissingExtraError,
    SessionNotFreshError,
    WebhookError,
    WebhookTooLargeError,
)
from kitrocket.integrations.asgi import SessionMiddleware, Visit, visit_of
from kitrocket.kit import KitRocket
from kitrocket.models import Session, User

try:
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, HTTPConnection, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import Receive, Scope, Send
except ImportError as error:
    raise MissingExtraError("the Starlette integration", "starlette") from error

__all__ = [
    "SessionMiddleware",
    "clear_session_cookie",
    "current_session",
    "current_user",
    "current_visit",
    "optional_user",
    "read_body",
    "read_session_token",
    "require_fresh",
    "set_session_cookie",
    "webhook_route",
]

logger = logging.getLogger("kitrocket")

#: How long a body may take to arrive, in seconds; the provider gives up after 15.
_BODY_LIMIT = 20.0
#: How much of a body that is too large is read on, in bytes.
_DISCARDED = 32 * 1024 * 1024
#: What a sender is told to wait before it tries again, in seconds.
_RETRY_AFTER = {"retry-after": "30"}


def webhook_route(kit: KitRocket, path: str = "/webhooks/dodo") -> Route:
    """Return the route that hands each POST at ``path`` to ``kit.subscriptions.receive``.

    200 ``{"outcome": …}`` once the delivery is stored, whatever became of it. Refused: 401 (headers, time, signature),
    400 (not an event), 408 (the body takes too long), 413 (larger than ``webhook_max_bytes``). 503 with Retry-After
    when no key is configured or the database is away, so that the provider sends it again.
    """

    async def receive(request: Request) -> JSONResponse:
        try:
            with anyio.fail_after(_BODY_LIMIT):
                body = await read_body(request, kit.settings.webhook_max_bytes)
        except TimeoutError:
            return JSONResponse({"error": "timeout"}, 408, {"connection": "close"})
        except ClientDisconnect:
            return JSONResponse({"error": "disconnected"}, 400)
        except WebhookTooLargeError as error:
            return _EarlyResponse({"error": error.reason}, error.status_code, {"connection": "close"})
        return await _answer(kit, body, request)

    return Route(path, receive, methods=["POST"])


async def read_body(request: Request, limit: int) -> bytes:
    """Read a request's body. Raises :class:`WebhookTooLargeError` as soon as it is, or says it is, over ``limit``."""
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
        raise WebhookTooLargeError("too_large")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise WebhookTooLargeError("too_large")
        parts.append(part)
    return b"".join(parts)


class _EarlyResponse(JSONResponse):
    """An answer given before the body was read. The rest of it is read and thrown away for a while.

    A sender whose body nobody reads gets a reset connection instead of the answer.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        size = 0
        with anyio.move_on_after(_BODY_LIMIT):
            while size < _DISCARDED:
                message = await receive()
                if not message.get("more_body"):
                    break
                size += len(message["body"])
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _answer(kit: KitRocket, body: bytes, request: Request) -> JSONResponse:
    try:
        # Starlette's mapping keeps a header that came twice twice, so that it can be refused.
        receipt = await kit.subscriptions.receive(body, request.headers)
    except WebhookError as error:
        return JSONResponse(
            {"error": error.reason}, error.status_code, _RETRY_AFTER if error.status_code == 503 else None
        )
    except InvalidInputError as error:
        return JSONResponse({"error": error.field}, 400)
    except DatabaseError as error:
        logger.error("a webhook could not be stored: %s", error)
        return JSONResponse({"error": "database_unavailable"}, 503, _RETRY_AFTER)
    return JSONResponse({"outcome": receipt.outcome})


def set_session_cookie(response: Response, kit: KitRocket, token: str, *, remember: bool = True) -> None:
    """Set the session cookie: after ``sessions.create``, and again when ``validate`` says ``refreshed``.

    ``remember`` as it was for ``create``. Raises :class:`InvalidInputError` for what is no token.
    """
    for line in kit.session_cookie.write(token, remember=remember):
        response.headers.append("set-cookie", line)


def read_session_token(request: HTTPConnection, kit: KitRocket) -> str | None:
    """Return the session token that the browser sent, for ``sessions.validate``."""
    return kit.session_cookie.read("; ".join(request.headers.getlist("cookie")))


def clear_session_cookie(response: Response, kit: KitRocket) -> None:
    """Take the session cookie away. Revoke the session first: without a cookie it lives on."""
    for line in kit.session_cookie.clear():
        response.headers.append("set-cookie", line)


async def current_visit(request: HTTPConnection) -> Visit:
    """Return the request's :class:`Visit`, to sign somebody in or out. Needs :class:`SessionMiddleware`."""
    return visit_of(request.scope)


async def optional_user(request: HTTPConnection) -> User | None:
    """Return who is signed in, or ``None``."""
    found = await visit_of(request.scope).session()
    return None if found is None else found.user


async def current_user(request: HTTPConnection) -> User:
    """Return who is signed in; nobody is: 401."""
    user = await optional_user(request)
    if user is None:
        raise HTTPException(401, "not signed in")
    return user


async def current_session(request: HTTPConnection) -> Session:
    """Return the session; nobody is signed in: 401."""
    found = await visit_of(request.scope).session()
    if found is None:
        raise HTTPException(401, "not signed in")
    return found.session


async def require_fresh(request: HTTPConnection) -> Session:
    """Return the session if its sign-in is recent; it is not: 403, nobody is signed in: 401."""
    session = await current_session(request)
    try:
        visit_of(request.scope).kit.sessions.require_fresh(session)
    except SessionNotFreshError as error:
        raise HTTPException(403, "sign in again") from error
    return session
