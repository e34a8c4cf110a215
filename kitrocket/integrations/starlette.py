"""Starlette: the route that receives DodoPayments' webhooks, and who is signed in.

``Starlette(routes=[webhook_route(kit)], middleware=[Middleware(SessionMiddleware, kit=kit)])``; then
``await current_user(request)`` in a route. Without the middleware a route sets, reads and clears the cookie by
:func:`set_session_cookie`, :func:`read_session_token` and :func:`clear_session_cookie`. The extra is
``pip install "kitrocket[starlette]"``.
"""

from __future__ import annotations

from kitrocket.errors import MissingExtraError, SessionNotFreshError
from kitrocket.integrations.asgi import SessionMiddleware, Visit, visit_of
from kitrocket.integrations.webhooks import WebhookEndpoint
from kitrocket.kit import KitRocket
from kitrocket.models import Session, User

try:
    from starlette.exceptions import HTTPException
    from starlette.requests import HTTPConnection
    from starlette.responses import Response
    from starlette.routing import Route
except ImportError as error:
    raise MissingExtraError("the Starlette integration", "starlette") from error

__all__ = [
    "SessionMiddleware",
    "clear_session_cookie",
    "current_session",
    "current_user",
    "current_visit",
    "optional_user",
    "read_session_token",
    "require_fresh",
    "set_session_cookie",
    "webhook_route",
]


def webhook_route(kit: KitRocket, path: str = "/webhooks/dodo") -> Route:
    """Return the route of a :class:`WebhookEndpoint`, which says what it answers."""
    return Route(path, WebhookEndpoint(kit), methods=["POST"])


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
