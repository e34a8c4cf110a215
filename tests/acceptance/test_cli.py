"""The ``kitrocket`` command in processes of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import anyio
import httpx
import pytest

import factories
from factories import AT
from kitrocket.clock import to_db, utc_now
from kitrocket.engine import Engine

pytestmark = [pytest.mark.asyncio, pytest.mark.direct]

MAIN = "from kitrocket.cli import main; main()"


async def kitrocket(
    *arguments: str, url: str = "", folder: Path | None = None, without: tuple[str, ...] = (), **environment: str
) -> tuple[int, str, str]:
    """Run the command and return its exit code, stdout and stderr. ``without`` names packages that are missing."""
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in without)
    done = await anyio.run_process(
        [sys.executable, "-c", f"import sys; {blocked}{MAIN}", *arguments],
        env={**os.environ, "DATABASE_URL": url, **environment},
        cwd=folder,
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


async def test_help_names_every_command() -> None:
    code, out, _ = await kitrocket("--help")
    assert code == 0
    for command in ("demo", "serve", "studio", "doctor", "db", "sessions", "usage"):
        assert command in out
    for command, words in (
        ("db", ("migrate", "push", "adopt", "stop")),
        ("sessions", ("sweep", "digest")),
        ("usage", ("report", "verify", "rebuild", "prune", "expire")),
    ):
        _, out, _ = await kitrocket(command, "--help")
        assert not [word for word in words if word not in out]


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (("--help",), "typer", "cli"),
        (("--help",), "rich", "cli"),
        (("serve",), "starlette", "server"),
        (("serve",), "uvicorn", "server"),
        (("studio",), "piccolo_admin", "admin"),
    ],
)
async def test_a_missing_extra_is_named(arguments: tuple[str, ...], package: str, extra: str) -> None:
    code, out, err = await kitrocket(*arguments, without=(package,))
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert f'pip install "kitrocket[{extra}]"' in err


async def test_a_bad_setting_is_one_line_without_its_value() -> None:
    for name, value in (
        ("KITROCKET_SESSION_TTL", "secret-value"),
        ("DATABASE_POOL_SIZE", "secret-value"),
        ("DATABASE_URL", "secret-value"),
        ("DODO_PAYMENTS_WEBHOOK_KEY", "secret-value"),
        ("KITROCKET_DODO_PRODUCTS", "secret-value"),
        ("KITROCKET_PLANS", "[secret-value"),
    ):
        code, _, err = await kitrocket("doctor", **{name: value})
        assert code == 1, name
        assert err.count("\n") == 1, err
        assert err.startswith("kitrocket: ")
        assert "secret-value" not in err


async def test_a_database_that_is_away_is_one_line() -> None:
    for command in (("doctor",), ("db", "migrate"), ("sessions", "sweep"), ("usage", "report"), ("studio",)):
        code, _, err = await kitrocket(*command, url="postgres://u:secret-value@127.0.0.1:1/x")
        assert code == 1
        assert err.count("\n") == 1, err
        assert "secret-value" not in err


@pytest.mark.usefixtures("turn_with_roles")
async def test_migrating_says_what_was_done_and_then_that_there_is_nothing_to_do(empty_database_url: str) -> None:
    code, _, err = await kitrocket("sessions", "sweep", url=empty_database_url)
    assert code == 1
    assert "kitrocket db migrate" in err
    code, out, err = await kitrocket("db", "migrate", url=empty_database_url)
    assert code == 0, err
    assert re.fullmatch(r"Applied \d+ migration\(s\)\.\n", out)
    assert "the five tables of the seed" in err
    code, out, _ = await kitrocket("db", "migrate", url=empty_database_url)
    assert (code, out) == (0, "Nothing to do: the database is up to date.\n")
    code, out, _ = await kitrocket("doctor", url=empty_database_url)
    assert code == 0, out


@pytest.mark.usefixtures("turn_with_roles")
async def test_the_doctor_names_a_lost_index_and_its_cure(engine: Engine, database_url: str) -> None:
    await engine.fetch("DROP INDEX sessions_expires_at_idx")
    code, out, _ = await kitrocket("doctor", url=database_url)
    assert code == 1
    [line] = [line for line in out.splitlines() if line.startswith("wrong")]
    assert "sessions_expires_at_idx" in line
    await engine.fetch(line[line.index("CREATE") :])
    code, out, _ = await kitrocket("doctor", url=database_url)
    assert code == 0
    assert "wrong" not in out


async def test_a_sweep_deletes_what_has_expired(engine: Engine, database_url: str) -> None:
    user = await factories.make_user(engine)
    for _ in range(5):
        await factories.make_session(engine, user, at=AT - timedelta(days=900), expires_at=AT - timedelta(days=800))
    code, out, _ = await kitrocket("sessions", "sweep", "--limit", "2", url=database_url)
    assert (code, out) == (0, "Deleted 2 expired session(s).\n")
    code, out, _ = await kitrocket("sessions", "sweep", "--batch-size", "1", url=database_url)
    assert (code, out) == (0, "Deleted 3 expired session(s).\n")
    code, _, err = await kitrocket("sessions", "sweep", "--limit", "0", url=database_url)
    assert code == 2
    assert "--limit" in err


async def test_usage_is_reported(engine: Engine, database_url: str) -> None:
    user = await factories.make_user(engine, id="heavy")
    await engine.fetch(
        "INSERT INTO usage (id, user_id, tokens_used, model, created_at)"
        " SELECT 'g' || n, $1, 1000, 'm' || n % 2, $2 FROM generate_series(1, 5) n",
        user,
        to_db(utc_now() - timedelta(hours=1)),
    )
    code, out, _ = await kitrocket("usage", "report", url=database_url)
    assert code == 0
    assert re.search(r"heavy +\S* +5,000 +5\b", out)
    code, out, _ = await kitrocket("usage", "report", "heavy", url=database_url)
    assert code == 0
    assert re.search(r"m1 +\S* +3,000 +3\b", out)
    assert re.search(r"total +5,000 +5\b", out)
    code, _, err = await kitrocket("usage", "report", "heavy", "--tz", "Nowhere", "--by", "day", url=database_url)
    assert code == 1
    assert err.count("\n") == 1


async def test_the_embedded_server_is_stopped_by_name(tmp_path: Path) -> None:
    code, out, _ = await kitrocket("db", "stop", folder=tmp_path)
    assert code == 0
    assert "No server runs" in out


async def test_the_studio_says_how_to_get_in(database_url: str) -> None:
    for first in (True, False):
        with subprocess.Popen(
            [sys.executable, "-c", MAIN, "studio"],
            env=os.environ | {"DATABASE_URL": database_url},
            stdout=subprocess.PIPE,
            text=True,
        ) as running:
            try:
                assert running.stdout is not None
                address = running.stdout.readline().split()[1]
                line = running.stdout.readline()
                found = re.search(r"log in as (\S+) with the password (\S+) ", line)
                assert (found is not None) is first
                if found is not None:
                    await log_in(address, *found.groups())
                running.send_signal(signal.SIGTERM)
                assert await anyio.to_thread.run_sync(lambda: running.wait(timeout=60)) == 0
            finally:
                running.kill()


async def log_in(address: str, username: str, password: str) -> None:
    async with httpx.AsyncClient(base_url=address, trust_env=False, timeout=20) as client:
        await client.get("/")
        answer = await client.post(
            "public/login/",
            json={"username": username, "password": password},
            headers={"X-CSRFToken": client.cookies["csrftoken"]},
        )
        assert answer.status_code == 200
        assert (await client.get("api/user/")).json()["username"] == username


async def test_daily_sums_are_verified_rebuilt_and_outlive_pruned_calls(engine: Engine, database_url: str) -> None:
    await factories.make_user(engine, id="ada")
    await engine.fetch(
        "INSERT INTO usage VALUES ('a', 'ada', 5, 'm', '2026-01-01'), ('b', 'ada', 6, 'm', '2026-01-03')"
    )
    code, out, _ = await kitrocket("usage", "verify", url=database_url)
    assert (code, out) == (0, "2 day(s) compared, 0 sum(s) differ.\n")
    await engine.fetch("UPDATE kitrocket.usage_daily SET tokens = 50 WHERE day = '2026-01-01'")
    code, out, _ = await kitrocket("usage", "verify", url=database_url)
    assert code == 1
    assert out.startswith("2026-01-01 ada m: 50 tokens of 1 call(s) are summed, 5 of 1 are there\n")
    code, out, _ = await kitrocket("usage", "rebuild", "--since", "2026-01-01", url=database_url)
    assert (code, out) == (0, "2 day(s) recomputed, 1 sum(s) were wrong.\n")
    await engine.fetch(
        "INSERT INTO kitrocket.usage_reservations (id, user_id, model, tokens, used, created_at, expires_at)"
        " VALUES ('r', 'ada', 'm', 9, 0, '2026-01-01', '2026-01-01')"
    )
    code, out, _ = await kitrocket("usage", "expire", url=database_url)
    assert (code, out) == (0, "Recorded 0 expired reservation(s), deleted 1.\n")
    code, out, _ = await kitrocket("usage", "prune", "--before", "2026-01-02", url=database_url)
    assert (code, out) == (0, "Deleted 1 call(s); they are kept from 2026-01-02 on.\n")
    code, _, err = await kitrocket("usage", "rebuild", "--since", "2026-01-01", url=database_url)
    assert code == 1
    assert "since" in err
    assert await engine.fetchval("SELECT sum(tokens)::int FROM kitrocket.usage_daily") == 11


@pytest.mark.usefixtures("turn_with_roles")
async def test_the_doctor_names_a_trigger_that_is_off(engine: Engine, database_url: str) -> None:
    await engine.fetch("ALTER TABLE usage DISABLE TRIGGER kitrocket_usage_updated")
    await engine.fetch("DROP TRIGGER kitrocket_usage_deleted ON usage")
    await engine.fetch("UPDATE kitrocket.usage_state SET rollup_from = '2026-01-01'")
    code, out, _ = await kitrocket("doctor", url=database_url)
    assert code == 1
    assert "wrong  trigger kitrocket_usage_updated is off: ALTER TABLE usage ENABLE TRIGGER" in out
    assert "wrong  trigger kitrocket_usage_deleted is missing" in out
    assert "kitrocket_usage_inserted" not in out
    assert "note   earlier usage is not summed by day yet" in out
