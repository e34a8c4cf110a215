"""Apply what is pending, one migrator at a time, on the engine that was given."""

from __future__ import annotations

import importlib
import pkgutil
import random
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
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
from kitrocket.ddl import LOCK_TIMEOUT, STATEMENT_LIMIT, ConcurrentIndex, Connection, lending
from kitrocket.engine import Engine, choose_conf, translated
from kitrocket.errors import ConfigurationError, MigrationError, SchemaMismatchError, SchemaNotMigratedError
from kitrocket.rollup import backfill, is_complete

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
    done = await applied(engine, APP)
    return [migration for migration in modules_of(piccolo_migrations) if migration not in done]


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
    done = await migrate_app(engine, APP, piccolo_migrations, report=report)
    await fill(engine, report)
    return done


async def migrate_app(engine: Engine, app: str, package: ModuleType, *, report: Report | None = None) -> list[str]:
    """Do as :func:`migrate` for the Piccolo app named ``app``, whose migration files are the modules of ``package``."""
    modules = modules_of(package)
    if set(modules) <= await applied(engine, app):
        return []
    tell = report or silence
    async with turn(engine, tell) as connection:
        return await forwards(connection, app, modules, tell)


async def fill(engine: Engine, report: Report | None) -> None:
    """Sum the usage that was there before the rollup was. The migration leaves it, lest writers wait."""
    if not await is_complete(engine):
        await backfill(engine, report=report)


def modules_of(package: ModuleType) -> dict[str, ModuleType]:
    """Return the migration files of a package by id, oldest first."""
    found = [file.name for file in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in found]
    return {module.ID: module for module in sorted(modules, key=lambda module: str(module.ID))}


def history_table() -> str:
    """Return the quoted name of Piccolo's history table, which an application's ``piccolo_conf`` may have moved."""
    importlib.import_module(choose_conf())
    return Migration._meta.get_formatted_tablename()


async def applied(source: Engine | Connection, app: str) -> set[str]:
    """Return the ids of the app's migrations that the database has."""
    try:
        rows = await source.fetch(f"SELECT name FROM {history_table()} WHERE app_name = $1", app)  # noqa: S608 - Piccolo's name
    except asyncpg.UndefinedTableError:
        return set()
    return {row["name"] for row in rows}


@asynccontextmanager
async def turn(engine: Engine, tell: Report) -> AsyncIterator[Connection]:
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


async def forwards(connection: Connection, app: str, modules: Mapping[str, ModuleType], tell: Report) -> list[str]:
    """Apply those of ``modules`` that the history lacks. The caller holds the lock."""
    done = await applied(connection, app)
    todo = [module for migration, module in modules.items() if migration not in done]
    if todo:
        await refuse_duplicates(connection, todo)
        await create_history(connection)
    for module in todo:
        await _apply(connection, app, module)
        tell(f"applied {module.ID}: {module.DESCRIPTION}")
    return [module.ID for module in todo]


async def refuse_duplicates(connection: Connection, modules: Iterable[ModuleType]) -> None:
    """Raise :class:`SchemaMismatchError` with all rows that unique indexes of ``modules`` would refuse."""
    found: list[str] = []
    for index in (index for module in modules for index in getattr(module, "INDEXES", ())):
        if not isinstance(index, ConcurrentIndex) or index.duplicates is None or await index.is_valid(connection):
            continue
        if await connection.fetchval("SELECT to_regclass($1)", f"public.{index.table}"):
            found += await index.find_duplicates(connection)
    if found:
        raise SchemaMismatchError(found)


async def create_history(connection: Connection) -> None:
    """Create Piccolo's history table unless it stands."""
    for statement in _ddl(Migration.create_table(if_not_exists=True)):
        await connection.execute(statement)


async def _apply(connection: Connection, app: str, module: ModuleType) -> None:
    attempts = _LOCK_ATTEMPTS
    while True:
        attempts -= 1
        manager: MigrationManager = await module.forwards()
        try:
            await run(connection, app, manager)
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
    text = f"migration {module.ID} ({module.DESCRIPTION}) failed: {translated(error)}"
    if isinstance(error, asyncpg.DuplicateTableError):
        text += "; if another tool made the tables, run `kitrocket db adopt`"
    return MigrationError(text)


async def run(connection: Connection, app: str, manager: MigrationManager, *, backwards: bool = False) -> None:
    """Run one migration on ``connection`` and note it in the history; in one transaction unless it forbids that.

    Piccolo's ``MigrationManager.run`` finds its engine through ``piccolo_conf``, prints, and notes the migration
    outside its transaction. Its steps are the same as here.
    """

    async def on_connection(query: Any) -> None:
        for statement in _ddl(query):
            await connection.execute(statement, timeout=STATEMENT_LIMIT)

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
            await forget(connection, app, manager.migration_id)
        else:
            await note(connection, app, manager.migration_id)


def _ddl(query: Any) -> Sequence[str]:
    """Return the statements of a migration's step."""
    if isinstance(query, SchemaDDLBase):
        return [query.ddl]
    if not isinstance(query, DDL):
        raise TypeError(f"a migration ran a {type(query).__name__}, which is no DDL")
    if query.engine_type != "postgres":
        raise ConfigurationError(f"the engine in {choose_conf()} is not for PostgreSQL; DB must be a kitrocket.Engine")
    return query.ddl


async def note(connection: Connection, app: str, migration: str) -> None:
    """Write into the history that a migration was applied."""
    # Piccolo goes backwards in the order of ran_on, which it writes as local time: so must this.
    await connection.execute(
        f"INSERT INTO {history_table()} (name, app_name, ran_on) VALUES ($1, $2, $3)",  # noqa: S608 - Piccolo's name
        migration,
        app,
        TimestampNow().python(),  # type: ignore[no-untyped-call]  # Piccolo's is untyped
    )


async def forget(connection: Connection, app: str, migration: str) -> None:
    """Take a migration out of the history."""
    await connection.execute(
        f"DELETE FROM {history_table()} WHERE name = $1 AND app_name = $2",  # noqa: S608 - Piccolo's name
        migration,
        app,
    )


def silence(_line: str) -> None:
    """Report to nobody."""
