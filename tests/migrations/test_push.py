"""Pushing the tables as they are now to a development database."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType

import pytest
import pytest_asyncio
from catalogue import columns, constraints, fill
from piccolo.columns import Integer, Text
from piccolo.constraints import Unique
from piccolo.table import Table, create_table_class

from kitrocket import piccolo_migrations
from kitrocket.engine import Engine
from kitrocket.errors import MigrationError
from kitrocket.migrations import check, migrate, pending, push
from kitrocket.migrations.forwards import modules_of
from kitrocket.migrations.push import _pushed
from kitrocket.tables import OWN_TABLES, SEED_TABLES, Users

pytestmark = pytest.mark.asyncio

IDS = list(modules_of(piccolo_migrations))


@pytest_asyncio.fixture
async def empty(empty_database_url: str) -> AsyncIterator[Engine]:
    async with Engine(empty_database_url) as engine:
        yield engine


def tables(*more: type[Table], **columns: Text | Integer) -> list[type[Table]]:
    """kitrocket's tables with columns added to ``users``, and perhaps more tables."""
    members = {column._meta.name: column for column in Users._meta.columns} | columns
    changed = create_table_class("Users", class_kwargs={"tablename": "users"}, class_members=members)
    changed._meta.constraints = list(Users._meta.constraints)
    return [changed, *SEED_TABLES[1:], *OWN_TABLES, *more]


async def names(engine: Engine, table: str) -> list[object]:
    async with engine.direct() as connection:
        return [row[2] for row in await columns(connection) if row[0] == table]


async def test_an_empty_database_is_migrated_and_no_file_is_written(empty: Engine, tmp_path: Path) -> None:
    state = tmp_path / "push"
    lines: list[str] = []
    assert await push(empty, state, report=lines.append) == IDS
    assert len(lines) == len(IDS)
    await check(empty)
    assert not state.exists()
    assert await push(empty, state) == []


async def test_a_changed_table_arrives_without_a_file_in_the_package(
    empty: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path(piccolo_migrations.__path__[0]).glob("*.py"))
    await migrate(empty)
    async with empty.direct() as connection:
        await fill(connection)
    wanted = tables(theme=Text(default="dark"))
    (pushed,) = await push(empty, tmp_path, tables=wanted)
    assert pushed not in IDS
    assert await empty.fetchval("SELECT theme FROM users") == "dark"
    assert sorted(Path(piccolo_migrations.__path__[0]).glob("*.py")) == before
    assert await push(empty, tmp_path, tables=wanted) == []

    (again,) = await push(empty, tmp_path, tables=tables(theme=Text(default="dark"), seats=Integer(default=1)))
    assert (await names(empty, "users"))[-2:] == ["theme", "seats"]
    assert list(_pushed(tmp_path)) == [pushed, again]

    (back,) = await push(empty, tmp_path)
    assert (await names(empty, "users"))[-1] == "updated_at"
    assert list(_pushed(tmp_path)) == [pushed, again, back]
    assert capsys.readouterr() == ("", "")


async def test_a_new_table_with_a_constraint_arrives(empty: Engine, tmp_path: Path) -> None:
    class Notes(Table, tablename="notes"):
        id = Text(primary_key=True, default=None)
        title = Text(default=None)
        notes_title_unique = Unique([title])

    await push(empty, tmp_path, tables=tables(Notes))
    assert await names(empty, "notes") == ["id", "title"]
    async with empty.direct() as connection:
        assert ("notes", "notes_title_unique") in [row[:2] for row in await constraints(connection)]


async def test_a_rename_is_assumed_only_when_asked(empty: Engine, tmp_path: Path) -> None:
    await push(empty, tmp_path, tables=tables(theme=Text(default="dark")))
    async with empty.direct() as connection:
        await fill(connection)
        await connection.execute("UPDATE users SET theme = 'light'")
    await push(empty, tmp_path, tables=tables(colours=Text(default="dark")), assume_renames=True)
    assert await empty.fetchval("SELECT colours FROM users") == "light"
    await push(empty, tmp_path, tables=tables(palette=Text(default="dark")))
    assert await empty.fetchval("SELECT palette FROM users") == "dark"


async def test_a_step_that_fails_is_named_and_can_be_taken_back(empty: Engine, tmp_path: Path) -> None:
    await migrate(empty)
    async with empty.direct() as connection:
        await fill(connection)
    with pytest.raises(MigrationError, match=r"pushed.*contains null values"):
        await push(empty, tmp_path, tables=tables(tenant=Text(default=None)))
    assert list(_pushed(tmp_path)) == []
    await push(empty, tmp_path, tables=tables(tenant=Text(default="x")))
    assert await empty.fetchval("SELECT tenant FROM users") == "x"


async def test_a_new_database_gets_what_was_pushed_before(empty: Engine, engine: Engine, tmp_path: Path) -> None:
    wanted = tables(theme=Text(default="dark"))
    (pushed,) = await push(engine, tmp_path, tables=wanted)
    assert await push(empty, tmp_path, tables=wanted) == [*IDS, pushed]
    assert (await names(empty, "users"))[-1] == "theme"


async def test_another_folder_is_refused(empty: Engine, tmp_path: Path) -> None:
    *_, pushed = await push(empty, tmp_path / "one", tables=tables(theme=Text(default="dark")))
    with pytest.raises(MigrationError, match=pushed):
        await push(empty, tmp_path / "two", tables=tables(theme=Text(default="dark")))


async def test_the_packages_file_takes_the_place_of_what_was_pushed(
    empty: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tables(theme=Text(default="dark"))
    *_, pushed = await push(empty, tmp_path / "state", tables=wanted)
    released = a_release_with(_pushed(tmp_path / "state")[pushed], tmp_path, monkeypatch)
    assert await pending(empty) == [released]
    assert await push(empty, tmp_path / "state", tables=wanted) == []
    assert list(_pushed(tmp_path / "state")) == []
    await check(empty)
    assert (await names(empty, "users"))[-1] == "theme"


async def test_a_package_that_says_something_else_is_refused(
    empty: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, pushed = await push(empty, tmp_path / "state", tables=tables(theme=Text(default="dark")))
    module = _pushed(tmp_path / "state")[pushed]
    await push(empty, tmp_path / "state", tables=tables(theme=Text(default="dark"), seats=Integer(default=1)))
    released = a_release_with(module, tmp_path, monkeypatch)
    with pytest.raises(MigrationError, match="start from an empty one"):
        await push(empty, tmp_path / "state", tables=tables(theme=Text(default="dark")))
    assert await pending(empty) == [released]


def a_release_with(pushed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let the package have one more migration file, with the content of a pushed one."""
    folder = tmp_path / "release"
    folder.mkdir()
    name, released = "kitrocket_9999_01_01t00_00_00_000000", "9999-01-01T00:00:00:000000"
    shutil.copy(str(pushed.__file__), folder / f"{name}.py")
    text = (folder / f"{name}.py").read_text()
    (folder / f"{name}.py").write_text(text.replace(pushed.ID, released))
    monkeypatch.setattr(piccolo_migrations, "__path__", [*piccolo_migrations.__path__, str(folder)])
    monkeypatch.delitem(__import__("sys").modules, f"{piccolo_migrations.__name__}.{name}", raising=False)
    return released
