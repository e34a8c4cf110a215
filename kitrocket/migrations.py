"""Bring a database to the schema of this version, safely when several processes start at once.

Piccolo writes and understands the migration files; this module runs them on the engine it is given, so that two
databases can be migrated in one process, past any pooler, one migrator at a time. It keeps Piccolo's history table, so
``piccolo migrations forwards kitrocket`` and :func:`migrate` can take turns. Nothing is printed.
"""

from __future__ import annotations

import importlib
import pkgutil
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from types import ModuleType
from typing import Any

import anyio
import asyncpg
from piccolo.apps.migrations.auto.migration_manager import MigrationManager
from piccolo.apps.migrations.tables import Migration
from piccolo.columns.defaults.timestamp import TimestampNow
from piccolo.query.base import DDL
from piccolo.schema import SchemaDDLBase

from kitrocket import piccolo_migrations
from kitrocket.ddl import LOCK_TIMEOUT, SEED_INDEXES, Connection, lending
from kitrocket.driver_errors import translated
from kitrocket.engine import Engine, choose_conf
from kitrocket.errors import ConfigurationError, MigrationError, SchemaMismatchError, SchemaNotMigratedError

#: Told a line about each thing that was done or waited for.
Report = Callable[[str], None]

APP = "kitrocket"
#: Two sessions that both migrate this database meet at this advisory lock ("kitrockt" in ASCII).
_LOCK = 0x6B6974726F636B74
_POLL = 0.05
#: How often a statement that makes writers wait tries for its lock before the migration fails.
_LOCK_ATTEMPTS = 30


async def pending(engine: Engine) -> list[str]:
    """Return the ids of this version's migrations that the database lacks, oldest first. One query."""
    applied = await _applied(engine)
    return [migration for migration in migration_modules() if migration not in applied]


async def check(engine: Engine) -> None:
    """Raise :class:`SchemaNotMigratedError` unless every migration of this version was applied. One query."""
    missing = await pending(engine)
    if missing:
        raise SchemaNotMigratedError(missing)


async def migrate(engine: Engine, *, report: Report | None = None) -> list[str]:
    """Apply what is pending, oldest first, and return the ids of what was applied.

    Any number of processes may call this at once: one applies, the others wait for it. ``report`` is told a line for
    each migration. Runs on a connection of its own past any pooler.

    Raises :class:`MigrationError` with the migration's id when one fails; those before it stay applied, and running
    again goes on from there. Raises :class:`SchemaMismatchError`, and changes nothing, when rows are in the way of a
    unique index.
    """
    tell = report or _silence
    if not await pending(engine):
        return []
    async with _turn(engine, tell) as connection:
        return await _forwards(connection, migration_modules(), tell)


async def migrate_app(engine: Engine, app: str, package: ModuleType) -> list[str]:
    """Apply what is pending of another Piccolo app, such as the Studio's, whose migrations are in ``package``.

    As :func:`migrate`, whose turn it shares.
    """
    modules = migration_modules(package)
    if modules.keys() <= await _applied(engine, app):
        return []
    async with _turn(engine, _silence) as connection:
        return await _forwards(connection, modules, _silence, app)


def migration_modules(package: ModuleType = piccolo_migrations) -> dict[str, ModuleType]:
    """Return the migration files of this version by id, oldest first."""
    names = (f"{package.__name__}.{found.name}" for found in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(name) for name in names]
    return {module.ID: module for module in sorted(modules, key=lambda module: str(module.ID))}


def history_table() -> str:
    """Return the quoted name of Piccolo's history table, which an application's ``piccolo_conf`` may have moved."""
    importlib.import_module(choose_conf())
    return Migration._meta.get_formatted_tablename()


async def _applied(source: Engine | Connection, app: str = APP) -> set[str]:
    try:
        rows = await source.fetch(f"SELECT name FROM {history_table()} WHERE app_name = $1", app)  # noqa: S608 - Piccolo's name
    except asyncpg.UndefinedTableError:
        return set()
    return {row["name"] for row in rows}


@asynccontextmanager
async def _turn(engine: Engine, tell: Report) -> AsyncIterator[Connection]:
    """A direct connection that holds the migrators' lock.

    The lock is polled: to wait for it inside PostgreSQL is to hold a snapshot, and a concurrent index build of the
    migrator in turn would wait for that.
    """
    async with engine.direct() as connection:
        waited = False
        while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", _LOCK):
            if not waited:
                tell("waiting for another process that is migrating this database")
                waited = True
            await anyio.sleep(_POLL * random.uniform(0.5, 1.5))  # noqa: S311 - jitter is no secret
        await connection.execute("SET search_path = public")
        await connection.execute("SET statement_timeout = 0")
        await connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
        yield connection


