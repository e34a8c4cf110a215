"""Adopting a database that Drizzle made."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest
import pytest_asyncio
from catalogue import SEED_SQL, counts, everything, fill

from kitrocket import piccolo_migrations
from kitrocket.engine import Engine
from kitrocket.errors import MigrationError, SchemaMismatchError
from kitrocket.migrations import adopt, check, migrate
from kitrocket.migrations.forwards import APP, applied, modules_of

pytestmark = pytest.mark.asyncio

IDS = list(modules_of(piccolo_migrations))


@pytest_asyncio.fixture
async def drizzle(empty_database_url: str) -> AsyncIterator[Engine]:
    """An engine on a database made by the seed's DDL, with rows."""
    async with Engine(empty_database_url) as engine:
        async with engine.direct() as connection:
            await connection.execute(SEED_SQL)
            await fill(connection)
        yield engine


async def refused(engine: Engine) -> tuple[str, ...]:
    """Adopt, see it refused and nothing changed, and return the differences."""
    async with engine.direct() as connection:
        before = await everything(connection)
    with pytest.raises(SchemaMismatchError) as caught:
        await adopt(engine)
    async with engine.direct() as connection:
        assert await everything(connection) == before
    assert await engine.fetchval("SELECT to_regclass('migration')") is None
    return caught.value.differences


async def test_a_database_with_rows_becomes_as_if_migrated(drizzle: Engine, engine: Engine) -> None:
    lines: list[str] = []
    assert await adopt(drizzle, report=lines.append) == IDS[2:]
    assert [line.split(": ")[0] for line in lines[:2]] == [f"already there {migration}" for migration in IDS[:2]]
    await check(drizzle)
    async with drizzle.direct() as adopted, engine.direct() as migrated:
        assert await everything(adopted) == await everything(migrated)
        assert set((await counts(adopted)).values()) == {1}
    assert await migrate(drizzle) == []
    assert await adopt(drizzle) == []


async def test_the_history_lists_every_migration_in_order(drizzle: Engine) -> None:
    await adopt(drizzle)
    rows = await drizzle.fetch("SELECT name FROM migration WHERE app_name = 'kitrocket' ORDER BY ran_on")
    assert [row["name"] for row in rows] == IDS


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("DROP TABLE usage", "usage: the table is missing"),
        ("ALTER TABLE users DROP COLUMN avatar", "users.avatar: the column is missing; expected text"),
        (
            "ALTER TABLE sessions ALTER expires_at TYPE timestamptz",
            "sessions.expires_at: is timestamp with time zone NOT NULL; expected timestamp without time zone NOT NULL",
        ),
        (
            "ALTER TABLE usage ALTER tokens_used TYPE bigint",
            "usage.tokens_used: is bigint NOT NULL; expected integer NOT NULL",
        ),
        ("ALTER TABLE users ALTER name DROP NOT NULL", "users.name: is text; expected text NOT NULL"),
        (
            "ALTER TABLE subscriptions ALTER status SET DEFAULT 'trialing'",
            "subscriptions.status: is text NOT NULL DEFAULT 'trialing'::text; "
            "expected text NOT NULL DEFAULT 'active'::text",
        ),
        (
            "ALTER TABLE accounts ALTER created_at DROP DEFAULT",
            "accounts.created_at: is timestamp without time zone NOT NULL; "
            "expected timestamp without time zone NOT NULL DEFAULT now()",
        ),
        (
            "ALTER TABLE sessions DROP CONSTRAINT sessions_token_unique",
            "sessions: constraint sessions_token_unique is missing; expected UNIQUE (token)",
        ),
        (
            "ALTER TABLE users RENAME CONSTRAINT users_email_unique TO users_email_key",
            "users: constraint UNIQUE (email) is named users_email_key; expected users_email_unique",
        ),
        (
            "ALTER TABLE usage DROP CONSTRAINT usage_user_id_users_id_fk, ADD CONSTRAINT usage_user_id_users_id_fk "
            "FOREIGN KEY (user_id) REFERENCES users (id)",
            "usage: constraint usage_user_id_users_id_fk is FOREIGN KEY (user_id) REFERENCES users(id); "
            "expected FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE",
        ),
        (
            "ALTER TABLE users ADD COLUMN tenant text; UPDATE users SET tenant = 'x'; "
            "ALTER TABLE users ALTER tenant SET NOT NULL",
            "users.tenant: a column that is not the seed's must be nullable or have a default",
        ),
    ],
)
async def test_a_difference_is_named_and_nothing_changes(drizzle: Engine, change: str, expected: str) -> None:
    async with drizzle.direct() as connection:
        await connection.execute(change)
    assert await refused(drizzle) == (expected,)


async def test_every_difference_is_named_at_once(drizzle: Engine) -> None:
    async with drizzle.direct() as connection:
        await connection.execute("ALTER TABLE users DROP COLUMN avatar; ALTER TABLE usage ALTER model DROP NOT NULL")
    assert await refused(drizzle) == (
        "users.avatar: the column is missing; expected text",
        "usage.model: is text; expected text NOT NULL",
    )


async def test_an_empty_database_is_not_adopted(empty_database_url: str) -> None:
    async with Engine(empty_database_url) as engine:
        assert await refused(engine) == tuple(
            f"{table}: the table is missing" for table in ("users", "sessions", "accounts", "subscriptions", "usage")
        )


