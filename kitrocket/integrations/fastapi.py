"""FastAPI: who is signed in, as dependencies, and the route that receives DodoPayments' webhooks.

``app.add_middleware(SessionMiddleware, kit=kit)``, then ``user: CurrentUser`` in an endpoint.
``app.router.routes.append(webhook_route(kit))`` receives webhooks. The extra is ``pip install "kitrocket[fastapi]"``.
"""

from __future__ import annotations

from typing import Annotated

from kitrocket.errors import MissingExtraError
from kitrocket.integrations.asgi import SessionMiddleware, Visit
from kitrocket.models import Session, User

try:
    from fastapi import Depends
except ImportError as error:
    raise MissingExtraError("the FastAPI integration", "fastapi") from error

from kitrocket.integrations.starlette import (
    current_session,
    current_user,
    current_visit,
    optional_user,
    require_fresh,
    webhook_route,
)

__all__ = [
    "CurrentSession",
    "CurrentUser",
    "CurrentVisit",
    "FreshSession",
    "OptionalUser",
    "SessionMiddleware",
    "current_session",
    "current_user",
    "current_visit",
    "optional_user",
    "require_fresh",
    "webhook_route",
]

#: The request's visit, to sign somebody in or out.
CurrentVisit = Annotated[Visit, Depends(current_visit)]
#: Who is signed in, or ``None``.
OptionalUser = Annotated[User | None, Depends(optional_user)]
#: Who is signed in, else 401.
CurrentUser = Annotated[User, Depends(current_user)]
#: The session, else 401.
CurrentSession = Annotated[Session, Depends(current_session)]
#: The session if its sign-in is recent, else 403; nobody: 401.
FreshSession = Annotated[Session, Depends(require_fresh)]