async def _forwards(
    connection: Connection,
    modules: Mapping[str, ModuleType],
    tell: Report,
    app: str = APP,
) -> list[str]:
    """Apply those of ``modules`` that the history lacks. The caller holds the lock."""
    applied = await _applied(connection, app)
    todo = [migration for migration in modules if migration not in applied]
    if todo:
        if app == APP:
            await _refuse_duplicates(connection)
        await connection.execute(_ddl(Migration.create_table(if_not_exists=True))[0])
    for migration in todo:
        await _apply(connection, modules[migration])
        tell(f"{migration} {modules[migration].DESCRIPTION}")
    return todo


async def _apply(connection: Connection, module: ModuleType) -> None:
    attempts = _LOCK_ATTEMPTS
    while True:
        attempts -= 1
        manager = await module.forwards()
        try:
            await run(connection, manager)
        except SchemaMismatchError:
            raise
        except asyncpg.LockNotAvailableError as error:
            if attempts and manager.wrap_in_transaction:
                await anyio.sleep(_POLL * random.uniform(1, 10))  # noqa: S311 - jitter is no secret
                continue
            raise _failed(module, error) from error
        except Exception as error:
            raise _failed(module, error) from error
        return


def _failed(module: ModuleType, error: Exception) -> MigrationError:
    # The driver's DETAIL may quote rows; translating the error takes it out.
    return MigrationError(f"migration {module.ID} ({module.DESCRIPTION}) failed: {translated(error)}")


async def run(
    connection: Connection,
    manager: MigrationManager,
    *,
    backwards: bool = False,
) -> None:
    """Run one migration on ``connection`` and note it in the history; in one transaction unless it forbids that.

    Piccolo's ``MigrationManager.run`` finds its engine through ``piccolo_conf``, prints, and notes the migration
    outside its transaction. Its steps are the same as here.
    """

    async def on_connection(query: Any) -> None:
        for statement in _ddl(query):
            await connection.execute(statement)

    manager._run_query = on_connection  # type: ignore[method-assign]  # the one place through which its statements go
    async with connection.transaction() if manager.wrap_in_transaction else nullcontext():
        with lending(connection):
            for raw in manager.raw_backwards if backwards else manager.raw:
                await raw()
        await manager._run_add_tables(backwards=backwards)
        await manager._run_change_table_schema(backwards=backwards)
        await manager._run_rename_tables(backwards=backwards)
        await manager._run_add_columns(backwards=backwards)
        await manager._run_drop_columns(backwards=backwards)
        await manager._run_drop_tables(backwards=backwards)  # type: ignore[no-untyped-call]  # Piccolo's is untyped
        await manager._run_rename_columns(backwards=backwards)
        await manager._run_alter_columns(backwards=backwards)
        await manager._run_add_constraints(backwards=backwards)
        await manager._run_drop_constraints(backwards=backwards)
        if backwards:
            await _forget(connection, manager)
        else:
            await _note(connection, manager)


def _ddl(query: Any) -> Sequence[str]:
    """Return the statements of a migration's step."""
    if isinstance(query, SchemaDDLBase):
        return [query.ddl]
    if not isinstance(query, DDL):
        raise TypeError(f"a migration ran a {type(query).__name__}, which is no DDL")
    if query.engine_type != "postgres":
        raise ConfigurationError(f"the engine in {choose_conf()} is not for PostgreSQL; DB must be a kitrocket.Engine")
    return query.ddl


async def _note(connection: Connection, manager: MigrationManager) -> None:
    # Piccolo goes backwards in the order of ran_on, which it writes as local time: so must this.
    await connection.execute(
        f"INSERT INTO {history_table()} (name, app_name, ran_on) VALUES ($1, $2, $3)",  # noqa: S608 - Piccolo's name
        manager.migration_id,
        manager.app_name,
        TimestampNow().python(),  # type: ignore[no-untyped-call]  # Piccolo's is untyped
    )


async def _forget(connection: Connection, manager: MigrationManager) -> None:
    await connection.execute(
        f"DELETE FROM {history_table()} WHERE name = $1 AND app_name = $2",  # noqa: S608 - Piccolo's name
        manager.migration_id,
        manager.app_name,
    )


async def _refuse_duplicates(connection: Connection) -> None:
    """Raise :class:`SchemaMismatchError` with all rows that unique indexes yet to be built would refuse."""
    found: list[str] = []
    for index in SEED_INDEXES:
        if index.duplicates is None or await index.is_valid(connection):
            continue
        if await connection.fetchval("SELECT to_regclass($1)", f"public.{index.table}"):
            found += await index.find_duplicates(connection)
    if found:
        raise SchemaMismatchError(found)


def _silence(_line: str) -> None:
    """Report to nobody."""
