"""The session of a request, for any ASGI framework; the modules beside this one put it into a framework's words.

:class:`SessionMiddleware` gives each request a :class:`Visit`, which reads the cookie, validates it when somebody asks,
and has the cookie sent again when the session was extended. Needs no extra.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

import anyio

from kitrocket.errors import ConfigurationError
from kitrocket.kit import KitRocket
from kitrocket.models import IssuedSession, SessionWithUser

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_KEY = "kitrocket.visit"
_STARTS = ("http.response.start", "websocket.accept")


class Visit:
    """A request's session: who it is, and what becomes of the cookie."""

    def __init__(self, kit: KitRocket, scope: Scope) -> None:
        self.kit = kit
        self._scope = scope
        self._header = "; ".join(_headers(scope, b"cookie"))
        self._lock = anyio.Lock()
        self._found: SessionWithUser | None = None
        self._looked = False
        self._cookies: list[str] = []

    @property
    def token(self) -> str | None:
        """The session token that the browser sent."""
        return self.kit.session_cookie.read(self._header)

    @property
    def ip_address(self) -> str | None:
        """Who is connected, for ``sessions.create``; behind a proxy, the proxy, unless the server was told of it."""
        host = str((self._scope.get("client") or ("",))[0])
        try:
            return str(ipaddress.ip_address(host))
        except ValueError:
            return None

    @property
    def user_agent(self) -> str | None:
        """What the browser calls itself, for ``sessions.create``."""
        return next(iter(_headers(self._scope, b"user-agent")), None)

    async def session(self) -> SessionWithUser | None:
        """Return the live session with its user, or ``None``. Validated once a request, by one statement."""
        async with self._lock:
            token = self.token
            if not self._looked and token is not None:
                self._found = await self.kit.sessions.validate(token)
                if self._found is not None and self._found.refreshed and not self._cookies:
                    remember = self.kit.session_cookie.is_remembered(self._header)
                    self._cookies = self.kit.session_cookie.write(token, remember=remember)
            self._looked = True
        return self._found

    def signed_in(self, issued: IssuedSession, *, remember: bool = True) -> None:
        """Have the cookie of a new session sent; ``remember`` as it was for ``sessions.create``.

        Who is signed in during the rest of this request does not change.
        """
        self._cookies = self.kit.session_cookie.write(issued.token, remember=remember)

    async def sign_out(self) -> None:
        """End the session, and have the cookie taken away."""
        found = await self.session()
        if found is not None:
            await self.kit.sessions.revoke(found.session.id, user_id=found.user.id)
        self._found = None
        self._cookies = self.kit.session_cookie.clear()

    def _with_cookies(self, message: Message) -> Message:
        """Add the cookies to the start of an answer, which no shared cache may then keep."""
        if not self._cookies:
            return message
        headers = [(name, value) for name, value in message.get("headers", ()) if name.lower() != b"cache-control"]
        cookies = [(b"set-cookie", line.encode()) for line in self._cookies]
        return {**message, "headers": [*headers, (b"cache-control", b"no-store"), *cookies]}


class SessionMiddleware:
    """Pure ASGI middleware: gives requests and web sockets their :class:`Visit`, and sends the cookies."""

    def __init__(self, app: ASGIApp, kit: KitRocket) -> None:
        self.app = app
        self._kit = kit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        visit = scope[_KEY] = Visit(self._kit, scope)

        async def send_with_cookies(message: Message) -> None:
            await send(visit._with_cookies(message) if message["type"] in _STARTS else message)

        await self.app(scope, receive, send_with_cookies)


def visit_of(scope: Scope) -> Visit:
    """Return the visit of a request, by its ASGI scope.

    Raises :class:`ConfigurationError` where :class:`SessionMiddleware` is missing.
    """
    visit = scope.get(_KEY)
    if not isinstance(visit, Visit):
        raise ConfigurationError("the application lacks kitrocket's SessionMiddleware; add it with kit=…")
    return visit


def _headers(scope: Scope, wanted: bytes) -> list[str]:
    return [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == wanted]
