"""The engine itself.

:class:`Engine` is a Piccolo ``PostgresEngine``, so it is what ``piccolo_conf.DB`` holds: Piccolo's queries, its
migrations, Piccolo Admin and kitrocket's services share one pool and one transaction. Beyond Piccolo's engine it
does not connect when constructed, speaks UTC on every connection, survives cancellation, nests transactions as
savepoints, and runs any query on itself whatever ``piccolo_conf`` names (:meth:`Engine.run`).
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import asyncpg
from piccolo.engine.postgres import PostgresEngine
from piccolo.query.base import Query
from piccolo.querystring import QueryString
from pydantic import SecretStr

from kitrocket.engine.dsn import connection_arguments, is_transaction_pooler
from kitrocket.engine.held import HeldConnection
from kitrocket.engine.transaction import END_LIMIT, CurrentTransaction, Transaction
from kitrocket.engine.translation import Fault, fault_of, raise_ours
from kitrocket.errors import ConfigurationError, DatabaseUnavailableError
from kitrocket.settings import Settings

if TYPE_CHECKING:
    from kitrocket.embedded import EmbeddedServer

T = TypeVar("T")


async def _no_reset(_connection: object) -> None:
    """Reset nothing: no SET, LISTEN or session lock ever stays on a pooled connection, and a round trip is saved."""


class Engine(PostgresEngine):
    """PostgreSQL, pooled.

    ``url`` is a ``postgres://`` URL; its ``sslmode`` and ``sslrootcert`` are honoured, and a host that is not local
    is spoken to over verified TLS unless the URL says otherwise. Without a URL the settings of the environment
    (``DATABASE_URL``, …) decide when the engine first connects, and without one there, ``embedded`` does: a real
    PostgreSQL started on first use.

    ``pooler`` says that PgBouncer or Supavisor in transaction mode stands before PostgreSQL (default: the URL's port is
    6543); migrations and LISTEN then need ``direct_url``. ``replicas`` are read-only copies by name:
    ``engine.run(query, node="…")``. ``pool_size`` is the largest number of pooled connections; ``acquire_timeout``
    the longest wait for one; ``command_timeout`` the longest a statement may take.

    Constructing an engine does no input or output.
    """

    current_transaction: CurrentTransaction  # type: ignore[assignment]  # a ContextVar that knows its owner

    def __init__(
        self,
        url: str | SecretStr | None = None,
        *,
        direct_url: str | SecretStr | None = None,
        pooler: bool | None = None,
        replicas: Mapping[str, str | SecretStr] | None = None,
        pool_size: int = 10,
        acquire_timeout: timedelta = timedelta(seconds=10),
        command_timeout: timedelta = timedelta(seconds=60),
        embedded: EmbeddedServer | None = None,
        log_queries: bool = False,
        log_responses: bool = False,
    ) -> None:
        self._url = _text(url)
        self._direct_url = _text(direct_url)
        self._from_environment = url is None and embedded is None
        self._pooler = pooler
        self._pool_size = pool_size
        self._acquire_timeout = acquire_timeout.total_seconds()
        self._command_timeout = command_timeout.total_seconds()
        self._embedded = embedded
        self._opened = 0
        self._opening = anyio.Lock()
        self._pool_loop: asyncio.AbstractEventLoop | None = None
        super().__init__(
            config={},
            log_queries=log_queries,
            log_responses=log_responses,
            extra_nodes={name: self._replica(replica) for name, replica in (replicas or {}).items()},
        )
        self.current_transaction = CurrentTransaction()

    def _replica(self, url: str | SecretStr) -> Engine:
        return Engine(
            url,
            pooler=self._pooler,
            pool_size=self._pool_size,
            acquire_timeout=timedelta(seconds=self._acquire_timeout),
            command_timeout=timedelta(seconds=self._command_timeout),
        )

    async def check_version(self) -> None:
        """Do nothing: Piccolo's engine connects here, when constructed."""

    async def prep_database(self) -> None:
        """Do nothing: Piccolo's engine connects here, when constructed."""

    # -- opening and closing ------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Start the pools of this engine and its replicas. Each ``open`` wants its ``close``; the last one closes.

        Raises :class:`DatabaseUnavailableError` when PostgreSQL cannot be reached, :class:`ConfigurationError` when
        the pool is open in another event loop.
        """
        async with self._opening:
            if self._opened and self._pool_loop is not asyncio.get_running_loop():
                raise ConfigurationError(
                    "this engine is open in another event loop; give each loop an engine of its own"
                )
            if self._opened == 0:
                await self._start()
            self._opened += 1

    async def close(self) -> None:
        """Close what the last remaining :meth:`open` started; connections still in use after 5 s are cut."""
        async with self._opening:
            if self._opened == 0:
                return
            self._opened -= 1
            if self._opened == 0:
                await self._stop()

    async def __aenter__(self) -> Engine:
        await self.open()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        with anyio.CancelScope(shield=True):
            await self.close()

    async def start_connection_pool(self, **_kwargs: Any) -> None:
        """Open the engine: Piccolo's name for :meth:`open`."""
        await self.open()

    async def close_connection_pool(self) -> None:
        """Close the engine: Piccolo's name for :meth:`close`."""
        await self.close()

    async def _start(self) -> None:
        self._pool_loop = asyncio.get_running_loop()
        try:
            arguments = await self._arguments()
            self.pool = await asyncpg.create_pool(**arguments, min_size=1, max_size=self._pool_size, reset=_no_reset)
            for replica in self.extra_nodes.values():
                await replica.start_connection_pool()
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self._stop()
            if isinstance(error, Exception):
                raise_ours(error)
            raise

    async def _stop(self) -> None:
        for replica in self.extra_nodes.values():
            if replica.pool is not None:
                await replica.close_connection_pool()
        pool, self.pool = self.pool, None
        if pool is not None:
            with anyio.move_on_after(END_LIMIT, shield=True) as limit:
                await pool.close()
            if limit.cancelled_caught:
                pool.terminate()
        if self._embedded is not None:
            await self._embedded.arelease()

    async def _arguments(self, *, direct: bool = False) -> dict[str, Any]:
        """What asyncpg needs in order to connect; starts the embedded server when there is no URL."""
        if self._from_environment:
            self._read_environment(Settings())
        url = self._direct_url if direct and self._direct_url else self._url
        if url is not None:
            if direct and self.pooler and self._direct_url is None:
                raise ConfigurationError(
                    "DATABASE_URL leads to a pooler in transaction mode; migrations, locks and LISTEN need a direct "
                    "connection: set DATABASE_DIRECT_URL"
                )
            arguments = connection_arguments(url, pooler=self.pooler and not direct)
        else:
            if self._embedded is None:
                raise ConfigurationError("there is neither a URL nor an embedded server")
            address = await self._embedded.astart()
            arguments = connection_arguments(None, pooler=False) | address.dsn_kwargs()
        return arguments | {"command_timeout": self._command_timeout, "timeout": self._acquire_timeout}

    def _read_environment(self, settings: Settings) -> None:
        self._url = _text(settings.database_url)
        self._direct_url = _text(settings.database_direct_url)
        self._pooler = settings.database_pooler
        if self.pool is None:
            self._pool_size = settings.database_pool_size
            self.extra_nodes = {name: self._replica(url) for name, url in settings.database_replicas.items()}
        if self._url is None and self._embedded is None:
            from kitrocket.embedded import EmbeddedServer  # on first use: it needs a POSIX system

            self._embedded = EmbeddedServer(settings.data_dir, bin_dir=settings.pg_bin, account=settings.pg_account)

    @property
    def pooler(self) -> bool:
        """Whether a pooler in transaction mode stands before PostgreSQL."""
        return self._pooler if self._pooler is not None else is_transaction_pooler(self._url)

    @property
    def is_embedded(self) -> bool:
        """Whether this engine runs, or would run, on the embedded server; known once it has connected."""
        return self._url is None and self._embedded is not None

    @property
    def embedded(self) -> EmbeddedServer | None:
        """The embedded server this engine starts, if it is on one."""
        return self._embedded if self._url is None else None

    # -- connections --------------------------------------------------------------------------------------------

    async def acquire(self) -> Any:
        """Take a connection from the pool, or make one when the engine is not open. Hand it to :meth:`give_back`."""
        try:
            if self.pool is None:
                return await self.get_new_connection()
            if self._pool_loop is not asyncio.get_running_loop():
                raise ConfigurationError(
                    "this engine is open in another event loop; give each loop an engine of its own"
                )
            return await self.pool.acquire(timeout=self._acquire_timeout)
        except TimeoutError as error:
            raise DatabaseUnavailableError(f"no connection came free within {self._acquire_timeout:g} s") from error
        except Exception as error:
            raise_ours(error)
            raise

    async def give_back(self, connection: Any) -> None:
        """Return what :meth:`acquire` gave. A connection that cannot be cleaned is cut; the pool makes a new one."""
        if isinstance(connection, asyncpg.pool.PoolConnectionProxy):
            holder = connection._holder
            with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError):
                await holder._pool.release(connection, timeout=END_LIMIT)
        elif not connection.is_closed():
            with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                await connection.close(timeout=END_LIMIT)

    async def get_new_connection(self, *, timed: bool = True) -> Any:
        """Return a connection outside the pool; the caller closes it, and keeps to the time-out if not ``timed``."""
        arguments = await self._arguments()
        return await asyncpg.connect(**arguments if timed else arguments | {"command_timeout": None})

    async def connect_direct(self) -> asyncpg.Connection[asyncpg.Record]:
        """Return a connection of its own past any pooler; the caller closes it. Raises as :meth:`direct`."""
        try:
            return await asyncpg.connect(**await self._arguments(direct=True))
        except Exception as error:
            raise_ours(error)
            raise

    @asynccontextmanager
    async def direct(self) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        """A connection of its own past any pooler, for session locks, LISTEN and migrations.

        Raises :class:`ConfigurationError` behind a pooler without ``direct_url``.
        """
        connection = await self.connect_direct()
        try:
            yield connection
        finally:
            with anyio.move_on_after(END_LIMIT, shield=True) as limit:
                await connection.close()
            if limit.cancelled_caught:
                connection.terminate()

    def hold(self, *, timeout: timedelta | None = None) -> HeldConnection:
        """A connection of its own for a hot statement; it connects on first use. Close it with ``aclose``.

        ``timeout`` is the longest that a statement may take; by default the command time-out.
        """
        return HeldConnection(self, self._command_timeout if timeout is None else timeout.total_seconds())

    # -- queries ------------------------------------------------------------------------------------------------

    def transaction(
        self,
        allow_nested: bool = True,
        *,
        lock_timeout: timedelta | None = None,
        statement_timeout: timedelta | None = None,
        read_committed: bool = False,
    ) -> Transaction:
        """``async with engine.transaction():`` everything in it that runs on this engine commits together.

        Inside another one it is a savepoint. It is safe under cancellation, and belongs to its task. The limits bound
        how long each statement from here to the end of the outermost transaction waits for a lock, and runs.
        ``read_committed`` says that each statement needs a snapshot of its own, whatever the role's default is.
        """
        return Transaction(
            self,
            allow_nested,
            lock_timeout=lock_timeout,
            statement_timeout=statement_timeout,
            read_committed=read_committed,
        )

    def in_transaction(self) -> bool:
        """Whether the running task is inside a transaction of this engine."""
        return self.current_transaction.get() is not None

    async def fetch(self, sql: str, *arguments: Any, node: str | None = None) -> list[asyncpg.Record]:
        """Run a statement with ``$1`` parameters and return its rows.

        On the connection of the current transaction if there is one, else on one of the pool. ``node`` names a
        replica, which leaves the transaction. Raises kitrocket's errors for constraints and lost connections, the
        driver's, without its DETAIL, for the rest.
        """
        if node is not None:
            return await self._node(node).fetch(sql, *arguments)
        try:
            transaction = self.current_transaction.get()
            if transaction is not None:
                return await transaction.connection.fetch(sql, *arguments)  # type: ignore[no-any-return]  # Piccolo's is untyped
            connection = await self.acquire()
            try:
                return await connection.fetch(sql, *arguments)  # type: ignore[no-any-return]  # as above
            finally:
                with anyio.CancelScope(shield=True):
                    await self.give_back(connection)
        except Exception as error:
            raise_ours(error)
            raise

    async def fetchrow(self, sql: str, *arguments: Any, node: str | None = None) -> asyncpg.Record | None:
        """Run a statement that gives at most one row, and return it. See :meth:`fetch`."""
        rows = await self.fetch(sql, *arguments, node=node)
        return rows[0] if rows else None

    async def fetchval(self, sql: str, *arguments: Any, node: str | None = None) -> Any:
        """Run a statement and return the first column of its first row, or ``None``. See :meth:`fetch`."""
        row = await self.fetchrow(sql, *arguments, node=node)
        return None if row is None else row[0]

    async def run(self, query: Query[Any, Any], *, node: str | None = None) -> Any:
        """Run a Piccolo query on this engine, whatever ``piccolo_conf`` names. Raises as :meth:`fetch`."""
        choose_conf()
        results: list[Any] = []
        for querystring in query.querystrings:
            template, arguments = querystring.compile_string(engine_type=self.engine_type)
            results.append(await query._process_results(await self.fetch(template, *arguments, node=node)))
        return results[0] if len(results) == 1 else results

    async def copy(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Add rows to a table with COPY, all of them or none; for many rows it takes less time than any INSERT.

        Raises as :meth:`fetch`. PostgreSQL refuses it to a role that row-level security binds on the table.
        """
        try:
            async with self._connection() as connection:
                await connection.copy_records_to_table(table, columns=columns, records=rows)
        except Exception as error:
            raise_ours(error)
            raise

    async def retry(
        self,
        unit: Callable[[], Awaitable[T]],
        *,
        idempotent: bool = False,
        attempts: int = 5,
        deadline: timedelta = timedelta(seconds=30),
    ) -> T:
        """Run ``unit`` and run it again, jittered, when that is safe.

        Safe is what was rolled back for certain (serialization failure, deadlock: at most ``attempts`` times) and
        what never reached the server (until ``deadline``). ``idempotent`` says that the unit is safe by keys of its
        own, so that it may also be repeated when its outcome is unknown. Inside a transaction it runs once: only the
        whole transaction can be repeated.
        """
        if self.in_transaction():
            return await unit()
        # A pool can hand out as many dead connections as it holds, and each costs an attempt.
        budget = {Fault.ROLLED_BACK: attempts, Fault.UNKNOWN: attempts + self._pool_size}
        give_up_at = anyio.current_time() + deadline.total_seconds()
        pause = 0.01
        while True:
            try:
                return await unit()
            except Exception as error:
                fault = fault_of(error)
                if fault is Fault.NEVER or (fault is Fault.UNKNOWN and not idempotent):
                    raise
                if fault in budget:
                    budget[fault] -= 1
                    if budget[fault] <= 0:
                        raise
                if anyio.current_time() >= give_up_at:
                    raise
            await anyio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - jitter is no secret
            pause = min(pause * 2, 1.0)

    async def run_querystring(self, querystring: QueryString, in_pool: bool = True) -> Any:
        """Piccolo's door: one query on the transaction's connection, else on the pool's; errors are the driver's."""
        template, arguments = querystring.compile_string(engine_type=self.engine_type)
        return await self._run_plain(template, arguments)

    async def run_ddl(self, ddl: str, in_pool: bool = True) -> Any:
        """Piccolo's door for DDL."""
        return await self._run_plain(ddl, [])

    async def _run_plain(self, sql: str, arguments: Sequence[Any]) -> Any:
        query_id = self.get_query_id()
        if self.log_queries:
            self.print_query(query_id=query_id, query=sql)
        async with self._connection() as connection:
            response = await connection.fetch(sql, *arguments)
        if self.log_responses:
            self.print_response(query_id=query_id, response=response)
        return response

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        """The connection of the current transaction, else one of the pool until the block is left."""
        transaction = self.current_transaction.get()
        if transaction is not None:
            yield transaction.connection
            return
        connection = await self.acquire()
        try:
            yield connection
        finally:
            with anyio.CancelScope(shield=True):
                await self.give_back(connection)

    def _node(self, name: str) -> Engine:
        replica = self.extra_nodes.get(name)
        if not isinstance(replica, Engine):
            raise ConfigurationError(f"there is no replica named {name!r}; there are: {sorted(self.extra_nodes)}")
        return replica


def choose_conf() -> str:
    """Settle which ``piccolo_conf`` module this process uses, and return its name.

    The module that ``PICCOLO_CONF`` names, else an importable ``piccolo_conf``, else ``kitrocket.conf``. Piccolo reads
    the choice from the environment alone, so that is where it is left.
    """
    if not os.environ.get("PICCOLO_CONF"):
        found = importlib.util.find_spec("piccolo_conf") is not None
        os.environ["PICCOLO_CONF"] = "piccolo_conf" if found else "kitrocket.conf"
    return os.environ["PICCOLO_CONF"]


def _text(url: str | SecretStr | None) -> str | None:
    return url.get_secret_value() if isinstance(url, SecretStr) else url
