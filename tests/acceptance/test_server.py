"""``kitrocket serve``: signed deliveries over HTTP, junk, a database that goes away, and a clean end."""

from __future__ import annotations

import base64
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from importlib.resources import files
from time import monotonic
from urllib.parse import urlsplit

import anyio
import httpx
import pytest

import factories
from kitrocket.clock import to_db, utc_now
from kitrocket.engine import Engine
from kitrocket.kit import KitRocket
from kitrocket.settings import Settings
from kitrocket.testing import ManualClock, sign_webhook
from proxying import Proxy
from servers import Server
from serving import served

pytestmark = pytest.mark.asyncio

KEY = "whsec_" + base64.b64encode(b"k" * 32).decode()
LIMIT = 20_000
BODY = (files("kitrocket.demo") / "payloads" / "01_subscription_active_trial.json").read_bytes()
#: A type that changes nothing.
HARMLESS = (files("kitrocket.demo") / "payloads" / "12_license_key_created.json").read_bytes()


def make_kit(engine: Engine, clock: ManualClock, **settings: object) -> KitRocket:
    chosen = {
        "dodo_payments_webhook_key": KEY,
        "dodo_products": {"pdt_starter_m_4Vb7": "starter", "pdt_pro_m_8Kd2": "pro"},
        "webhook_max_bytes": LIMIT,
    }
    return KitRocket(Settings(**(chosen | settings)), engine=engine, clock=clock, background=False)  # type: ignore[arg-type]  # checked by pydantic


@asynccontextmanager
async def client_of(kit: KitRocket) -> AsyncIterator[httpx.AsyncClient]:
    async with served(kit) as address, httpx.AsyncClient(base_url=address, trust_env=False, timeout=20) as client:
        yield client


def headers_of(clock: ManualClock, body: bytes, webhook_id: str = "msg_1") -> dict[str, str]:
    return sign_webhook(body, key=KEY, webhook_id=webhook_id, at=clock())


async def deliver(client: httpx.AsyncClient, body: bytes, headers: Mapping[str, str]) -> httpx.Response:
    return await client.post("/webhooks/dodo", content=body, headers=headers)


async def test_a_delivery_is_applied_once(engine: Engine, clock: ManualClock) -> None:
    kit = make_kit(engine, clock)
    user = await factories.make_user(engine, id="usr_01JH8Z6Q4M")
    async with client_of(kit) as client:
        for outcome in ("applied", "duplicate"):
            answer = await deliver(client, BODY, headers_of(clock, BODY))
            assert (answer.status_code, answer.json()) == (200, {"outcome": outcome})
        subscription = await kit.subscriptions.get(user)
        assert subscription is not None
        assert subscription.status in ("trialing", "active")
        answer = await deliver(client, HARMLESS, headers_of(clock, HARMLESS, "msg_2"))
        assert (answer.status_code, answer.json()) == (200, {"outcome": "ignored"})


async def test_a_delivery_without_its_user_is_stored_too(engine: Engine, clock: ManualClock) -> None:
    async with client_of(make_kit(engine, clock)) as client:
        answer = await deliver(client, BODY, headers_of(clock, BODY))
    assert (answer.status_code, answer.json()) == (200, {"outcome": "parked"})


async def test_a_delivery_that_cannot_be_verified_is_401(engine: Engine, clock: ManualClock) -> None:
    good = headers_of(clock, BODY)
    bad: list[list[tuple[str, str]]] = [[]]
    for name in good:
        others = [(other, value) for other, value in good.items() if other != name]
        bad += [others, [*others, (name, "")], [*others, (name, "junk")], [*good.items(), (name, good[name])]]
        bad += [[*others, (name, "\u00e9")], [*others, (name, "x" * 5000)]]
    async with client_of(make_kit(engine, clock)) as client:
        for headers in bad:
            raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
            answer = await client.post("/webhooks/dodo", content=BODY, headers=raw)
            assert answer.status_code == 401, headers
        assert (await deliver(client, BODY + b" ", good)).status_code == 401
        assert await engine.fetchval("SELECT count(*) FROM kitrocket.webhook_events") == 0


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"not json", b"[" * 10_000, b'{"type": 1}', b"null"])
async def test_a_signed_body_that_is_no_event_is_400(engine: Engine, clock: ManualClock, body: bytes) -> None:
    async with client_of(make_kit(engine, clock)) as client:
        assert (await deliver(client, body, headers_of(clock, body))).status_code == 400
        not_utf8 = b"\xff" + body
        assert (await deliver(client, not_utf8, headers_of(clock, b""))).status_code in (400, 401)


