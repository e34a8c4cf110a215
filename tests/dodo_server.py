"""A provider to ask: DodoPayments' subscriptions and payments on a loopback port, with its manners and its bad days."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kitrocket.clock import Clock, utc_now
from kitrocket.server import listen, serve


class DodoServer:
    """What the provider knows. ``trouble`` is asked before each answer, and may give another one."""

    def __init__(self) -> None:
        self.subscriptions: dict[str, dict[str, Any]] = {}
        self.payments: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []
        #: When each request came, by the loop's clock.
        self.instants: list[float] = []
        self.trouble: Callable[[str, int], Awaitable[Response | None]] | None = None
        self.url = ""
        #: What usage it accepted, by event id: it forgets none. ``sent`` counts how often it was told of each.
        self.events: dict[str, dict[str, Any]] = {}
        self.sent: Counter[str] = Counter()
        #: How many events each call had.
        self.calls: list[int] = []
        self.clock: Clock = utc_now
        #: Which events it has something against.
        self.dislikes: Callable[[dict[str, Any]], bool] = lambda _event: False
        #: Asked after a call was accepted and before it is answered; may give another answer.
        self.aftermath: Callable[[], Awaitable[Response | None]] | None = None

    async def _listed(self, request: Request) -> Response:
        page, size = int(request.query_params["page_number"]), int(request.query_params["page_size"])
        found = sorted(self.subscriptions.values(), key=lambda item: item["subscription_id"])
        hidden = {"expires_at", "past_due_ends_at"}
        items = [
            {name: value for name, value in item.items() if name not in hidden}
            for item in found[page * size : (page + 1) * size]
        ]
        return JSONResponse({"items": items})

    async def _subscription(self, request: Request) -> Response:
        found = self.subscriptions.get(request.path_params["id"])
        if found is None:
            return JSONResponse({"code": "NOT_FOUND"}, 404)
        return JSONResponse({name: value for name, value in found.items() if name != "past_due_ends_at"})

    async def _payment(self, request: Request) -> Response:
        found = self.payments.get(request.path_params["id"])
        return JSONResponse({"code": "NOT_FOUND"}, 404) if found is None else JSONResponse(found)

    async def _ingest(self, request: Request) -> Response:
        events = (await request.json())["events"]
        ids = [event["event_id"] for event in events]
        self.calls.append(len(events))
        self.sent.update(ids)
        if len(events) > 1000 or len(set(ids)) != len(ids):
            return JSONResponse({"code": "INVALID_REQUEST_BODY"}, 400)
        now = self.clock()
        for event in events:
            age = now - datetime.fromisoformat(event["timestamp"])
            if not timedelta(minutes=-5) <= age <= timedelta(hours=1) or self.dislikes(event):
                return JSONResponse({"code": "INVALID_EVENT"}, 422)
        new = {event["event_id"]: event for event in events if event["event_id"] not in self.events}
        self.events |= new
        if self.aftermath is not None:
            other = await self.aftermath()
            if other is not None:
                return other
        return JSONResponse({"ingested_count": len(new)})

    def _counted(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def counted(request: Request) -> Response:
            if request.headers["authorization"] != "Bearer key":
                return JSONResponse({"code": "UNAUTHORIZED"}, 401)
            self.requests.append(request.url.path)
            self.instants.append(anyio.current_time())
            if self.trouble is not None:
                other = await self.trouble(request.url.path, len(self.requests))
                if other is not None:
                    return other
            return await answer(request)

        return counted

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        app = Starlette(
            routes=[
                Route("/subscriptions", self._counted(self._listed)),
                Route("/subscriptions/{id}", self._counted(self._subscription)),
                Route("/payments/{id}", self._counted(self._payment)),
                Route("/events/ingest", self._counted(self._ingest), methods=["POST"]),
            ]
        )
        listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        started = anyio.Event()
        stop = anyio.Event()

        async def own() -> None:
            async with anyio.create_task_group() as group:
                group.start_soon(partial(serve, app, listener, on_started=started.set, log_level="warning"))
                await stop.wait()
                group.cancel_scope.cancel()

        # A task of its own: a fixture is left by another task than it was entered by.
        task = asyncio.get_running_loop().create_task(own())
        await started.wait()
        yield
        stop.set()
        await task
