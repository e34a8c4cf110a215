"""A real PostgreSQL for every test that touches data: a server a run, a template made by migrations, a clone a test.

``KITROCKET_TEST_DSN`` names another server (its role must be allowed to create databases), and
``KITROCKET_TEST_POOLER_DSN`` a pooler before it; both without a database name.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import argon2
import asyncpg
import hypothesis
import pytest
import pytest_asyncio

from dodo_server import DodoServer
from kitrocket import passwords
from kitrocket.engine import Engine
from kitrocket.testing import ManualClock, PostgresServer
from servers import Server

#: What a developer's shell, or a CI that colours its log, may say and no test may depend on.
_STRANGE = ("DATABASE_", "DODO_PAYMENTS_", "KITROCKET_", "PG", "PICCOLO_CONF", "NO_COLOR", "FORCE_COLOR", "PY_COLORS")
_STRANGE += ("CLICOLOR", "COLUMNS", "LINES", "TTY_", "TERMINAL_WIDTH", "GITHUB_ACTIONS", "_TYPER_", "TYPER_")
_WANTED = ("KITROCKET_TEST_", "KITROCKET_SCALE_", "KITROCKET_SCREENSHOT", "PGPASS", "PGSSL")

for _name in [name for name in os.environ if name.startswith(_STRANGE) and not name.startswith(_WANTED)]:
    del os.environ[_name]
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
os.umask(0o022)

# A busy machine takes as long as it takes; fixtures that hypothesis sees are those of one test.
hypothesis.settings.register_profile(
    "kitrocket",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("kitrocket")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what cannot hold where the run takes place, and say so."""
    left_out = {
        "embedded": "KITROCKET_TEST_DSN" in os.environ and "this run uses another server than the embedded one",
        "direct": "KITROCKET_TEST_POOLER_DSN" in os.environ and "this test needs a direct connection",
    }
    for item in items:
        for marker, reason in left_out.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def server(kitrocket_server: PostgresServer) -> Server:
    """The run's PostgreSQL."""
    pooler = os.environ.get("KITROCKET_TEST_POOLER_DSN")
    return Server(kitrocket_server, PostgresServer(pooler) if pooler else None)


@pytest.fixture(scope="session")
def template(kitrocket_template: str) -> str:
    """The name of a migrated database without rows, to be cloned."""
    return kitrocket_template


@pytest_asyncio.fixture
async def database(server: Server, template: str) -> AsyncIterator[str]:
    """The name of a migrated database of this test's own."""
    name = await server.direct.create(template=template)
    yield name
    await server.direct.drop(name)


@pytest_asyncio.fixture
async def turn_with_roles(server: Server) -> AsyncIterator[None]:
    """Keep other workers from making roles, and from looking for some: one server may be that of all."""
    turn = await asyncpg.connect(server.direct.url("postgres"))
    try:
        await turn.execute("SELECT pg_advisory_lock(hashtext('roles'))")
        yield
    finally:
        await turn.close()


@pytest_asyncio.fixture
async def empty_database(server: Server) -> AsyncIterator[str]:
    """The name of an empty database of this test's own."""
    name = await server.direct.create()
    yield name
    await server.direct.drop(name)


@pytest_asyncio.fixture
async def second_database(server: Server, template: str) -> AsyncIterator[str]:
    """The name of another migrated database of this test's own."""
    name = await server.direct.create(template=template)
    yield name
    await server.direct.drop(name)


@pytest.fixture
def database_url(server: Server, database: str) -> str:
    """The URL of a migrated database of this test's own."""
    return server.url(database)


@pytest.fixture
def empty_database_url(server: Server, empty_database: str) -> str:
    """The URL of an empty database of this test's own, past any pooler."""
    return server.url(empty_database, direct=True)


@pytest_asyncio.fixture
async def engine(server: Server, database: str) -> AsyncIterator[Engine]:
    """An open engine on a migrated database of this test's own."""
    async with server.engine(database) as engine:
        yield engine


@pytest.fixture
def clock() -> ManualClock:
    """A clock that stands at 2026-03-01 12:00 UTC until it is told to move."""
    return ManualClock()


@pytest.fixture
def cheap_hashes(monkeypatch: pytest.MonkeyPatch) -> argon2.PasswordHasher:
    """New passwords are hashed with the least that argon2 allows: for tests whose subject is something else."""
    hasher = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    monkeypatch.setattr(passwords, "_ARGON2", hasher)
    monkeypatch.setattr(passwords, "_DUMMY", hasher.hash("nobody's"))
    return hasher


@pytest_asyncio.fixture
async def dodo() -> AsyncIterator[DodoServer]:
    """A provider to ask, on loopback."""
    server = DodoServer()
    async with server.running():
        yield server
