"""The real server on a loopback port, and a person who logs in to its Studio."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import anyio
import httpx

from kitrocket.admin import create_staff
from kitrocket.kit import KitRocket
from kitrocket.server import create_app, listen, serve

STAFF, PASSWORD = "grace", "a nanosecond of wire"


@asynccontextmanager
async def served(kit: KitRocket, *, studio: bool = False) -> AsyncIterator[str]:
    """Serve a kit until the block is left; the value is the address, without a slash at its end."""
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    started = anyio.Event()
    app = create_app(kit, studio=studio)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(partial(serve, app, listener, on_started=started.set, log_level="warning"))
            await started.wait()
            yield f"http://127.0.0.1:{port}"
            group.cancel_scope.cancel()
    except BaseExceptionGroup as errors:
        # A test's own failure is easier to read alone.
        if len(errors.exceptions) == 1:
            raise errors.exceptions[0] from None
        raise


@asynccontextmanager
async def logged_in(kit: KitRocket) -> AsyncIterator[httpx.AsyncClient]:
    """A client at the Studio of a served kit, logged in as staff, with the headers that writing wants."""
    async with served(kit, studio=True) as address:
        await create_staff(kit.engine, STAFF, PASSWORD)
        async with httpx.AsyncClient(base_url=f"{address}/admin", trust_env=False, timeout=20) as client:
            await client.get("/")
            client.headers["X-CSRFToken"] = client.cookies["csrftoken"]
            answer = await client.post("/public/login/", json={"username": STAFF, "password": PASSWORD})
            answer.raise_for_status()
            yield client
