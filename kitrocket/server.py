"""The ASGI application of ``kitrocket serve``: webhooks, the Studio, health, and the background work.

``create_app(kit)`` runs under any ASGI server; :func:`serve` runs it under uvicorn and stops cleanly on SIGTERM.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import anyio
import asyncpg

from kitrocket.errors import ConfigurationError, KitRocketError, MissingExtraError
from kitrocket.kit import KitRocket
from kitrocket.metrics import measure
from kitrocket.migrations import pending

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse
    from starlette.routing import BaseRoute, Mount, Route
    from starlette.types import ASGIApp, Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise MissingExtraError("the server", "server") from error

from kitrocket.integrations.starlette import webhook_route

logger = logging.getLogger("kitrocket")

#: How long requests in flight may take to finish once the server was told to stop, in seconds.
_DRAIN_LIMIT = 3
#: How long the readiness check waits for PostgreSQL, in seconds.
_READY_LIMIT = 2.0
#: The largest head of a request, in bytes.
_HEAD_LIMIT = 32 * 1024
#: How long a connection may take to send one, in seconds.
_HEAD_SECONDS = 10.0

_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]*)(:[0-9]{0,5})?")


def create_app(kit: KitRocket, *, studio: bool = True) -> Starlette:
    """Return the application. Its lifespan enters the kit, so the background work runs while it is served.

    ``POST /webhooks/dodo`` receives webhooks; ``/healthz`` answers 200 while the process lives; ``/readyz`` answers 200
    when PostgreSQL answers and no migration is missing, else 503; ``/metrics`` is for Prometheus; ``/admin/`` is the
    Studio unless ``studio`` is false (it needs the extra ``admin``). Raises :class:`MissingExtraError` without it.
    """
    routes: list[BaseRoute] = [
        webhook_route(kit),
        Route("/healthz", _healthz, methods=["GET"]),
        Route("/readyz", _readiness(kit), methods=["GET"]),
        Route("/metrics", _metrics(kit), methods=["GET"]),
    ]
    if studio:
        from kitrocket.admin import create_studio

        routes.append(Mount("/admin", create_studio(kit)))

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with kit:
            if studio:
                from kitrocket.admin import migrate_studio

                await migrate_studio(kit.engine)
            if not kit.settings.dodo_payments_webhook_key:
                logger.warning("DODO_PAYMENTS_WEBHOOK_KEY is not set: webhooks are answered with 503 until it is")
            yield

    app = Starlette(routes=routes, lifespan=lifespan)
    app.add_middleware(_Guard)
    return app


async def _healthz(_request: Request) -> PlainTextResponse:
    return PlainTextResponse("ok")


def _readiness(kit: KitRocket) -> Callable[[Request], object]:
    async def readyz(_request: Request) -> JSONResponse:
        try:
            with anyio.fail_after(_READY_LIMIT):
                await kit.engine.fetchval("SELECT 1")
                missing = await pending(kit.engine)
        except (KitRocketError, TimeoutError) as error:
            return JSONResponse({"ready": False, "reason": type(error).__name__}, 503, {"retry-after": "5"})
        if missing:
            return JSONResponse({"ready": False, "reason": "SchemaNotMigratedError"}, 503, {"retry-after": "5"})
        return JSONResponse({"ready": True})

    return readyz


def _metrics(kit: KitRocket) -> Callable[[Request], object]:
    async def metrics(_request: Request) -> PlainTextResponse:
        try:
            with anyio.fail_after(_READY_LIMIT):
                lines = await measure(kit)
        except (KitRocketError, asyncpg.PostgresError, TimeoutError) as error:
            return PlainTextResponse(f"{type(error).__name__}\n", 503, {"retry-after": "5"})
        return PlainTextResponse(lines, media_type="text/plain; version=0.0.4")

    return metrics


class _Guard:
    """Refuses a Host header that no URL can be built from, which frameworks answer with a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            hosts = [value for name, value in scope["headers"] if name == b"host"]
            if len(hosts) > 1 or not all(_HOST.fullmatch(host) for host in hosts):
                await PlainTextResponse("bad Host header", 400)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Protocol(H11Protocol):
    """uvicorn's, which alone would wait for ever for the head of a request; here the connection is closed.

    Between two requests uvicorn closes it after ``timeout_keep_alive`` in which nothing came.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self._expect_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _expect_head(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(_HEAD_SECONDS, self._close_without_request)

    def _close_without_request(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn, told when to stop by :func:`serve` instead of by handlers of its own.

    uvicorn raises the signal again once it has drained, which would end the process before the kit is closed.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install nothing."""
        yield


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the event loop to serve on: uvloop's where that is installed, as uvicorn itself would choose.

    It is for ``asyncio.Runner``, and so is ``None``, asyncio's own loop.
    """
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def listen(host: str = "127.0.0.1", port: int = 8000) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. Raises :class:`ConfigurationError` when it is taken."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigurationError(f"cannot listen on {host}, port {port}: {error}; choose another address") from error


async def serve(
    app: Starlette, listener: socket.socket, *, on_started: Callable[[], object] | None = None, log_level: str = "info"
) -> None:
    """Serve ``app`` on ``listener`` until SIGTERM or SIGINT, then finish what is in flight (at most 3 s) and return.

    The application's lifespan is entered here, so its errors come out as they are. ``on_started`` is called once
    requests are accepted. Cancelling drains in the same way. It runs on the caller's event loop: :func:`loop_factory`
    makes a fast one.
    """
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_level=log_level,
        access_log=False,
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=_DRAIN_LIMIT,
        h11_max_incomplete_event_size=_HEAD_LIMIT,
    )
    server = Server(config)
    with listener:
        async with app.router.lifespan_context(app), anyio.create_task_group() as group:
            await group.start(_stop_on_signal, server)
            group.start_soon(_announce, server, on_started)
            with anyio.CancelScope(shield=True):
                await server.serve(sockets=[listener])
            group.cancel_scope.cancel()


async def _stop_on_signal(
    server: Server, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    try:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                if server.should_exit and number == signal.SIGINT:
                    server.force_exit = True
                server.should_exit = True
    finally:
        server.should_exit = True


async def _announce(server: Server, on_started: Callable[[], object] | None) -> None:
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event to wait for
        await anyio.sleep(0.01)
    if on_started is not None:
        on_started()
