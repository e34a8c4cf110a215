"""The webhook endpoint in each framework, over a socket: what slow, large and many deliveries may take."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import anyio
import httpx
import pytest
import uvicorn
from blacksheep import Application, Router
from fastapi import FastAPI
from litestar import Litestar
from starlette.applications import Starlette

import factories
from delivering import KEY, PAYLOADS, PRODUCTS, USER, Desk, junk, with_user
from kitrocket.engine import Engine
from kitrocket.integrations import blacksheep, fastapi, litestar, starlette
from kitrocket.kit import KitRocket
from kitrocket.server import Server, listen
from kitrocket.settings import Settings
from kitrocket.testing import ManualClock, sign_webhook
from serving import served

pytestmark = pytest.mark.asyncio

PATH = "/webhooks/dodo"
LIMIT = 20_000
BODY = json.dumps(PAYLOADS["01"]).encode()
#: A type that changes nothing.
HARMLESS = json.dumps(PAYLOADS["12"]).encode()


def with_starlette(kit: KitRocket) -> Any:
    return Starlette(routes=[starlette.webhook_route(kit)])


def with_fastapi(kit: KitRocket) -> Any:
    app = FastAPI()
    app.router.routes.append(fastapi.webhook_route(kit))
    return app


def with_litestar(kit: KitRocket) -> Any:
    return Litestar([litestar.webhook_handler(kit)])


def with_blacksheep(kit: KitRocket) -> Any:
    app = Application(router=Router())
    blacksheep.mount_webhooks(app, kit)
    return app


FRAMEWORKS = pytest.mark.parametrize("framework", [with_starlette, with_fastapi, with_litestar, with_blacksheep])


def make_kit(engine: Engine, clock: ManualClock, **settings: object) -> KitRocket:
    chosen = {"dodo_payments_webhook_key": KEY, "dodo_products": PRODUCTS, "webhook_max_bytes": LIMIT}
    return KitRocket(Settings(**(chosen | settings)), engine=engine, clock=clock, background=False)  # type: ignore[arg-type]  # checked by pydantic


@asynccontextmanager
async def client_of(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application that uvicorn serves as it does by default."""
    listener = listen("127.0.0.1", 0)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = Server(uvicorn.Config(app, lifespan="on", log_level="warning", timeout_graceful_shutdown=1))
    async with anyio.create_task_group() as group:
        group.start_soon(server.serve, [listener])
        async with httpx.AsyncClient(base_url=address, trust_env=False, timeout=20) as client:
            while not server.started:
                await anyio.sleep(0.005)
            yield client
        server.should_exit = True


async def deliver(client: httpx.AsyncClient, clock: ManualClock, body: bytes, webhook_id: str) -> httpx.Response:
    headers = sign_webhook(body, key=KEY, webhook_id=webhook_id, at=clock())
    return await client.post(PATH, content=body, headers=headers)


@asynccontextmanager
async def slow_sender(client: httpx.AsyncClient, sent: int = 1) -> AsyncIterator[Callable[[], Any]]:
    """A delivery of which ``sent`` bytes came and no more will; the value reads what is answered."""
    async with await anyio.connect_tcp("127.0.0.1", client.base_url.port or 0) as stream:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {LIMIT}\r\n\r\n"
        await stream.send(head.encode())
        # This answer comes once the body is being read.
        assert b"100" in await stream.receive()
        await stream.send(b" " * sent)
        yield stream.receive


