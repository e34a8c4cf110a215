"""The applications in ``examples/``, each in a process of its own, by a browser over HTTP."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import anyio
import httpx
import pytest

import factories
from delivering import KEY, PAYLOADS, PRODUCTS, USER
from kitrocket.clock import utc_now
from kitrocket.engine import Engine
from kitrocket.kit import KitRocket
from kitrocket.settings import Settings
from kitrocket.testing import sign_webhook
from kitrocket.usage import UsageService

pytestmark = [pytest.mark.asyncio, pytest.mark.direct]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.parent.name for path in (ROOT / "examples").glob("*/app.py"))
ADA = {"email": "Ada@Example.com", "name": "Ada", "password": "correct horse"}
COOKIE = "kitrocket.session_token"
SECRET = "a secret of both sides of thirty-two bytes and more"


@asynccontextmanager
async def example(name: str, url: str, **environment: str) -> AsyncIterator[str]:
    """Run an example under uvicorn until the block is left; the value is its address."""
    async with started(name, url, **environment) as (address, _):
        yield address


@asynccontextmanager
async def started(name: str, url: str, **environment: str) -> AsyncIterator[tuple[str, subprocess.Popen[str]]]:
    """The same, with its process."""
    with subprocess.Popen(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "uvicorn", "app:app", "--port", "0", "--no-use-colors"],
        cwd=ROOT / "examples" / name,
        env=os.environ
        | {"DATABASE_URL": url, "KITROCKET_SESSION_COOKIE_SECURE": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        | environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as running:
        try:
            assert running.stderr is not None
            line = ""
            with anyio.fail_after(60):
                while "Uvicorn running" not in line:
                    line = await anyio.to_thread.run_sync(running.stderr.readline, abandon_on_cancel=True)
                    assert line, "the example did not start"
            yield re.findall(r"http://127\.0\.0\.1:\d+", line)[0], running
        finally:
            running.terminate()
            try:
                _, rest = running.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                running.kill()
                raise
        assert "Traceback" not in rest, rest
        assert "correct horse" not in rest


def browser(address: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=address, trust_env=False, timeout=20, headers={"user-agent": "Browser/1.0"})


async def age(engine: Engine, by: timedelta) -> None:
    await engine.fetch("UPDATE sessions SET created_at = created_at - $1::interval, expires_at = expires_at - $1", by)


async def test_there_is_an_example_for_each_framework() -> None:
    assert EXAMPLES == ["blacksheep", "fastapi", "litestar", "starlette"]


@pytest.mark.parametrize("name", EXAMPLES)
async def test_somebody_signs_up_in_and_out(name: str, engine: Engine, database_url: str) -> None:
    async with example(name, database_url) as address, browser(address) as client:
        assert "Hello, stranger" in (await client.get("/")).text
        for path in ("/me", "/devices"):
            assert (await client.get(path)).status_code == 401
        assert (await client.delete("/me")).status_code == 401

        answer = await client.post("/sign-up", json=ADA)
        assert answer.status_code == 201, answer.text
        assert answer.json()["email"] == "ada@example.com"
        token = client.cookies[COOKIE]
        assert answer.headers.get_list("set-cookie") == [
            f"{COOKIE}={token}; Max-Age=604800; Path=/; HttpOnly; SameSite=Lax"
        ]
        assert answer.headers["cache-control"] == "no-store"
        assert token not in answer.text

        assert "Hello, Ada" in (await client.get("/")).text
        answer = await client.get("/me")
        assert (answer.json()["name"], answer.headers.get_list("set-cookie")) == ("Ada", [])
        [device] = (await client.get("/devices")).json()
        assert (device["user_agent"], device["ip_address"], device["is_current"]) == ("Browser/1.0", "127.0.0.1", True)

        async with browser(address) as other:
            taken = await other.post("/sign-up", json=ADA)
            assert (taken.status_code, taken.headers.get_list("set-cookie")) == (409, [])
            wrong = await other.post("/sign-in", json={**ADA, "password": "wrong horse"})
            assert (wrong.status_code, wrong.headers.get_list("set-cookie")) == (401, [])
            assert (await other.post("/sign-up", json={**ADA, "email": "nowhere"})).status_code == 422
            right = await other.post("/sign-in", json={**ADA, "remember": False})
            assert right.status_code == 204
            assert "Max-Age" not in right.headers["set-cookie"]
            assert len((await other.get("/devices")).json()) == 2

        kept = dict(client.cookies)
        answer = await client.post("/sign-out")
        assert answer.status_code == 204
        assert answer.headers.get_list("set-cookie") == [f"{COOKIE}=; Max-Age=0; Path=/; HttpOnly; SameSite=Lax"]
        assert not client.cookies
        assert (await client.get("/me", headers={"cookie": f"{COOKIE}={kept[COOKIE]}"})).status_code == 401
        assert (await client.post("/sign-out")).status_code == 204
    assert await engine.fetchval("SELECT count(*) FROM sessions") == 1


@pytest.mark.parametrize("name", EXAMPLES)
async def test_the_cookie_is_sent_again_when_the_session_was_extended(
    name: str, engine: Engine, database_url: str
) -> None:
    async with example(name, database_url) as address, browser(address) as client:
        sent = (await client.post("/sign-up", json=ADA)).headers.get_list("set-cookie")
        for path in ("/me", "/devices", "/"):
            await age(engine, timedelta(days=1, seconds=1))
            answer = await client.get(path)
            assert answer.headers.get_list("set-cookie") == sent
            assert answer.headers["cache-control"] == "no-store"
            answer = await client.get(path)
            assert answer.headers.get_list("set-cookie") == []
        await age(engine, timedelta(days=8))
        assert (await client.get("/me")).status_code == 401


@pytest.mark.parametrize("name", EXAMPLES)
async def test_what_is_grave_asks_for_a_recent_sign_in(name: str, engine: Engine, database_url: str) -> None:
    async with example(name, database_url) as address, browser(address) as client:
        await client.post("/sign-up", json=ADA)
        await age(engine, timedelta(days=1, seconds=1))
        answer = await client.delete("/me")
        assert answer.status_code == 403
        assert await engine.fetchval("SELECT count(*) FROM users") == 1
        assert (await client.post("/sign-in", json=ADA)).status_code == 204
        answer = await client.delete("/me")
        assert answer.status_code == 204
        assert "Max-Age=0" in answer.headers["set-cookie"]
        assert await engine.fetchval("SELECT count(*) FROM users") == 0


@pytest.mark.parametrize("name", EXAMPLES)
async def test_with_a_secret_of_better_auth_the_cookie_is_its_own(name: str, engine: Engine, database_url: str) -> None:
    kit = KitRocket(Settings(better_auth_secret=[SECRET], session_cookie_secure=False), engine=engine)
    shared = {"KITROCKET_BETTER_AUTH_SECRET": SECRET}
    async with example(name, database_url, **shared) as address, browser(address) as client:
        answer = await client.post("/sign-up", json={**ADA, "remember": False})
        assert {line.partition("=")[0] for line in answer.headers.get_list("set-cookie")} == {
            "better-auth.session_token",
            "better-auth.dont_remember",
        }
        header = "; ".join(f"{cookie.name}={cookie.value}" for cookie in client.cookies.jar)
        token = kit.session_cookie.read(header)
        assert token is not None
        assert (await client.get("/me")).status_code == 200
        for forged in (token, f"{token}.{'A' * 43}="):
            async with browser(address) as other:
                answer = await other.get("/me", headers={"cookie": f"better-auth.session_token={forged}"})
                assert answer.status_code == 401
        # Better Auth made it long and forgot the cookie that says otherwise: the browser still drops it.
        await engine.fetch("UPDATE sessions SET expires_at = created_at + interval '7 days'")
        await age(engine, timedelta(days=2))
        answer = await client.get("/me")
        assert len(answer.headers.get_list("set-cookie")) == 2
        assert not any("Max-Age" in line for line in answer.headers.get_list("set-cookie"))


@pytest.mark.parametrize("name", EXAMPLES)
async def test_junk_in_a_cookie_is_nobody(name: str, database_url: str) -> None:
    async with example(name, database_url) as address, browser(address) as client:
        for junk in ("", "x", "k1$" + "0" * 64, "%00", "é" * 32, '"' * 40, "A" * 8000, f"{'A' * 32}; {COOKIE}=x"):
            answer = await client.get("/me", headers={"cookie": f"{COOKIE}={junk}".encode()})
            assert answer.status_code == 401, junk[:40]


WEBHOOKS = {
    "DODO_PAYMENTS_WEBHOOK_KEY": KEY,
    "KITROCKET_DODO_PRODUCTS": json.dumps(PRODUCTS),
    "KITROCKET_WEBHOOK_MAX_BYTES": "20000",
    "KITROCKET_BACKGROUND": "0",
}


@pytest.mark.parametrize("name", EXAMPLES)
async def test_webhooks_are_received_or_refused(name: str, engine: Engine, database_url: str) -> None:
    await factories.make_user(engine, id=USER)
    async with example(name, database_url, **WEBHOOKS) as address, browser(address) as client:

        async def deliver(body: bytes, webhook_id: str, **headers: str) -> tuple[int, dict[str, str]]:
            signed = sign_webhook(body, key=KEY, webhook_id=webhook_id, at=utc_now())
            answer = await client.post("/webhooks/dodo", content=body, headers=signed | headers)
            return answer.status_code, answer.json()

        body = json.dumps(PAYLOADS["01"]).encode()
        assert await deliver(body, "msg_1") == (200, {"outcome": "applied"})
        assert await deliver(body, "msg_1") == (200, {"outcome": "duplicate"})
        assert await engine.fetchval("SELECT plan FROM subscriptions WHERE user_id = $1", USER) == "starter"
        assert await deliver(body, "msg_2", **{"webhook-timestamp": "1"}) == (401, {"error": "time_out_of_tolerance"})
        assert await deliver(body, "msg_2", **{"WEBHOOK-ID": "msg_3"}) == (401, {"error": "doubled_header"})
        assert await deliver(b"[]", "msg_2") == (400, {"error": "not_an_object"})
        assert await deliver(b" " * 20_001, "msg_2") == (413, {"error": "too_large"})
        assert await unfinished(address, "Content-Length: 20001", b"") == b"413"
        assert await unfinished(address, "Transfer-Encoding: chunked", b"4e21\r\n" + b" " * 20_001 + b"\r\n") == b"413"
        assert await engine.fetchval("SELECT count(*) FROM kitrocket.webhook_events") == 1


async def unfinished(address: str, header: str, sent: bytes) -> bytes:
    """Begin a delivery whose body never ends; return the status that comes all the same."""
    async with await anyio.connect_tcp("127.0.0.1", int(address.rpartition(":")[2])) as stream:
        await stream.send(f"POST /webhooks/dodo HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode() + sent)
        with anyio.fail_after(30):
            return (await stream.receive()).split(b" ")[1]


async def test_a_metered_stream_counts_what_came_before_its_client_or_its_process_went(
    engine: Engine, database_url: str
) -> None:
    usage = UsageService(engine)
    async with started("fastapi", database_url, CHAT_TTL="4") as (address, process), browser(address) as client:
        user_id = (await client.post("/sign-up", json=ADA)).json()["id"]
        async with client.stream("POST", "/chat", json={"prompt": "never trust a count"}) as answer:
            words = answer.aiter_text()
            text = "".join([await anext(words) for _ in range(5)])
            assert text.startswith("never trust a")
            assert await held(engine) == 1000
            refused = await client.post("/chat", json={"prompt": "more"})
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) in range(1, 5)
        with anyio.fail_after(60):
            while await held(engine):
                await anyio.sleep(0.02)
        streamed = await usage.total(user_id)
        assert len(text.split()) <= streamed < 1000

        async with client.stream("POST", "/chat", json={"prompt": "never trust a count"}) as answer:
            words = answer.aiter_text()
            await anext(words)
            with anyio.fail_after(60):
                while not await engine.fetchval("SELECT max(used) FROM kitrocket.usage_reservations"):
                    await anyio.sleep(0.02)
            process.kill()
            process.wait()
    renewed = await engine.fetchval("SELECT used FROM kitrocket.usage_reservations")
    assert renewed > 0
    assert await usage.total(user_id) == streamed
    with anyio.fail_after(60):
        while not (await usage.expire_reservations()).recorded:
            await anyio.sleep(0.05)
    assert await usage.total(user_id) == streamed + renewed
    assert await held(engine) == 0


async def held(engine: Engine) -> int:
    return int(await engine.fetchval("SELECT coalesce(sum(tokens), 0) FROM kitrocket.usage_reservations"))
