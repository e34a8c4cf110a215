"""What kitrocket's raw migrations are made of: where their statements run, and indexes built under load.

A migration runs in one of two ways: by :func:`kitrocket.migrations.migrate`, which lends its connection
(:func:`lending`), or by Piccolo's own ``piccolo migrations forwards``, on the engine of ``piccolo_conf``.

Migrations import from here for ever, so the names may not change.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

import anyio
import asyncpg
from piccolo.engine import engine_finder

from kitrocket.errors import SchemaMismatchError

#: How long a statement that makes writers wait may itself wait for its lock, in PostgreSQL's notation.
LOCK_TIMEOUT = "1s"
#: The same for a concurrent build, which makes nobody wait: it must outlast the transactions that began before it.
BUILD_LOCK_TIMEOUT = "60s"
#: asyncpg's limit for one statement of a migration, in seconds, in place of the connection's ``command_timeout``.
STATEMENT_LIMIT = 86_400.0
#: How long tidying up after a failed build may take, in seconds; what is left the next build drops.
_TIDY_LIMIT = 5.0
_MOST_NAMED = 20

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

_lent: ContextVar[Connection | None] = ContextVar("kitrocket_migration_connection", default=None)


@contextmanager
def lending(connection: Connection) -> Iterator[None]:
    """Run the raw parts of migrations in this task on ``connection``, whatever ``piccolo_conf`` names."""
    token = _lent.set(connection)
    try:
        yield
    finally:
        _lent.reset(token)


async def execute(sql: str) -> None:
    """Run one statement of a migration, in its transaction if it has one."""
    connection = _lent.get()
    if connection is not None:
        await connection.execute(sql, timeout=STATEMENT_LIMIT)
        return
    engine = engine_finder()
    if engine is None:
        raise RuntimeError("piccolo_conf names no engine")
    await engine.run_ddl(sql)


@asynccontextmanager
async def _own_connection() -> AsyncIterator[Connection]:
    """The lent connection, else one of its own past any pooler: a concurrent build fits in no transaction."""
    connection = _lent.get()
    if connection is not None:
        yield connection
        return
    engine: Any = engine_finder()
    if hasattr(engine, "direct"):
        async with engine.direct() as connection:
            yield connection
        return
    connection = await engine.get_new_connection()
    try:
        yield connection
    finally:
        with anyio.CancelScope(shield=True):
            await connection.close(timeout=5)


@dataclass(frozen=True)
class ConcurrentIndex:
    """An index on one of the seed's tables, built and dropped while others write.

    ``definition`` is what follows the table's name. A unique one says by ``duplicates`` which rows stand in its way: a
    query whose one column is a line a person can act on, without secrets or e-mail addresses.
    """

    name: str
    table: str
    definition: str
    duplicates: str | None = None

    @property
    def create(self) -> str:
        """The statement that builds the index."""
        unique = "UNIQUE " if self.duplicates else ""
        return f"CREATE {unique}INDEX CONCURRENTLY IF NOT EXISTS {self.name} ON public.{self.table} {self.definition}"

    async def build(self) -> None:
        """Build the index unless it stands. What a killed build left is dropped first.

        Raises :class:`SchemaMismatchError` when rows are in the way; then nothing is left behind.
        """
        async with _own_connection() as connection, _patient(connection):
            valid = await self.is_valid(connection)
            if valid:
                return
            if valid is False:
                await self._drop(connection)
            await self.refuse_duplicates(connection)
            try:
                await connection.execute(self.create, timeout=STATEMENT_LIMIT)
            except BaseException as error:
                await self._tidy_up(connection)
                if isinstance(error, asyncpg.UniqueViolationError):
                    await self.refuse_duplicates(connection)
                raise

    async def drop(self) -> None:
        """Take the index away, without making writers wait."""
        async with _own_connection() as connection, _patient(connection):
            await self._drop(connection)

    async def _drop(self, connection: Connection) -> None:
        await connection.execute(f"DROP INDEX CONCURRENTLY IF EXISTS public.{self.name}", timeout=STATEMENT_LIMIT)

    async def _tidy_up(self, connection: Connection) -> None:
        """Drop what a failed build left, unless an older transaction holds that up."""
        with (
            anyio.move_on_after(_TIDY_LIMIT, shield=True),
            suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError),
        ):
            await connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
            await self._drop(connection)

    async def is_valid(self, connection: Connection) -> bool | None:
        """Whether the index is usable; ``None`` when there is none of this name."""
        valid: bool | None = await connection.fetchval(
            "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass($1)", f"public.{self.name}"
        )
        return valid

    async def refuse_duplicates(self, connection: Connection) -> None:
        """Raise :class:`SchemaMismatchError` with the rows that this unique index would refuse."""
        found = await self.find_duplicates(connection)
        if found:
            raise SchemaMismatchError(found)

    async def find_duplicates(self, connection: Connection) -> list[str]:
        """Return a line for each group of rows that this index would refuse, at most twenty."""
        if self.duplicates is None:
            return []
        rows = await connection.fetch(f"{self.duplicates} LIMIT {_MOST_NAMED + 1}", timeout=STATEMENT_LIMIT)
        lines: list[str] = [row[0] for row in rows[:_MOST_NAMED]]
        return [*lines, "… and more"] if len(rows) > _MOST_NAMED else lines


@asynccontextmanager
async def _patient(connection: Connection) -> AsyncIterator[None]:
    """Let builds outlast older transactions; ``SET LOCAL`` would do nothing outside a transaction."""
    await connection.execute("SET statement_timeout = 0")
    await connection.execute(f"SET lock_timeout = '{BUILD_LOCK_TIMEOUT}'")
    try:
        yield
    finally:
        with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError), anyio.CancelScope(shield=True):
            await connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")


SESSIONS_EXPIRES_AT = ConcurrentIndex("sessions_expires_at_idx", "sessions", "(expires_at)")
SESSIONS_USER_ID = ConcurrentIndex("sessions_user_id_idx", "sessions", "(user_id)")
ACCOUNTS_USER_ID = ConcurrentIndex("accounts_user_id_idx", "accounts", "(user_id)")
ACCOUNTS_IDENTITY = ConcurrentIndex(
    "accounts_provider_provider_account_id_idx",
    "accounts",
    "(provider, provider_account_id)",
    duplicates="""
    SELECT 'accounts: one identity at ' || quote_literal(provider) || ' stands in several rows, ids '
           || array_to_string((array_agg(quote_literal(id) ORDER BY id))[:5], ', ')
      FROM public.accounts GROUP BY provider, provider_account_id HAVING count(*) > 1
     ORDER BY 1""",
)
USERS_LOWER_EMAIL = ConcurrentIndex(
    "users_lower_email_idx",
    "users",
    "(lower(email))",
    duplicates="""
    SELECT 'users: one e-mail address in different letter case stands in several rows, ids '
           || array_to_string((array_agg(quote_literal(id) ORDER BY id))[:5], ', ')
      FROM public.users GROUP BY lower(email) HAVING count(*) > 1
     ORDER BY 1""",
)
SUBSCRIPTIONS_LIVE = ConcurrentIndex(
    "subscriptions_one_live_per_user",
    "subscriptions",
    "(user_id) WHERE status IN ('active', 'trialing', 'past_due')",
    duplicates="""
    SELECT 'subscriptions: user ' || quote_literal(user_id) || ' has ' || count(*) || ' live rows, ids '
           || array_to_string((array_agg(quote_literal(id) ORDER BY id))[:5], ', ')
      FROM public.subscriptions WHERE status IN ('active', 'trialing', 'past_due')
     GROUP BY user_id HAVING count(*) > 1
     ORDER BY 1""",
)
SUBSCRIPTIONS_DODO_ID = ConcurrentIndex(
    "subscriptions_dodo_subscription_id_idx", "subscriptions", "(dodo_subscription_id)"
)
SUBSCRIPTIONS_USER_ID = ConcurrentIndex("subscriptions_user_id_idx", "subscriptions", "(user_id)")
SUBSCRIPTIONS_DODO_CUSTOMER = ConcurrentIndex(
    "subscriptions_dodo_customer_id_idx", "subscriptions", "(dodo_customer_id)"
)
USAGE_USER_CREATED = ConcurrentIndex(
    "usage_user_created_idx", "usage", "(user_id, created_at) INCLUDE (tokens_used, model)"
)
USAGE_CREATED_AT = ConcurrentIndex("usage_created_at_brin", "usage", "USING brin (created_at)")

#: The indexes that kitrocket adds to the seed's tables.
SEED_INDEXES: tuple[ConcurrentIndex, ...] = (
    SESSIONS_EXPIRES_AT,
    SESSIONS_USER_ID,
    ACCOUNTS_USER_ID,
    ACCOUNTS_IDENTITY,
    USERS_LOWER_EMAIL,
    SUBSCRIPTIONS_LIVE,
    SUBSCRIPTIONS_USER_ID,
    SUBSCRIPTIONS_DODO_ID,
    SUBSCRIPTIONS_DODO_CUSTOMER,
    USAGE_USER_CREATED,
    USAGE_CREATED_AT,
)