async def test_a_body_over_the_limit_is_413_however_it_is_sent(engine: Engine, clock: ManualClock) -> None:
    async def in_chunks(size: int) -> AsyncIterator[bytes]:
        for _ in range(size // 1000):
            yield b" " * 1000
        yield b" " * (size % 1000)

    async with client_of(make_kit(engine, clock)) as client:
        for size, status in ((LIMIT, 401), (LIMIT + 1, 413), (LIMIT * 20, 413)):
            headers = headers_of(clock, b"{}")
            assert (await deliver(client, b" " * size, headers)).status_code == status
            answer = await client.post("/webhooks/dodo", content=in_chunks(size), headers=headers)
            assert answer.status_code == status


async def test_a_body_that_is_declared_too_large_is_413_before_it_is_sent(engine: Engine, clock: ManualClock) -> None:
    for more in ("", "Expect: 100-continue\r\n"):
        async with client_of(make_kit(engine, clock)) as client:
            stream = await anyio.connect_tcp("127.0.0.1", client.base_url.port or 0)
            async with stream:
                head = f"POST /webhooks/dodo HTTP/1.1\r\nHost: x\r\n{more}Content-Length: {LIMIT + 1}\r\n\r\n"
                await stream.send(head.encode())
                with anyio.fail_after(30):
                    assert (await stream.receive()).startswith(b"HTTP/1.1 413")


async def test_without_a_key_the_provider_is_told_to_come_back(engine: Engine, clock: ManualClock) -> None:
    async with client_of(make_kit(engine, clock, dodo_payments_webhook_key="")) as client:
        answer = await deliver(client, BODY, headers_of(clock, BODY))
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0


async def test_other_methods_and_other_places_are_405_and_404(engine: Engine, clock: ManualClock) -> None:
    async with client_of(make_kit(engine, clock)) as client:
        for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "JUNK"):
            assert (await client.request(method, "/webhooks/dodo")).status_code == 405
        assert (await client.post("/healthz")).status_code == 405
        for path in ("/", "/admin/", "/webhooks", "/%00", "/%ff", "/..%2f..%2fetc/passwd", "/" + "x" * 8000):
            assert (await client.get(path)).status_code == 404


JUNK = [
    b"\0\0\0\0\r\n\r\n",
    b"junk\r\n\r\n",
    b"GET /healthz HTTP/9.9\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    b"GET /admin HTTP/1.1\r\nHost: [::1\r\n\r\n",
    b"GET /healthz/ HTTP/1.1\r\nHost: [\r\n\r\n",
    b"GET /healthz/ HTTP/1.1\r\nHost: a b\r\n\r\n",
    b"GET /healthz/ HTTP/1.1\r\nHost: x:99999999\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
    b"GET /" + b"y" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
    b"POST /webhooks/dodo HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /webhooks/dodo HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n",
    b"POST /webhooks/dodo HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"POST /webhooks/dodo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /webhooks/dodo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"POST /webhooks/dodo HTTP/1.1\r\nHost: x\r\nWebhook-Id: \xff\xfe\r\nContent-Length: 0\r\n\r\n",
    b"GET /webhooks/dodo HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://[junk/ HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET /healthz/é HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]


async def test_junk_on_the_wire_is_never_answered_with_a_5xx(engine: Engine, clock: ManualClock) -> None:
    async with served(make_kit(engine, clock)) as address:
        port = int(address.rpartition(":")[2])
        for junk in JUNK:
            answer = await _talk(port, junk)
            status = answer.split(b" ")[1] if answer.startswith(b"HTTP/") else b""
            assert status == b"" or 400 <= int(status) < 500 or status == b"200", f"{junk[:60]!r} {answer[:200]!r}"
            assert answer == b"" or status.isdigit()
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(f"{address}/healthz")).status_code == 200


async def _talk(port: int, sent: bytes) -> bytes:
    """Send bytes, say that there are no more, and return what comes back."""
    answer = b""
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        with anyio.fail_after(20):
            try:
                await stream.send(sent)
                await stream.send_eof()
                while True:
                    answer += await stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return answer


@pytest.mark.direct
async def test_while_the_database_is_away_it_says_503_and_afterwards_goes_on(
    server: Server, database: str, clock: ManualClock
) -> None:
    proxy = Proxy(server)
    async with proxy.running():
        kit = make_kit(Engine(proxy.url(database)), clock)
        async with client_of(kit) as client:
            assert (await client.get("/readyz")).status_code == 200
            assert (await deliver(client, HARMLESS, headers_of(clock, HARMLESS))).status_code == 200
            await proxy.cut()
            refused = await deliver(client, HARMLESS, headers_of(clock, HARMLESS, "msg_2"))
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.get("/healthz")).status_code == 200
            proxy.is_cut = False
            answer = await deliver(client, HARMLESS, headers_of(clock, HARMLESS, "msg_2"))
            assert (answer.status_code, answer.json()) == (200, {"outcome": "ignored"})
            assert (await client.get("/readyz")).json() == {"ready": True}


