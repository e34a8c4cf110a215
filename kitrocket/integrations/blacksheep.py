"""BlackSheep: who is signed in, and the endpoint that receives DodoPayments' webhooks.

``asgi = SessionMiddleware(app, kit=kit)`` is what the server runs; then ``await current_user(request)`` in a handler.
``mount_webhooks(app, kit)`` receives webhooks. The extra is ``pip install "kitrocket[blacksheep]"``.
"""

from __future__ import annotations

from typing import cast

from kitrocket.errors import MissingExtraError, SessionNotFreshError
from kitrocket.integrations.asgi import Scope, SessionMiddleware, Visit, visit_of
from kitrocket.integrations.webhooks import WebhookEndpoint
from kitrocket.kit import KitRocket
from kitrocket.models import Session, User

try:
    from blacksheep import Application, Request
    from blacksheep.exceptions import Forbidden, Unauthorized
except ImportError as error:
    raise MissingExtraError("the BlackSheep integration", "blacksheep") from error

__all__ = [
    "SessionMiddleware",
    "current_session",
    "current_user",
    "current_visit",
    "mount_webhooks",
    "optional_user",
    "require_fresh",
]


def mount_webhooks(app: Application, kit: KitRocket, path: str = "/webhooks/dodo") -> None:
    """Mount a :class:`WebhookEndpoint`, which says what it answers, at ``path`` of an application."""
    app.mount(path, WebhookEndpoint(kit))


async def current_visit(request: Request) -> Visit:
    """Return the request's :class:`Visit`, to sign somebody in or out. Needs :class:`SessionMiddleware`."""
    return visit_of(cast("Scope", request.scope))


async def optional_user(request: Request) -> User | None:
    """Return who is signed in, or ``None``."""
    found = await (await current_visit(request)).session()
    return None if found is None else found.user


async def current_user(request: Request) -> User:
    """Return who is signed in; nobody is: 401."""
    user = await optional_user(request)
    if user is None:
        raise Unauthorized("not signed in")
    return user


async def current_session(request: Request) -> Session:
    """Return the session; nobody is signed in: 401."""
    found = await (await current_visit(request)).session()
    if found is None:
        raise Unauthorized("not signed in")
    return found.session


async def require_fresh(request: Request) -> Session:
    """Return the session if its sign-in is recent; it is not: 403, nobody is signed in: 401."""
    session = await current_session(request)
    try:
        (await current_visit(request)).kit.sessions.require_fresh(session)
    except SessionNotFreshError as error:
        raise Forbidden("sign in again") from error
    return session
