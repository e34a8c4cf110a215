"""Cookies and visits, without a server: what the examples' tests do not reach."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import MutableMapping
from typing import Any

import anyio
import pytest
from starlette.requests import HTTPConnection
from starlette.responses import Response

import factories
from kitrocket.engine import Engine
from kitrocket.errors import ConfigurationError, InvalidInputError
from kitrocket.integrations.asgi import SessionMiddleware, visit_of
from kitrocket.integrations.starlette import (
    clear_session_cookie,
    current_user,
    read_session_token,
    set_session_cookie,
)
from kitrocket.kit import KitRocket
from kitrocket.settings import Settings
from kitrocket.testing import ManualClock

pytestmark = pytest.mark.asyncio

Scope = MutableMapping[str, Any]


@pytest.fixture
def kit(engine: Engine, clock: ManualClock) -> KitRocket:
    return KitRocket(Settings(), engine=engine, clock=clock, background=False)


def scope_of(*cookies: str, type: str = "http", **more: Any) -> dict[str, Any]:
    return {"type": type, "headers": [(b"cookie", cookie.encode("latin-1")) for cookie in cookies], **more}


async def started(kit: KitRocket, scope: Scope, headers: list[tuple[bytes, bytes]], *, look: bool = True) -> list[Any]:
    """Answer a request through the middleware; return the headers that were sent."""
    sent: list[Any] = []

    async def app(scope: Scope, _receive: Any, send: Any) -> None:
        if look:
            await visit_of(scope).session()
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError

    await SessionMiddleware(app, kit)(scope, receive, send)
    assert "headers" not in sent[1]
    return list(sent[0]["headers"])


async def test_by_hand_a_cookie_is_set_read_and_cleared(kit: KitRocket, engine: Engine) -> None:
    issued = await kit.sessions.create(await factories.make_user(engine))
    response = Response()
    set_session_cookie(response, kit, issued.token)
    [line] = response.headers.getlist("set-cookie")
    assert line == (
        f"__Secure-kitrocket.session_token={issued.token}; Max-Age=604800; Path=/; HttpOnly; Secure; SameSite=Lax"
    )
    request = HTTPConnection(scope_of("a=1", line.partition(";")[0]))
    assert read_session_token(request, kit) == issued.token
    assert read_session_token(HTTPConnection(scope_of("a=1")), kit) is None
    response = Response()
    clear_session_cookie(response, kit)
    [line] = response.headers.getlist("set-cookie")
    assert line.startswith("__Secure-kitrocket.session_token=; Max-Age=0; ")
    with pytest.raises(InvalidInputError):
        set_session_cookie(response, kit, "x; Domain=evil.example")


async def test_without_the_middleware_the_error_says_so() -> None:
    with pytest.raises(ConfigurationError, match="SessionMiddleware"):
        await current_user(HTTPConnection(scope_of()))


async def test_a_request_is_validated_once_however_many_ask(
    kit: KitRocket, engine: Engine, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued = await kit.sessions.create(await factories.make_user(engine))
    asked: list[str] = []
    validate = kit.sessions.validate

    async def counted(token: str) -> Any:
        asked.append(token)
        return await validate(token)

    monkeypatch.setattr(kit.sessions, "validate", counted)
    found: list[Any] = []

    async def app(scope: Scope, _receive: Any, send: Any) -> None:
        async def look() -> None:
            found.append(await visit_of(scope).session())

        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(look)

    async def nothing(*_: Any) -> Any: ...

    cookie = f"__Secure-kitrocket.session_token={issued.token}"
    await SessionMiddleware(app, kit)(scope_of(cookie), nothing, nothing)
    assert asked == [issued.token]
    assert [one.session.id for one in found] == [issued.session.id] * 20
    await SessionMiddleware(app, kit)(scope_of(), nothing, nothing)
    assert asked == [issued.token]


async def test_an_answer_that_sets_the_cookie_is_kept_by_no_cache(
    kit: KitRocket, engine: Engine, clock: ManualClock
) -> None:
    issued = await kit.sessions.create(await factories.make_user(engine))
    scope = scope_of(f"__Secure-kitrocket.session_token={issued.token}")
    public = [(b"Cache-Control", b"public, max-age=3600"), (b"x-own", b"1")]
    assert await started(kit, dict(scope), public) == public
    clock.advance(kit.settings.session_update_age)
    assert await started(kit, dict(scope), public, look=False) == public
    headers = await started(kit, dict(scope), public)
    assert headers[:2] == [(b"x-own", b"1"), (b"cache-control", b"no-store")]
    assert [name for name, _ in headers[2:]] == [b"set-cookie"]
    assert await started(kit, dict(scope), public) == public


async def test_an_address_that_cannot_be_read_is_none(kit: KitRocket) -> None:
    found: list[Any] = []

    async def app(scope: Scope, *_: Any) -> None:
        found.append((visit_of(scope).ip_address, visit_of(scope).user_agent))

    async def nothing(*_: Any) -> Any: ...

    for client in (None, ("testclient", 1), ("203.0.113.7", 1), ("::ffff:203.0.113.7", 1)):
        await SessionMiddleware(app, kit)(scope_of(client=client), nothing, nothing)
    agent = {"type": "http", "headers": [(b"user-agent", b"Browser/1.0")]}
    await SessionMiddleware(app, kit)(agent, nothing, nothing)
    assert [address for address, _ in found[:3]] == [None, None, "203.0.113.7"]
    assert found[4] == (None, "Browser/1.0")


async def test_other_scopes_pass_untouched(kit: KitRocket) -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, *_: Any) -> None:
        seen.append(scope)

    async def nothing(*_: Any) -> Any: ...

    await SessionMiddleware(app, kit)({"type": "lifespan"}, nothing, nothing)
    assert seen == [{"type": "lifespan"}]


@pytest.mark.parametrize("name", ["starlette", "fastapi", "litestar", "blacksheep"])
async def test_a_missing_framework_is_named_with_its_extra(name: str) -> None:
    code = f"import sys; sys.modules[{name!r}] = None; import kitrocket.integrations.{name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f'pip install "kitrocket[{name}]"' in done.stderr


async def test_the_asgi_part_needs_no_framework() -> None:
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in ("starlette", "fastapi", "litestar"))
    subprocess.run([sys.executable, "-c", f"import sys; {blocked}import kitrocket.integrations.asgi"], check=True)