async def test_a_body_that_does_not_arrive_is_given_up(
    engine: Engine, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kitrocket.integrations.webhooks._ENTRY_SECONDS", 0.2)
    async with client_of(make_kit(engine, clock)) as client:
        stream = await anyio.connect_tcp("127.0.0.1", client.base_url.port or 0)
        async with stream:
            await stream.send(b"POST /webhooks/dodo HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n1")
            assert (await stream.receive()).startswith(b"HTTP/1.1 408")


async def test_a_head_that_does_not_arrive_closes_the_connection(
    engine: Engine, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client_of(make_kit(engine, clock)) as client:
        monkeypatch.setattr("kitrocket.server._HEAD_SECONDS", 0.5)
        for first in (b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"):
            async with await anyio.connect_tcp("127.0.0.1", client.base_url.port or 0) as stream:
                if first:
                    await stream.send(first)
                    assert (await stream.receive()).endswith(b"ok")
                with anyio.fail_after(30), pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                    # Dribbles: something comes more often than once in `timeout_keep_alive`.
                    while True:
                        await stream.send(b"X")
                        with anyio.move_on_after(0.05):
                            await stream.receive()


async def test_a_request_may_take_longer_than_its_head(
    engine: Engine, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client_of(make_kit(engine, clock)) as client:
        monkeypatch.setattr("kitrocket.server._HEAD_SECONDS", 0.5)
        async with await anyio.connect_tcp("127.0.0.1", client.base_url.port or 0) as stream:
            headers = "".join(f"{name}: {value}\r\n" for name, value in headers_of(clock, HARMLESS).items())
            head = f"POST /webhooks/dodo HTTP/1.1\r\nHost: x\r\nContent-Length: {len(HARMLESS)}\r\n{headers}\r\n"
            await stream.send(head.encode())
            await anyio.sleep(0.7)  # longer than the limit, which is over with the head
            await stream.send(HARMLESS)
            assert (await stream.receive()).startswith(b"HTTP/1.1 200")


async def test_it_is_not_ready_while_a_migration_is_missing(engine: Engine, clock: ManualClock) -> None:
    async with client_of(make_kit(engine, clock)) as client:
        assert (await client.get("/readyz")).status_code == 200
        await engine.fetch("UPDATE migration SET app_name = 'other'")
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["reason"]) == (503, "SchemaNotMigratedError")
        await engine.fetch("UPDATE migration SET app_name = 'kitrocket'")
        assert (await client.get("/readyz")).status_code == 200


async def test_metrics_say_how_much_usage_waits_for_its_export(engine: Engine, clock: ManualClock) -> None:
    user_id = await factories.make_user(engine)
    await engine.fetch(
        "INSERT INTO kitrocket.usage_outbox (usage_id, user_id, created_at, next_at, state, error)"
        " VALUES ('a', $1, $2, $2, 'pending', 'HTTP 503'), ('b', $1, $3, $3, 'pending', 'no customer'),"
        " ('c', $1, $3, $3, 'parked', 'HTTP 422')",
        user_id,
        to_db(clock() - timedelta(minutes=31)),
        to_db(clock() - timedelta(days=2)),
    )
    async with client_of(make_kit(engine, clock)) as client:
        answer = await client.get("/metrics")
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        told = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
        assert told == {
            "kitrocket_usage_export_pending": "2",
            "kitrocket_usage_export_waiting": "1",
            "kitrocket_usage_export_parked": "1",
            "kitrocket_usage_export_oldest_seconds": "1860.0",
        }
        assert answer.text.count("# TYPE") == 4
        await engine.fetch("DROP TABLE kitrocket.usage_outbox")
        assert (await client.get("/metrics")).status_code == 503


# -- the process ------------------------------------------------------------------------------------------------------


#: Has a process say on which event loop it opens its engine.
TELL_LOOP = """
import asyncio, sys
from kitrocket import Engine
open_engine = Engine.open
async def tell(engine):
    print("served on", type(asyncio.get_running_loop()).__module__, file=sys.stderr)
    await open_engine(engine)
Engine.open = tell
"""


@contextmanager
def process(database_url: str, *arguments: str, before: str = "") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """``kitrocket serve`` in a process of its own, and its port. It is killed when the block is left.

    ``before`` is code that runs there first.
    """
    environment = os.environ | {"DATABASE_URL": database_url, "DODO_PAYMENTS_WEBHOOK_KEY": KEY}
    code = f"{before}\nfrom kitrocket.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--port", "0", *arguments]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            assert running.stdout is not None
            assert running.stderr is not None
            line = running.stdout.readline()
            assert line.startswith("webhooks"), line + running.stderr.read()
            yield running, urlsplit(line.split()[1]).port or 0
        finally:
            running.kill()


def is_refused(port: int) -> bool:
    """Whether nobody listens any more."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            return False
    except ConnectionRefusedError:
        return True


@pytest.mark.direct
async def test_sigterm_finishes_what_is_in_flight_and_exits_0_within_5_seconds(
    engine: Engine, database_url: str
) -> None:
    with process(database_url, "--no-studio") as (running, port):
        headers = sign_webhook(HARMLESS, key=KEY, webhook_id="msg_1", at=utc_now())
        head = "POST /webhooks/dodo HTTP/1.1\r\nHost: x\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items())
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            await stream.send(f"{head}Expect: 100-continue\r\nContent-Length: {len(HARMLESS)}\r\n\r\n".encode())
            # This answer comes once the request has begun.
            assert b"100" in await stream.receive()
            running.send_signal(signal.SIGTERM)
            begun = monotonic()
            while not await anyio.to_thread.run_sync(is_refused, port):
                assert monotonic() - begun < 5
            assert running.poll() is None
            await stream.send(HARMLESS)
            answer = await stream.receive()
        assert answer.startswith(b"HTTP/1.1 200")
        assert await anyio.to_thread.run_sync(lambda: running.wait(timeout=10)) == 0
        assert monotonic() - begun < 5
        assert await engine.fetchval("SELECT state FROM kitrocket.webhook_events") == "ignored"


@pytest.mark.direct
@pytest.mark.parametrize(
    ("number", "before", "loop"),
    [
        (signal.SIGTERM, "", "uvloop"),
        (signal.SIGINT, "import sys; sys.modules['uvloop'] = None  # as if it were missing\n", "asyncio.unix_events"),
    ],
)
async def test_a_request_that_never_ends_does_not_hold_it_up_on_either_event_loop(
    database_url: str, number: signal.Signals, before: str, loop: str
) -> None:
    with process(database_url, "--no-studio", before=before + TELL_LOOP) as (running, port):
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            await stream.send(
                b"POST /webhooks/dodo HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n"
            )
            assert b"100" in await stream.receive()
            begun = monotonic()
            running.send_signal(number)
            assert await anyio.to_thread.run_sync(lambda: running.wait(timeout=10)) == 0
            assert monotonic() - begun < 5
        assert running.stderr is not None
        first, second, *_ = running.stderr.read().splitlines()
        assert first == f"served on {loop}"
        assert second.endswith(f"Started server process [{running.pid}]")


@pytest.mark.direct
async def test_a_database_that_is_not_migrated_is_one_line_and_exit_code_1(empty_database_url: str) -> None:
    done = await anyio.run_process(
        [sys.executable, "-c", "from kitrocket.cli import main; main()", "serve", "--port", "0"],
        env=os.environ | {"DATABASE_URL": empty_database_url, "DODO_PAYMENTS_WEBHOOK_KEY": KEY},
        check=False,
    )
    assert done.returncode == 1
    [line] = done.stderr.decode().splitlines()
    assert "kitrocket db migrate" in line
