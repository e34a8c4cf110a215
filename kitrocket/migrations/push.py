"""Bring a development database to the tables as they are in the code, without a migration file in the package."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from itertools import chain
from pathlib import Path
from types import ModuleType

from piccolo.apps.migrations.auto import AlterStatements, DiffableTable, SchemaDiffer, SchemaSnapshot
from piccolo.apps.migrations.auto.migration_manager import MigrationManager
from piccolo.table import Table

from kitrocket import piccolo_migrations
from kitrocket.ddl import Connection
from kitrocket.engine import Engine
from kitrocket.errors import MigrationError
from kitrocket.migrations.forwards import APP, Report, applied, forget, forwards, modules_of, note, silence, turn
from kitrocket.tables import OWN_TABLES, SEED_TABLES

_DESCRIPTION = "pushed: for this development database alone"


async def push(
    engine: Engine,
    state_dir: Path,
    *,
    tables: Sequence[type[Table]] | None = None,
    assume_renames: bool = False,
    report: Report | None = None,
) -> list[str]:
    """Bring a development database to ``tables`` (default: kitrocket's, as the code has them now).

    Applies the package's migrations, then what they lack. That is written as a migration file into ``state_dir``, a
    folder beside the development data, never into the package. Returns the ids of what was applied.

    When the package has got a migration file for what was pushed before, the file is noted as applied and the pushed
    one is forgotten. ``assume_renames`` reads a column that is gone and a new one of the same type as a rename; without
    it the one is dropped, with its data, and the other added.

    Raises :class:`MigrationError` when a step fails, such as a new required column without a default on a table that
    has rows, or when the database was pushed to from another folder.
    """
    tell = report or silence
    package = modules_of(piccolo_migrations)
    wanted = [_diffable(table) for table in ([*SEED_TABLES, *OWN_TABLES] if tables is None else tables)]
    answer = "y" if assume_renames else "n"
    async with turn(engine, tell) as connection:
        pushed = _pushed(state_dir)
        await _refuse_strangers(connection, {*package, *pushed})
        await _replace_pushed(connection, package, pushed, tell)
        pushed = _pushed(state_dir)
        before = [module for _, module in sorted({**package, **pushed}.items())]
        steps = _steps(wanted, await _snapshot(before), answer)
        if not steps:
            return await forwards(connection, APP, dict(sorted({**package, **pushed}.items())), tell)
        path = _write(state_dir, steps)
        try:
            return await forwards(connection, APP, dict(sorted({**package, **_pushed(state_dir)}.items())), tell)
        except BaseException:
            path.unlink()  # so that the next push starts from what stands
            raise


def _steps(wanted: list[DiffableTable], stands: list[DiffableTable], answer: str) -> list[AlterStatements]:
    """Return what leads from the tables that stand to those that are wanted; ``answer`` is to "was this renamed?"."""
    with redirect_stdout(StringIO()):  # Piccolo prints a table of its findings
        steps = SchemaDiffer(wanted, stands, auto_input=answer).get_alter_statements()
    return steps if any(step.statements for step in steps) else []


def _diffable(table: type[Table]) -> DiffableTable:
    meta = table._meta
    return DiffableTable(
        class_name=table.__name__,
        tablename=meta.tablename,
        columns=meta.non_default_columns,
        constraints=meta.constraints,
        schema=meta.schema,
    )


async def _snapshot(modules: Iterable[ModuleType]) -> list[DiffableTable]:
    """Return the tables that these migrations amount to."""
    managers: list[MigrationManager] = [await module.forwards() for module in modules]
    return SchemaSnapshot(managers).get_snapshot()


def _pushed(state_dir: Path) -> dict[str, ModuleType]:
    """Load the files that earlier pushes wrote."""
    modules: dict[str, ModuleType] = {}
    for path in sorted(state_dir.glob("kitrocket_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise MigrationError(f"cannot read {path}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        modules[module.ID] = module
    return modules


async def _refuse_strangers(connection: Connection, known: set[str]) -> None:
    strangers = sorted(await applied(connection, APP) - known)
    if strangers:
        raise MigrationError(
            f"this database has migrations that neither this version nor the folder of pushes knows: "
            f"{', '.join(strangers)}; name the folder it was pushed from, or start from an empty database"
        )


async def _replace_pushed(
    connection: Connection, package: Mapping[str, ModuleType], pushed: Mapping[str, ModuleType], tell: Report
) -> None:
    """Where the package's files now amount to what stands, let them take the place of the pushed ones."""
    done = await applied(connection, APP)
    fresh = [module for name, module in package.items() if name not in done]
    if not pushed or not fresh or not done.issuperset(pushed):
        return
    stands = await _snapshot(module for name, module in sorted({**package, **pushed}.items()) if name in done)
    difference = _steps(await _snapshot(package.values()), stands, "n")
    with_raw_parts = [module.ID for module in fresh if (await module.forwards()).raw]
    if with_raw_parts or difference:
        raise MigrationError(
            "the package has new migration files that are not what was pushed to this database; start from an empty one"
        )
    async with connection.transaction():
        for module in pushed.values():
            await forget(connection, APP, module.ID)
        for module in fresh:
            await note(connection, APP, module.ID)
            tell(f"already pushed {module.ID}: {module.DESCRIPTION}")
    _delete(pushed.values())


def _delete(modules: Iterable[ModuleType]) -> None:
    for module in modules:
        Path(str(module.__file__)).unlink()


def _write(state_dir: Path, steps: Sequence[AlterStatements]) -> Path:
    """Write a migration file as ``piccolo migrations new --auto`` does."""
    # Here, for they are slow to import and only a push needs them.
    import black
    from piccolo.apps.migrations.commands.new import _generate_migration_meta, render_template
    from piccolo.conf.apps import AppConfig

    state_dir.mkdir(parents=True, exist_ok=True)
    meta = _generate_migration_meta(AppConfig(app_name=APP, migrations_folder_path=str(state_dir)))
    text = render_template(  # type: ignore[no-untyped-call]  # Piccolo's is untyped
        migration_id=meta.migration_id,
        auto=True,
        alter_statements=list(chain.from_iterable(step.statements for step in steps)),
        extra_imports=sorted(set(chain.from_iterable(step.extra_imports for step in steps)), key=repr),
        extra_definitions=sorted(set(chain.from_iterable(step.extra_definitions for step in steps))),
        app_name=APP,
        description=_DESCRIPTION,
    )
    path = Path(meta.migration_path)
    path.write_text(black.format_str(text, mode=black.FileMode(line_length=82)), encoding="utf-8")
    return path
