"""What an application's tests need: a migrated database for each test, a clock to set, signed webhooks.

``pytest -p kitrocket.testing``, best put into ``addopts`` of the application's ``pyproject.toml``, gives the fixtures
``kitrocket_server``, ``kitrocket_database_url`` and ``kitrocket_clock``. ``KITROCKET_TEST_DSN`` names a PostgreSQL of
your own; without it the embedded one is started in a temporary folder, and stopped afterwards.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import asyncpg
import pytest

from kitrocket.dodo.signature import sign as sign_webhook
from kitrocket.embedded import EmbeddedServer
from kitrocket.engine import Engine
from kitrocket.migrations import migrate

__all__ = ["ManualClock", "PostgresServer", "sign_webhook"]

T = TypeVar("T")

_numbers = itertools.count(1)


class ManualClock:
    """A :data:`~kitrocket.clock.Clock` that stands still until it is told to move."""

    def __init__(self, now: datetime = datetime(2026, 3, 1, 12, tzinfo=UTC)) -> None:
        if now.tzinfo is None:
            raise ValueError("the clock needs a timezone-aware datetime")
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, by: timedelta) -> datetime:
        """Move the clock by a duration, which may be negative, and return the new instant."""
        self.now += by
        return self.now


@dataclass(frozen=True)
class PostgresServer:
    """A PostgreSQL on which tests may create databases, known by the URL of no database in particular."""

    dsn: str

    def url(self, database: str) -> str:
        """Return the URL of one of its databases."""
        return urlunsplit(urlsplit(self.dsn)._replace(path=f"/{database}"))

    async def create(self, *, template: str = "template0") -> str:
        """Create a database, as a copy of another, and return its name. Copying a migrated one takes about 12 ms."""
        name = f"kitrocket_test_{os.getpid()}_{next(_numbers)}"
        await self._run(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY wal_log")
        return name

    async def create_migrated(self) -> str:
        """Create a database, migrate it, and return its name: a template for others."""
        name = await self.create()
        async with Engine(self.url(name)) as engine:
            await migrate(engine)
        return name

    async def drop(self, database: str) -> None:
        """Drop a database, cutting who is still connected."""
        await self._run(f"DROP DATABASE {database} WITH (FORCE)")

    async def _run(self, sql: str) -> None:
        connection = await asyncpg.connect(self.url("postgres"))
        try:
            await connection.execute(sql)
        finally:
            await connection.close()


@contextmanager
def throwaway_server() -> Iterator[PostgresServer]:
    """The server that ``KITROCKET_TEST_DSN`` names, else an embedded one in a temporary folder, without fsync."""
    dsn = os.environ.get("KITROCKET_TEST_DSN")
    if dsn:
        yield PostgresServer(dsn)
        return
    folder = Path(tempfile.mkdtemp(prefix="kitrocket-tests-"))
    folder.chmod(0o755)  # the account that runs the server for root must reach its data
    embedded = EmbeddedServer(folder / "pg", fsync=False, options={"max_connections": "200"})
    try:
        address = embedded.start()
        yield PostgresServer(
            f"postgres:///?host={quote(address.host, safe='')}&port={address.port}&user={address.user}"
        )
    finally:
        embedded.release()
        shutil.rmtree(folder)


def _in_a_thread(work: Coroutine[Any, Any, T]) -> T:
    """Run async work from a fixture that any kind of test may use, whatever event loop the test has."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


@pytest.fixture(scope="session")
def kitrocket_server() -> Iterator[PostgresServer]:
    """The run's PostgreSQL."""
    with throwaway_server() as server:
        yield server


@pytest.fixture(scope="session")
def kitrocket_template(kitrocket_server: PostgresServer) -> Iterator[str]:
    """The name of a migrated database without rows, to be copied."""
    name = _in_a_thread(kitrocket_server.create_migrated())
    yield name
    _in_a_thread(kitrocket_server.drop(name))


@pytest.fixture
def kitrocket_database_url(kitrocket_server: PostgresServer, kitrocket_template: str) -> Iterator[str]:
    """The URL of a migrated database of this test's own."""
    name = _in_a_thread(kitrocket_server.create(template=kitrocket_template))
    yield kitrocket_server.url(name)
    _in_a_thread(kitrocket_server.drop(name))


@pytest.fixture
def kitrocket_clock() -> ManualClock:
    """A clock that stands at 2026-03-01 12:00 UTC until it is told to move."""
    return ManualClock()
