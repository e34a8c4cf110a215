"""``kitrocket doctor`` finds what is wrong, and what it names as a cure cures it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import anyio
import pytest
from supabase import roles

import factories
from kitrocket.better_auth import migrate_better_auth
from kitrocket.cli.drizzle import BETTER_AUTH, CONFIG, SCHEMA
from kitrocket.ddl import SEED_INDEXES
from kitrocket.engine import Engine

pytestmark = [pytest.mark.asyncio, pytest.mark.direct, pytest.mark.usefixtures("turn_with_roles")]

ROOT = Path(__file__).resolve().parents[2]
SHARED = {
    "KITROCKET_BETTER_AUTH_SECRET": "secret-value",
    "KITROCKET_SESSION_TOKENS": "plain",
    "KITROCKET_PASSWORD_SCHEME": "better-auth",
}


async def kitrocket(*arguments: str, url: str = "", **environment: str) -> tuple[int, str, str]:
    done = await anyio.run_process(
        [sys.executable, "-c", "from kitrocket.cli import main; main()", *arguments],
        env={**os.environ, "DATABASE_URL": url, **environment},
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


async def doctor(url: str, **environment: str) -> tuple[int, list[str], list[str]]:
    """Run it and return the exit code, what it found wrong and what it found worth a note."""
    code, out, err = await kitrocket("doctor", url=url, **environment)
    assert code in (0, 1), err
    lines = out.splitlines()
    assert all(re.match("(ok|note|wrong) ", line) for line in lines), out
    wrong, note = [[line[7:] for line in lines if line.startswith(word)] for word in ("wrong", "note")]
    return code, wrong, [line for line in note if "DODO_PAYMENTS" not in line]


async def test_a_healthy_database_is_left_alone(database_url: str) -> None:
    assert await doctor(database_url) == (0, [], [])


async def test_a_lost_history_is_cured_by_adopting(engine: Engine, database_url: str) -> None:
    await engine.fetch("DROP TABLE migration")
    code, wrong, _ = await doctor(database_url)
    assert (code, wrong) == (1, ["the five tables stand, and no history says who made them: kitrocket db adopt"])
    code, _, err = await kitrocket("db", "adopt", url=database_url)
    assert code == 0, err
    assert await doctor(database_url) == (0, [], [])


async def test_an_emptied_history_is_the_same(engine: Engine, database_url: str) -> None:
    await engine.fetch("DELETE FROM migration")
    _, [wrong], _ = await doctor(database_url)
    assert wrong.endswith("kitrocket db adopt")


async def test_an_empty_database_is_cured_by_migrating(empty_database_url: str) -> None:
    _, [wrong], _ = await doctor(empty_database_url)
    assert wrong.endswith("kitrocket db migrate")
    assert (await kitrocket("db", "migrate", url=empty_database_url))[0] == 0
    assert await doctor(empty_database_url) == (0, [], [])


async def test_what_supabases_roles_can_reach_is_cured_by_protecting(engine: Engine, database_url: str) -> None:
    async with roles(engine):
        await engine.fetch("GRANT SELECT ON public.sessions TO anon, authenticated")
        code, wrong, _ = await doctor(database_url)
        assert code == 1
        assert "table sessions is granted to anon and authenticated: kitrocket db protect" in wrong
        for table in ("users", "sessions", "accounts", "subscriptions", "usage"):
            assert f"table {table} has no row-level security: kitrocket db protect" in wrong
        code, out, err = await kitrocket("db", "protect", url=database_url)
        assert code == 0, err
        assert out.startswith("Protected")
        assert await doctor(database_url) == (0, [], [])


async def test_protecting_without_the_roles_does_nothing_and_says_so(database_url: str) -> None:
    code, out, _ = await kitrocket("db", "protect", url=database_url)
    assert code == 0
    assert out.startswith("Nothing to do")


async def test_addresses_of_another_form_are_named_by_user(engine: Engine, database_url: str) -> None:
    await factories.make_user(engine, id="fine", email="ada+filter@example.com")
    await factories.make_user(engine, id="accented", email="zo\u00eb@example.com")
    await factories.make_user(engine, id="capital", email="Grace@Example.com")
    code, wrong, [note] = await doctor(database_url)
    assert (code, wrong) == (0, [])
    assert note.startswith("1 user(s) have")
    assert note.endswith(": 'capital'")

    await factories.make_user(engine, id="spaced", email=" alan@example.com")
    await factories.make_user(engine, id="decomposed", email="zoe\u0308@example.com")
    code, wrong, [note] = await doctor(database_url)
    assert code == 1
    assert note.endswith(": 'capital', 'decomposed', 'spaced'")
    assert wrong == [
        "2 of them are not found by their address, which must be rewritten: 'decomposed', 'spaced'",
        "users 'accented', 'decomposed' have one e-mail address: keep one of them",
    ]
    _, out, err = await kitrocket("doctor", url=database_url)
    assert "@" not in out + err
    await engine.fetch("DELETE FROM users WHERE id = 'decomposed'")
    await engine.fetch("UPDATE users SET email = lower(trim(email))")
    assert await doctor(database_url) == (0, [], [])


async def test_many_odd_addresses_are_counted_and_some_named(engine: Engine, database_url: str) -> None:
    await engine.fetch(
        "INSERT INTO users (id, email, name) SELECT 'u' || n, 'User' || n || '@example.com', 'U'"
        " FROM generate_series(10001, 12500) n"
    )
    _, _, [note] = await doctor(database_url)
    assert note.startswith("2500 user(s)")
    assert note.endswith("'u10020', … and more")


async def test_plain_oauth_tokens_are_worth_a_note(engine: Engine, database_url: str) -> None:
    user = await factories.make_user(engine)
    await factories.make_account(engine, user, provider="github")
    assert await doctor(database_url) == (0, [], [])
    await factories.make_account(engine, user, provider="google", refresh_token="secret-value")
    code, _, [note] = await doctor(database_url)
    assert code == 0
    assert note.startswith("OAuth tokens are stored plain: set KITROCKET_TOKEN_KEYS")
    assert "secret-value" not in note
    key = "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
    assert await doctor(database_url, KITROCKET_TOKEN_KEYS=key) == (0, [], [])
    await engine.fetch("UPDATE accounts SET refresh_token = 'f1$' || refresh_token")
    assert await doctor(database_url) == (0, [], [])


async def test_what_better_auth_lacks_is_cured_by_migrating(engine: Engine, database_url: str) -> None:
    code, [wrong], _ = await doctor(database_url, **SHARED)
    assert code == 1
    assert wrong.endswith("kitrocket db migrate --better-auth")
    code, out, err = await kitrocket("db", "migrate", "--better-auth", url=database_url)
    assert (code, out) == (0, "Applied 2 migration(s).\n"), err
    assert await doctor(database_url, **SHARED) == (0, [], [])
    await engine.fetch("DROP INDEX sessions_created_at_idx")
    _, [wrong], _ = await doctor(database_url, **SHARED)
    assert wrong.startswith("index sessions_created_at_idx is missing: CREATE INDEX")


async def test_settings_that_better_auth_cannot_share_are_worth_a_note(engine: Engine, database_url: str) -> None:
    await migrate_better_auth(engine)
    code, wrong, notes = await doctor(database_url, KITROCKET_BETTER_AUTH_SECRET="secret-value")
    assert (code, wrong) == (0, [])
    assert [note.split()[0] for note in notes] == ["KITROCKET_SESSION_TOKENS", "KITROCKET_PASSWORD_SCHEME"]


async def test_the_drizzle_lines_are_printed_without_a_database() -> None:
    nowhere = "postgres://127.0.0.1:1/x"
    code, out, err = await kitrocket("doctor", "--drizzle", url=nowhere)
    assert (code, err) == (0, "")
    assert out == f"{SCHEMA}\n{CONFIG}"
    code, out, _ = await kitrocket("doctor", "--drizzle", url=nowhere, **SHARED)
    assert (code, out) == (0, f"{SCHEMA}\n{BETTER_AUTH}\n{CONFIG}")


async def test_the_drizzle_lines_name_every_index_and_secure_every_table() -> None:
    declared = re.findall(r'^\s*(uniqueIndex|index)\("(\w+)"\)', SCHEMA, re.MULTILINE)
    assert {name: kind == "uniqueIndex" for kind, name in declared} == {
        index.name: index.duplicates is not None for index in SEED_INDEXES
    }
    assert SCHEMA.count("(t) => [") == 5
    assert SCHEMA.count(".enableRLS();") == 6
    assert 'index("sessions_created_at_idx").on(t.createdAt)' in BETTER_AUTH
    assert 'schemaFilter: ["public"]' in CONFIG


async def test_the_guide_shows_the_lines_as_they_are_printed() -> None:
    page = (ROOT / "docs" / "how-to" / "share-with-drizzle.md").read_text(encoding="utf-8")
    assert f"```ts\n{SCHEMA}```" in page
    assert CONFIG.partition("\n")[2] in page


async def test_the_example_declares_what_the_doctor_prints() -> None:
    """What drizzle-kit itself says of the example is tested with the packages."""

    def code_lines(text: str) -> set[str]:
        joined = re.sub(r"\n\s+\.", ".", text)
        return {
            line.partition(" //")[0].strip() for line in joined.splitlines() if not line.startswith(("//", "import"))
        }

    schema = (ROOT / "examples" / "better-auth" / "schema.ts").read_text(encoding="utf-8")
    assert code_lines(SCHEMA + BETTER_AUTH) - code_lines(schema) <= {"(t) => ["}
    assert CONFIG.splitlines()[1] in (ROOT / "examples" / "better-auth" / "drizzle.config.ts").read_text()


async def test_a_large_table_of_calls_should_be_vacuumed_early(engine: Engine, database_url: str) -> None:
    grow = "UPDATE pg_class SET reltuples = $1 WHERE oid = 'public.usage'::regclass"
    await engine.fetch(grow, 99_999)
    assert await doctor(database_url) == (0, [], [])
    await engine.fetch(grow, 100_000)
    code, wrong, [note] = await doctor(database_url)
    assert (code, wrong) == (0, [])
    for factor, notes in (("0.021", [note]), (note.partition(": ")[2], [])):
        cure = (
            factor if "ALTER" in factor else f"ALTER TABLE usage SET (autovacuum_vacuum_insert_scale_factor = {factor})"
        )
        await engine.fetch(cure)
        assert await doctor(database_url) == (0, [], notes)