@FRAMEWORKS
async def test_a_slow_sender_holds_no_place_and_no_connection_and_is_given_up(
    engine: Engine, database_url: str, clock: ManualClock, framework: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Engine(database_url, pool_size=1) as narrow:
        kit = make_kit(narrow, clock, webhook_concurrency=1)
        async with client_of(framework(kit)) as client:
            monkeypatch.setattr("kitrocket.integrations.webhooks._ENTRY_SECONDS", 1.0)
            async with slow_sender(client) as answer, slow_sender(client):
                monkeypatch.undo()
                assert (await deliver(client, clock, HARMLESS, "msg_1")).json() == {"outcome": "ignored"}
                assert (await answer()).startswith(b"HTTP/1.1 408")


@FRAMEWORKS
async def test_without_a_key_or_a_database_the_provider_is_told_to_come_back(
    clock: ManualClock, framework: Any
) -> None:
    nowhere = Engine("postgres://nobody@127.0.0.1:9/nothing", acquire_timeout=timedelta(milliseconds=50))
    for keys, reason in (("", "no_key"), (KEY, "database_unavailable")):
        async with client_of(framework(make_kit(nowhere, clock, dodo_payments_webhook_key=keys))) as client:
            for method in ("GET", "PUT", "DELETE"):
                assert (await client.request(method, PATH)).status_code == 405
            answer = await deliver(client, clock, HARMLESS, "msg_1")
            assert (answer.status_code, answer.json()) == (503, {"error": reason})
            assert int(answer.headers["retry-after"]) > 0


async def test_no_more_than_so_many_are_worked_on_and_the_others_wait_a_while(
    engine: Engine, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await factories.make_user(engine, id=USER)
    answers: dict[str, httpx.Response] = {}
    async with client_of(with_starlette(make_kit(engine, clock, webhook_concurrency=2))) as client:

        async def send(webhook_id: str) -> None:
            answers[webhook_id] = await deliver(client, clock, BODY, webhook_id)

        async with anyio.create_task_group() as group, engine.transaction():
            await engine.fetch("SELECT 1 FROM users WHERE id = $1 FOR UPDATE", USER)
            monkeypatch.setattr("kitrocket.integrations.webhooks._ENTRY_SECONDS", 1.0)
            for number in range(6):
                group.start_soon(send, f"msg_{number}")
            with anyio.fail_after(30):
                while len(answers) < 4:
                    await anyio.sleep(0.01)
            monkeypatch.undo()
            group.start_soon(send, "msg_waits")
        refused = {webhook_id for webhook_id, answer in answers.items() if answer.status_code == 503}
        assert len(refused) == 4
        assert all(answers[webhook_id].json() == {"error": "busy"} for webhook_id in refused)
        assert all(int(answers[webhook_id].headers["retry-after"]) > 0 for webhook_id in refused)
        assert {answer.status_code for id, answer in answers.items() if id not in refused} == {200}
        assert await engine.fetchval("SELECT count(*) FROM kitrocket.webhook_events") == 3
        for webhook_id in refused:
            await send(webhook_id)
    assert {answer.status_code for answer in answers.values()} == {200}


async def test_only_so_many_bodies_are_kept_in_memory(
    engine: Engine, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kitrocket.integrations.webhooks._BODIES_HELD", 1)
    async with client_of(with_starlette(make_kit(engine, clock))) as client:
        async with slow_sender(client, LIMIT - 100):
            with anyio.fail_after(30):
                while (answer := await deliver(client, clock, HARMLESS, "msg_1")).status_code == 200:
                    pass
            assert (answer.status_code, answer.json()) == (503, {"error": "busy"})
            assert int(answer.headers["retry-after"]) > 0
        with anyio.fail_after(30):
            while (await deliver(client, clock, HARMLESS, "msg_1")).status_code != 200:
                pass


async def test_junk_over_http_is_refused_and_leaves_the_database_as_it_was(engine: Engine, clock: ManualClock) -> None:
    desk = await with_user(Desk(engine, clock))
    await desk.deliver(PAYLOADS["01"], "msg_known")
    before = [*await desk.bytes_of_state(), await desk.table("webhook_events")]
    statuses: list[int] = []
    async with served(make_kit(engine, clock, webhook_max_bytes=2_097_152)) as address:
        for body, headers in junk(clock()):
            statuses.append(await post(int(address.rpartition(":")[2]), body, headers))
    assert len(statuses) >= 300
    assert set(statuses) == {400, 401, 413}
    assert [*await desk.bytes_of_state(), await desk.table("webhook_events")] == before


async def post(port: int, body: bytes, headers: dict[str, str]) -> int:
    """Post by hand, since a client refuses to send such headers; return the first answer's status."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{lines}\r\n"
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(head.encode() + body)
        with anyio.fail_after(20):
            return int((await stream.receive()).split(b" ")[1])
