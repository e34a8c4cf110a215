"""A real PostgreSQL for every test that touches data: a server a run, a template made by migrations, a clone a test.

``KITROCKET_TEST_DSN`` names another server (its role must be allowed to create databases), and
``KITROCKET_TEST_POOLER_DSN`` a pooler before it; both without a database name.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest
import pytest_asyncio

from kitrocket.embedded import EmbeddedServer
from kitrocket.engine import Engine
from kitrocket.migrations import migrate
from kitrocket.testing import ManualClock
from servers import Server

_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what cannot hold where the run takes place, and say so."""
    external = os.environ.get("KITROCKET_TEST_DSN")
    for item in items:
        if external and item.get_closest_marker("embedded"):
            item.add_marker(pytest.mark.skip(reason="this run uses another server than the embedded one"))
        if os.environ.get("KITROCKET_TEST_POOLER_DSN") and item.get_closest_marker("direct"):
            item.add_marker(pytest.mark.skip(reason="this test needs a direct connection, and this run has a pooler"))


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The run's PostgreSQL."""
    dsn = os.environ.get("KITROCKET_TEST_DSN")
    if dsn:
        yield Server(dsn, os.environ.get("KITROCKET_TEST_POOLER_DSN"))
        return
    folder = Path(tempfile.mkdtemp(prefix="kitrocket-tests-"))
    folder.chmod(0o755)
    embedded = EmbeddedServer(folder / "pg", fsync=False, options={"max_connections": "200"})
    address = embedded.start()
    try:
        yield Server(f"postgres:///?host={quote(address.host, safe='')}&port={address.port}&user={address.user}")
    finally:
        embedded.release()
        shutil.rmtree(folder)


async def _administer(server: Server, sql: str) -> None:
    connection = await asyncpg.connect(server.url("postgres", direct=True))
    try:
        await connection.execute(sql)
    finally:
        await connection.close()


@pytest_asyncio.fixture(scope="session")
async def template(server: Server) -> AsyncIterator[str]:
    """The name of a migrated database without rows, to be cloned."""
    name = f"kitrocket_template_{os.getpid()}"
    await _administer(server, f"CREATE DATABASE {name} TEMPLATE template0")
    async with Engine(server.url(name, direct=True)) as engine:
        await migrate(engine)
    yield name
    await _administer(server, f"DROP DATABASE {name} WITH (FORCE)")


async def _new_database(server: Server, template: str) -> AsyncIterator[str]:
    name = f"kitrocket_test_{os.getpid()}_{next(_numbers)}"
    await _administer(server, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY wal_log")
    yield name
    await _administer(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest_asyncio.fixture
async def database(server: Server, template: str) -> AsyncIterator[str]:
    """The name of a migrated database of this test's own."""
    async for name in _new_database(server, template):
        yield name


@pytest_asyncio.fixture
async def empty_database(server: Server) -> AsyncIterator[str]:
    """The name of an empty database of this test's own."""
    async for name in _new_database(server, "template0"):
        yield name


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
