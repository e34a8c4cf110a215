"""The migrated database, the seed's DDL and the table classes say the same."""

from __future__ import annotations

import re
from pathlib import Path

import asyncpg
import pytest
from catalogue import SEED_SQL, SEED_TABLES, columns, constraints, indexes
from piccolo.apps.migrations.commands.new import AutoMigrationManager

from kitrocket import ddl, piccolo_migrations
from kitrocket.ddl import SEED_INDEXES
from kitrocket.engine import Engine, choose_conf
from kitrocket.migrations.forwards import modules_of
from kitrocket.piccolo_app import APP_CONFIG
from kitrocket.tables import OWN_TABLES, NewId, UtcNow

pytestmark = pytest.mark.asyncio


async def test_the_five_tables_are_the_seeds_column_by_column(engine: Engine, empty_database_url: str) -> None:
    seed = await asyncpg.connect(empty_database_url)
    try:
        await seed.execute(SEED_SQL)
        expected = await columns(seed), await constraints(seed)
    finally:
        await seed.close()
    async with engine.direct() as connection:
        found = await columns(connection), await constraints(connection)

    def without_history(rows):
        return [row for row in rows if row[0] != "migration"]

    assert without_history(found[0]) == expected[0]
    assert without_history(found[1]) == expected[1]
    assert {row[0] for row in expected[0]} == set(SEED_TABLES)
    assert len(expected[0]) == 37


async def test_beyond_the_seed_there_are_indexes_only(engine: Engine, empty_database_url: str) -> None:
    seed = await asyncpg.connect(empty_database_url)
    try:
        await seed.execute(SEED_SQL)
        expected = await indexes(seed)
    finally:
        await seed.close()
    async with engine.direct() as connection:
        found = [row for row in await indexes(connection) if row[0] != "migration"]
    added = [row for row in found if row not in expected]
    assert [row for row in expected if row not in found] == []
    assert {row[1] for row in added} == {index.name for index in SEED_INDEXES}
    assert all(row[3] for row in added)


async def test_the_indexes_are_those_that_drizzle_can_declare(engine: Engine) -> None:
    async with engine.direct() as connection:
        found = {row[1]: row[2].split(" ON ", 1) for row in await indexes(connection)}
    assert found["subscriptions_one_live_per_user"] == [
        "CREATE UNIQUE INDEX subscriptions_one_live_per_user",
        "public.subscriptions USING btree (user_id) "
        "WHERE (status = ANY (ARRAY['active'::text, 'trialing'::text, 'past_due'::text]))",
    ]
    assert found["usage_user_created_idx"][1] == (
        "public.usage USING btree (user_id, created_at) INCLUDE (tokens_used, model)"
    )
    assert found["usage_created_at_brin"][1] == "public.usage USING brin (created_at)"
    assert found["users_lower_email_idx"] == [
        "CREATE UNIQUE INDEX users_lower_email_idx",
        "public.users USING btree (lower(email))",
    ]
    assert found["accounts_provider_provider_account_id_idx"] == [
        "CREATE UNIQUE INDEX accounts_provider_provider_account_id_idx",
        "public.accounts USING btree (provider, provider_account_id)",
    ]


async def test_own_tables_have_the_columns_of_their_classes(engine: Engine) -> None:
    async with engine.direct() as connection:
        rows = await columns(connection, "kitrocket")
    for table in OWN_TABLES:
        found = [(row[2], row[4]) for row in rows if row[0] == table._meta.tablename]
        assert found == [(column._meta.name, not column._meta.params["null"]) for column in table._meta.columns]
    collations = {(row[0], row[2]): row[7] for row in rows}
    assert collations["dodo_subscriptions", "event_key"] == "C"
    assert collations["dodo_subscriptions", "named_key"] == "C"


async def test_schema_kitrocket_is_open_to_nobody_but_its_owner(engine: Engine) -> None:
    assert await engine.fetchval("SELECT nspacl FROM pg_namespace WHERE nspname = 'kitrocket'") is None
    granted = "SELECT count(*) FROM pg_class WHERE relnamespace = 'kitrocket'::regnamespace AND relacl IS NOT NULL"
    assert await engine.fetchval(granted) == 0


async def test_migrations_and_tables_differ_by_nothing() -> None:
    choose_conf()
    statements = await AutoMigrationManager(auto_input="n").get_alter_statements(APP_CONFIG)
    assert [line for group in statements for line in group.statements] == []


async def test_migrations_import_the_defaults_by_a_path_that_may_not_change() -> None:
    assert (NewId.__module__, NewId.__qualname__, repr(NewId())) == ("kitrocket.tables", "NewId", "NewId()")
    assert (UtcNow.__module__, UtcNow.__qualname__, repr(UtcNow())) == ("kitrocket.tables", "UtcNow", "UtcNow()")


async def test_migrations_import_their_indexes_by_names_that_may_not_change() -> None:
    named = {name for name, value in vars(ddl).items() if isinstance(value, ddl.ConcurrentIndex)}
    modules = modules_of(piccolo_migrations).values()
    assert {name for module in modules for name in vars(module)} & set(vars(ddl)) >= {"execute", *named}
    assert set(SEED_INDEXES) == {getattr(ddl, name) for name in named}


async def test_the_guide_declares_every_index_for_drizzle() -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "share-with-drizzle.md").read_text(
        encoding="utf-8"
    )
    declared = re.findall(r'^\s*(uniqueIndex|index)\("(\w+)"\)', guide, re.MULTILINE)
    assert {name: kind == "uniqueIndex" for kind, name in declared} == {
        index.name: index.duplicates is not None for index in SEED_INDEXES
    }
