"""Litestar: who is signed in, as dependencies, and the handler that receives DodoPayments' webhooks.

``Litestar(middleware=[DefineMiddleware(SessionMiddleware, kit=kit)], dependencies=session_dependencies)``, then
``current_user: User`` in a handler. ``Litestar(route_handlers=[webhook_handler(kit)])`` receives webhooks. The extra is
``pip install "kitrocket[litestar]"``.
"""

from __future__ import annotations

from kitrocket.errors import MissingExtraError, SessionNotFreshError
from kitrocket.integrations.asgi import SessionMiddleware, Visit, visit_of
from kitrocket.integrations.webhooks import WebhookEndpoint
from kitrocket.kit import KitRocket
from kitrocket.models import Session, User

try:
    from litestar import asgi
    from litestar.di import Provide
    from litestar.exceptions import NotAuthorizedException, PermissionDeniedException
    from litestar.handlers import ASGIRouteHandler
    from litestar.types import Receive, Scope, Send
except ImportError as error:
    raise MissingExtraError("the Litestar integration", "litestar") from error

__all__ = [
    "SessionMiddleware",
    "current_session",
    "current_user",
    "current_visit",
    "optional_user",
    "require_fresh",
    "session_dependencies",
    "webhook_handler",
]


def webhook_handler(kit: KitRocket, path: str = "/webhooks/dodo") -> ASGIRouteHandler:
    """Return the route handler of a :class:`WebhookEndpoint`, which says what it answers."""
    endpoint = WebhookEndpoint(kit)

    @asgi(path, copy_scope=True)
    async def receive_webhook(scope: Scope, receive: Receive, send: Send) -> None:
        await endpoint(scope, receive, send)  # type: ignore[arg-type]  # Litestar's scope is a TypedDict

    return receive_webhook


async def current_visit(scope: Scope) -> Visit:
    """Return the request's :class:`Visit`, to sign somebody in or out. Needs :class:`SessionMiddleware`."""
    return visit_of(scope)  # type: ignore[arg-type]  # Litestar's scope is a TypedDict


async def optional_user(scope: Scope) -> User | None:
    """Return who is signed in, or ``None``."""
    found = await (await current_visit(scope)).session()
    return None if found is None else found.user


async def current_user(scope: Scope) -> User:
    """Return who is signed in; nobody is: 401."""
    user = await optional_user(scope)
    if user is None:
        raise NotAuthorizedException("not signed in")
    return user


async def current_session(scope: Scope) -> Session:
    """Return the session; nobody is signed in: 401."""
    found = await (await current_visit(scope)).session()
    if found is None:
        raise NotAuthorizedException("not signed in")
    return found.session


async def require_fresh(scope: Scope) -> Session:
    """Return the session if its sign-in is recent; it is not: 403, nobody is signed in: 401."""
    session = await current_session(scope)
    try:
        (await current_visit(scope)).kit.sessions.require_fresh(session)
    except SessionNotFreshError as error:
        raise PermissionDeniedException("sign in again") from error
    return session


#: For ``Litestar(dependencies=…)``: each under its own name, ``require_fresh`` as ``fresh_session``.
session_dependencies = {
    "current_visit": Provide(current_visit),
    "optional_user": Provide(optional_user),
    "current_user": Provide(current_user),
    "current_session": Provide(current_session),
    "fresh_session": Provide(require_fresh),
}
