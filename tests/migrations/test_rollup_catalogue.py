"""The tables, functions and triggers of the rollup, as PostgreSQL's catalogue has them: no Piccolo class knows them."""

from __future__ import annotations

import pytest
from catalogue import columns, constraints, indexes

from kitrocket.engine import Engine

pytestmark = pytest.mark.asyncio

CASCADE = "FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE"
TABLES = ("usage_daily", "usage_outbox", "usage_state")


async def test_the_tables_are_these(engine: Engine) -> None:
    async with engine.direct() as connection:
        found = [
            (row[0], row[2], row[3], row[4], row[8])
            for row in await columns(connection, "kitrocket")
            if row[0] in TABLES
        ]
        rules = [(row[0], row[1], row[3]) for row in await constraints(connection, "kitrocket") if row[0] in TABLES]
        served = [(row[1], row[3]) for row in await indexes(connection, "kitrocket") if row[0] in TABLES]
        options = await connection.fetchval(
            "SELECT reloptions FROM pg_class WHERE oid = 'kitrocket.usage_daily'::regclass"
        )
    assert found == [
        ("usage_daily", "user_id", "text", True, None),
        ("usage_daily", "day", "date", True, None),
        ("usage_daily", "model", "text", True, None),
        ("usage_daily", "tokens", "bigint", True, None),
        ("usage_daily", "calls", "bigint", True, None),
        ("usage_outbox", "usage_id", "text", True, None),
        ("usage_outbox", "user_id", "text", True, None),
        ("usage_outbox", "created_at", "timestamp without time zone", True, None),
        ("usage_outbox", "state", "text", True, "'pending'::text"),
        ("usage_outbox", "attempts", "integer", True, "0"),
        ("usage_outbox", "next_at", "timestamp without time zone", True, None),
        ("usage_outbox", "error", "text", False, None),
        ("usage_state", "one", "boolean", True, "true"),
        ("usage_state", "rollup_from", "date", True, None),
        ("usage_state", "raw_from", "date", True, None),
    ]
    assert rules == [
        ("usage_daily", "usage_daily_pkey", "PRIMARY KEY (user_id, day, model)"),
        ("usage_daily", "usage_daily_user_id_users_id_fk", CASCADE),
        ("usage_outbox", "usage_outbox_pkey", "PRIMARY KEY (usage_id)"),
        ("usage_outbox", "usage_outbox_state", "CHECK ((state = ANY (ARRAY['pending'::text, 'parked'::text])))"),
        ("usage_outbox", "usage_outbox_user_id_users_id_fk", CASCADE),
        ("usage_state", "usage_state_is_one_row", "CHECK (one)"),
        ("usage_state", "usage_state_pkey", "PRIMARY KEY (one)"),
    ]  # fmt: skip
    assert served == [
        ("usage_daily_day_idx", True),
        ("usage_daily_pkey", True),
        ("usage_outbox_due_idx", True),
        ("usage_outbox_pkey", True),
        ("usage_state_pkey", True),
    ]
    assert options == ["fillfactor=70"]


async def test_a_new_database_has_complete_sums(engine: Engine) -> None:
    rows = await engine.fetch("SELECT rollup_from = '-infinity', raw_from = '-infinity' FROM kitrocket.usage_state")
    assert [tuple(row) for row in rows] == [(True, True)]


async def test_the_triggers_fire_once_a_statement_with_their_owners_rights(engine: Engine) -> None:
    rows = await engine.fetch(
        """
        SELECT t.tgname, p.prosecdef, p.proconfig, t.tgtype & 1 AS each_row, t.tgenabled::text, p.proacl::text
          FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
         WHERE t.tgrelid = 'usage'::regclass AND NOT t.tgisinternal
         ORDER BY t.tgname
        """
    )
    assert [(row["tgname"], row["tgenabled"]) for row in rows] == [
        *((f"kitrocket_usage_{event}", "O") for event in ("deleted", "inserted", "truncated", "updated")),
        # Switched on by whoever exports.
        ("kitrocket_write_outbox", "D"),
    ]
    for row in rows:
        assert row["prosecdef"]
        assert row["proconfig"] == ["search_path=pg_catalog, pg_temp"]
        assert row["each_row"] == 0
        assert "{=" not in row["proacl"], "nobody else may call it"
        assert ",=" not in row["proacl"]


async def test_the_table_of_prices_is_this(engine: Engine) -> None:
    async with engine.direct() as connection:
        found = [(row[2], row[3], row[4]) for row in await columns(connection, "kitrocket") if row[0] == "model_prices"]
        rules = [row[1:4:2] for row in await constraints(connection, "kitrocket") if row[0] == "model_prices"]
    assert found == [
        ("model", "text", True),
        ("currency", "text", True),
        ("valid_from", "date", True),
        ("per_million", "numeric(20,10)", True),
    ]
    assert rules == [
        (
            "model_prices_are_not_negative",
            "CHECK (((per_million >= (0)::numeric) AND (per_million <> 'NaN'::numeric)))",
        ),
        ("model_prices_pkey", "PRIMARY KEY (model, currency, valid_from)"),
    ]