async def test_columns_of_the_applications_own_stay(drizzle: Engine) -> None:
    async with drizzle.direct() as connection:
        await connection.execute("ALTER TABLE users ADD COLUMN theme text, ADD COLUMN seats int NOT NULL DEFAULT 1")
    lines: list[str] = []
    await adopt(drizzle, report=lines.append)
    assert "users.seats is not the seed's and stays as it is" in lines
    assert "users.theme is not the seed's and stays as it is" in lines
    assert await drizzle.fetchval("SELECT seats FROM users") == 1


async def test_rows_in_the_way_of_unique_indexes_are_named_without_addresses(drizzle: Engine) -> None:
    async with drizzle.direct() as connection:
        await connection.execute("""
            INSERT INTO users (id, email, name) VALUES ('u2', 'ADA@example.com', 'Ada');
            INSERT INTO accounts (id, user_id, provider, provider_account_id) VALUES ('a2', 'u2', 'github', '42');
            INSERT INTO subscriptions (id, user_id, plan, status) VALUES
                ('b2', 'u1', 'pro', 'past_due'), ('b3', 'u1', 'pro', 'trialing'), ('b4', 'u1', 'pro', 'cancelled');
        """)
    differences = await refused(drizzle)
    assert differences == (
        "accounts: one identity at 'github' stands in several rows, ids 'a1', 'a2'",
        "users: one e-mail address in different letter case stands in several rows, ids 'u1', 'u2'",
        "subscriptions: user 'u1' has 3 live rows, ids 'b1', 'b2', 'b3'",
    )


async def test_many_duplicates_are_not_all_named(drizzle: Engine) -> None:
    await drizzle.fetch("""
        INSERT INTO subscriptions (id, user_id, plan)
        SELECT 'u1-' || n, 'u1', 'pro' FROM generate_series(1, 9) n
    """)
    assert await refused(drizzle) == (
        "subscriptions: user 'u1' has 10 live rows, ids 'b1', 'u1-1', 'u1-2', 'u1-3', 'u1-4'",
    )
    await drizzle.fetch("INSERT INTO users (id, email, name) SELECT 'v' || n, n, 'n' FROM generate_series(1, 30) n")
    await drizzle.fetch("""
        INSERT INTO subscriptions (id, user_id, plan)
        SELECT id || '-' || n, id, 'pro' FROM users, generate_series(1, 2) n WHERE id LIKE 'v%'
    """)
    differences = await refused(drizzle)
    assert len(differences) == 21
    assert differences[-1] == "… and more"


async def test_rows_that_are_not_live_stay_legal(drizzle: Engine) -> None:
    await drizzle.fetch(
        "INSERT INTO subscriptions (id, user_id, plan, status) SELECT 'old' || n, 'u1', 'pro', 'cancelled'"
        " FROM generate_series(1, 3) n"
    )
    await adopt(drizzle)
    assert await drizzle.fetchval("SELECT count(*) FROM subscriptions") == 4


async def test_without_adopting_the_tables_are_in_the_way(drizzle: Engine) -> None:
    with pytest.raises(MigrationError, match=r"the five tables of the seed.*`kitrocket db adopt`"):
        await migrate(drizzle)
    assert await applied(drizzle, APP) == set()


@pytest.mark.scale
async def test_a_large_live_database_is_adopted_and_no_writer_waits_for_a_second(drizzle: Engine) -> None:
    async with drizzle.direct() as connection:
        await connection.execute(
            """
            INSERT INTO users (id, email, name) SELECT 'm' || n, 'm' || n, 'm' FROM generate_series(1, 100000) n;
            INSERT INTO sessions (id, user_id, token, expires_at)
            SELECT 'm' || n, 'm' || 1 + n % 100000, 'm' || n, '2030-01-01' FROM generate_series(1, 1000000) n;
            INSERT INTO usage (id, user_id, tokens_used, model)
            SELECT 'm' || n, 'm' || 1 + n % 100000, 1, 'm' FROM generate_series(1, 3000000) n;
            """,
            timeout=100,
        )
    waits: list[float] = []
    done = anyio.Event()

    async def write(number: int) -> None:
        while not done.is_set():
            begun = anyio.current_time()
            id = f"w{number}-{len(waits)}"
            async with drizzle.transaction():
                await drizzle.fetch("INSERT INTO users (id, email, name) VALUES ($1, $1, 'w')", id)
                await drizzle.fetch("INSERT INTO usage (id, user_id, tokens_used, model) VALUES ($1, $1, 1, 'm')", id)
                await drizzle.fetch("UPDATE sessions SET ip_address = 'x' WHERE id = $1", f"m{len(waits) % 1000 + 1}")
            waits.append(anyio.current_time() - begun)

    async with anyio.create_task_group() as group:
        for number in range(4):
            group.start_soon(write, number)
        await adopt(drizzle)
        done.set()
    print(f"{len(waits)} writes, the slowest took {max(waits):.3f} s")
    assert max(waits) <= 1
    await check(drizzle)


async def test_a_history_that_drizzle_kit_push_dropped_is_written_again(drizzle: Engine) -> None:
    await adopt(drizzle)
    await drizzle.fetch("INSERT INTO kitrocket.dodo_payments (payment_id) VALUES ('kept')")
    await drizzle.fetch("DROP TABLE migration")
    await drizzle.fetch("DROP INDEX users_lower_email_idx")
    # What makes a table is known by it, so only what makes no table runs again.
    makers = ("2026-11-24T23:02:26:065811", "2026-11-25T01:10:00:000000")
    assert await adopt(drizzle) == [id for id in IDS[3:] if id not in makers]
    await check(drizzle)
    assert await drizzle.fetchval("SELECT payment_id FROM kitrocket.dodo_payments") == "kept"
    assert await drizzle.fetchval("SELECT to_regclass('users_lower_email_idx')") is not None
