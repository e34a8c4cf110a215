"""Piccolo's own commands on the migrations: in this repository, and where kitrocket is installed from its wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest
from catalogue import SEED_SQL, everything, fill

from kitrocket import piccolo_migrations
from kitrocket.engine import Engine
from kitrocket.migrations import check, migrate
from kitrocket.migrations.forwards import modules_of

pytestmark = pytest.mark.asyncio

ROOT = Path(__file__).resolve().parents[2]
IDS = list(modules_of(piccolo_migrations))


def piccolo(*arguments: str, cwd: Path, url: str, path: Path | None = None) -> str:
    """Run ``piccolo migrations …`` as a developer would, and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PICCOLO", "KITROCKET"))}
    environment |= {"DATABASE_URL": url, "PYTHONDONTWRITEBYTECODE": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [str(Path(sys.executable).parent / "piccolo"), "migrations", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def test_forwards_and_backwards_in_this_repository(engine: Engine, empty_database_url: str) -> None:
    piccolo("forwards", "kitrocket", cwd=ROOT, url=empty_database_url)
    async with Engine(empty_database_url) as other, other.direct() as connection, engine.direct() as migrated:
        await check(other)
        assert await everything(connection) == await everything(migrated)
        await fill(connection)
        piccolo("backwards", "kitrocket", IDS[1], "--auto_agree", cwd=ROOT, url=empty_database_url)
        assert await connection.fetchval("SELECT name FROM users") == "Ada"
        assert await migrate(other) == IDS[1:]
        assert await everything(connection) == await everything(migrated)
        piccolo("backwards", "kitrocket", "all", "--auto_agree", cwd=ROOT, url=empty_database_url)
        assert await connection.fetchval("SELECT to_regclass('users')") is None


async def test_a_database_made_by_drizzle_is_adopted_by_faking_two_migrations(
    engine: Engine, empty_database_url: str
) -> None:
    async with Engine(empty_database_url) as other, other.direct() as connection, engine.direct() as migrated:
        await connection.execute(SEED_SQL)
        await fill(connection)
        for migration in IDS[:2]:
            piccolo("forwards", "kitrocket", migration, "--fake", cwd=ROOT, url=empty_database_url)
        piccolo("forwards", "kitrocket", cwd=ROOT, url=empty_database_url)
        await check(other)
        assert await everything(connection) == await everything(migrated)


async def test_duplicates_stop_piccolos_command_with_their_ids(empty_database_url: str) -> None:
    async with Engine(empty_database_url) as other, other.direct() as connection:
        piccolo("forwards", "kitrocket", IDS[2], cwd=ROOT, url=empty_database_url)
        await fill(connection)
        await connection.execute("INSERT INTO subscriptions (id, user_id, plan) VALUES ('b2', 'u1', 'pro')")
        with pytest.raises(AssertionError, match="user 'u1' has 2 live rows, ids 'b1', 'b2'"):
            piccolo("forwards", "kitrocket", cwd=ROOT, url=empty_database_url)
        assert await connection.fetchval("SELECT to_regclass('subscriptions_one_live_per_user')") is None


async def test_auto_finds_nothing_to_do(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "kitrocket", copy / "kitrocket", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "piccolo_conf.py", copy)
    before = sorted(path.name for path in (copy / "kitrocket" / "piccolo_migrations").iterdir())
    # No server is needed, so none is there.
    nowhere = "postgres://nobody@127.0.0.1:1/none"
    assert "No changes detected" in piccolo("new", "kitrocket", "--auto", cwd=copy, url=nowhere, path=copy)
    assert sorted(path.name for path in (copy / "kitrocket" / "piccolo_migrations").iterdir()) == before


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which kitrocket is installed from its wheel, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=100)
    (wheel,) = (folder / "dist").glob("kitrocket-*.whl")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(folder / "site")]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, timeout=100)
    return folder / "site"


async def test_another_project_migrates_with_kitrocket_from_its_wheel(
    engine: Engine, installed: Path, tmp_path: Path, empty_database_url: str
) -> None:
    (tmp_path / "piccolo_conf.py").write_text(
        "import os\n"
        "import kitrocket\n"
        "from kitrocket import Engine\n"
        "from piccolo.conf.apps import AppRegistry\n"
        "print('kitrocket from', kitrocket.__file__)\n"
        "DB = Engine(os.environ['DATABASE_URL'])\n"
        "APP_REGISTRY = AppRegistry(apps=['kitrocket.piccolo_app'])\n"
    )
    printed = piccolo("forwards", "kitrocket", cwd=tmp_path, url=empty_database_url, path=installed)
    assert f"kitrocket from {installed}" in printed
    connection = await asyncpg.connect(empty_database_url)
    try:
        async with engine.direct() as migrated:
            assert await everything(connection) == await everything(migrated)
    finally:
        await connection.close()
    assert "No migrations need to be run" in piccolo(
        "forwards", "kitrocket", cwd=tmp_path, url=empty_database_url, path=installed
    )


async def test_an_engine_of_piccolos_own_runs_the_migrations_too(
    engine: Engine, tmp_path: Path, empty_database_url: str
) -> None:
    (tmp_path / "piccolo_conf.py").write_text(
        "import os\n"
        "from piccolo.engine.postgres import PostgresEngine\n"
        "from piccolo.conf.apps import AppRegistry\n"
        "DB = PostgresEngine(config={'dsn': os.environ['DATABASE_URL']})\n"
        "APP_REGISTRY = AppRegistry(apps=['kitrocket.piccolo_app'])\n"
    )
    piccolo("forwards", "kitrocket", cwd=tmp_path, url=empty_database_url, path=ROOT)
    async with Engine(empty_database_url) as other, other.direct() as connection, engine.direct() as migrated:
        await check(other)
        assert await everything(connection) == await everything(migrated)
