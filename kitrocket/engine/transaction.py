"""Transactions that give their connection back whatever happens, and nest as savepoints."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from contextvars import ContextVar
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import anyio
import asyncpg
from piccolo.engine.postgres import PostgresTransaction

from kitrocket.engine.translation import raise_ours
from kitrocket.errors import DatabaseUnavailableError, TransactionError

if TYPE_CHECKING:
    from kitrocket.engine.engine import Engine

#: How long the end of a transaction and the closing of a pool may take, in seconds, before the connection is cut.
END_LIMIT = 5.0


class Transaction(PostgresTransaction):
    """A transaction that gives its connection back whatever happens, and nests as a savepoint.

    It belongs to the task that entered it. Used from a child task it raises :class:`TransactionError`, since a
    connection runs one statement at a time.
    """

    __slots__ = ("_begin", "_depth", "_limits", "closed", "owner")

    engine: Engine
    _parent: Transaction | None

    def __init__(
        self,
        engine: Engine,
        allow_nested: bool = True,
        *,
        lock_timeout: timedelta | None = None,
        statement_timeout: timedelta | None = None,
        read_committed: bool = False,
    ) -> None:
        super().__init__(engine, allow_nested)
        self._begin = "BEGIN ISOLATION LEVEL READ COMMITTED" if read_committed else "BEGIN"
        limits = {"lock_timeout": lock_timeout, "statement_timeout": statement_timeout}
        self._limits = "".join(
            f"; SET LOCAL {name} = {limit // timedelta(milliseconds=1)}"
            for name, limit in limits.items()
            if limit is not None
        )
        self.closed = False
        self.owner: asyncio.Task[Any] | None = None
        self._depth = 0

    async def __aenter__(self) -> Transaction:
        self.owner = asyncio.current_task()
        self._parent = self.engine.current_transaction.get()
        self._depth = self._parent._depth + 1 if self._parent else 0
        self.connection = self._parent.connection if self._parent else await self.engine.acquire()
        try:
            await self.begin()
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self._give_back()
            if isinstance(error, Exception):
                raise_ours(error)
            raise
        self.engine.current_transaction.set(self)
        return self

    async def begin(self) -> None:
        # In one message, since a round trip is what a short transaction waits for most.
        begin = f"SAVEPOINT {self._savepoint}" if self._parent else self._begin
        await self.connection.execute(begin + self._limits)

    async def commit(self) -> None:
        """Commit, or release the savepoint.

        PostgreSQL answers the COMMIT of a failed transaction with a ROLLBACK and no error; that raises
        :class:`TransactionError` here, lest a lost write pass for a stored one.
        """
        if self._parent:
            await self.connection.execute(f"RELEASE SAVEPOINT {self._savepoint}")
        elif await self.connection.execute("COMMIT") == "ROLLBACK":
            raise TransactionError("a statement of this transaction had failed, so nothing was committed")
        self._committed = True

    async def rollback(self) -> None:
        if self._parent:
            await self.connection.execute(f"ROLLBACK TO SAVEPOINT {self._savepoint}")
            await self.connection.execute(f"RELEASE SAVEPOINT {self._savepoint}")
        else:
            await self.connection.execute("ROLLBACK")
        self._rolled_back = True

    async def __aexit__(
        self, kind: type[BaseException] | None, exception: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]:
        try:
            with anyio.move_on_after(END_LIMIT, shield=True) as limit:
                await self._end(failed=exception is not None)
            if limit.cancelled_caught:
                self.connection.terminate()
                if exception is None:
                    raise DatabaseUnavailableError(
                        "COMMIT was not answered; whether the transaction counts is unknown"
                    ) from TimeoutError()
        finally:
            self.closed = True
            self.engine.current_transaction.set(self._parent)
            with anyio.CancelScope(shield=True):
                await self._give_back()
        return False

    async def _end(self, *, failed: bool) -> None:
        if self._committed or self._rolled_back:
            return
        if failed:
            # When the server is gone the rollback fails too, and must not hide the error that came first.
            with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                await self.rollback()
            return
        try:
            await self.commit()
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as error:
            if self._parent:
                with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                    await self.rollback()
            raise_ours(error)
            raise

    async def _give_back(self) -> None:
        if self._parent is None:
            await self.engine.give_back(self.connection)

    @property
    def _savepoint(self) -> str:
        return f"kitrocket_{self._depth}"


class CurrentTransaction:
    """The transaction of the running task: nothing once it is closed, an error in a task that does not own it."""

    def __init__(self) -> None:
        self._variable: ContextVar[Transaction | None] = ContextVar("kitrocket_current_transaction", default=None)

    def get(self) -> Transaction | None:
        """Return the innermost open transaction; raise :class:`TransactionError` in a task that does not own it."""
        transaction = self._variable.get()
        while transaction is not None and transaction.closed:
            transaction = transaction._parent
        if transaction is not None and transaction.owner is not asyncio.current_task():
            raise TransactionError(
                "this task was started inside a transaction of another task; start child tasks outside of it "
                "(asyncio.wait_for before Python 3.12 and Starlette's BaseHTTPMiddleware start one too)"
            )
        return transaction

    def set(self, transaction: Transaction | None) -> None:
        """Make a transaction, or none, the current one of this task."""
        self._variable.set(transaction)
