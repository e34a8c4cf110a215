"""The hot statements find their rows by an index, at sizes where reading a whole table would be chosen otherwise."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from kitrocket.clock import to_db
from kitrocket.sql import statements
from servers import Server

pytestmark = pytest.mark.asyncio(loop_scope="session")

NOW = to_db(datetime(2026, 3, 1, 12, tzinfo=UTC))
WEEK, DAY = timedelta(days=7), timedelta(days=1)

ROWS = """
INSERT INTO users (id, email, name, email_verified, created_at, updated_at)
SELECT 'u' || n, 'User' || n || '@Example.com', 'n', '2026-01-01', '2026-01-01', '2026-01-01'
  FROM generate_series(1, 5000) n;
INSERT INTO sessions (id, user_id, token, expires_at, created_at)
SELECT 's' || n, 'u' || 1 + n % 5000, 't' || n, timestamp '2026-03-01' + n * interval '1 minute', '2026-02-25'
  FROM generate_series(1, 20000) n;
INSERT INTO accounts (id, user_id, provider, provider_account_id, created_at)
SELECT 'a' || n, 'u' || 1 + n % 5000, CASE WHEN n <= 5000 THEN 'credential' ELSE 'github' END, n, '2026-01-01'
  FROM generate_series(1, 20000) n;
INSERT INTO subscriptions (id, user_id, plan, status, dodo_customer_id, dodo_subscription_id, created_at, updated_at)
SELECT 'b' || n, 'u' || 1 + n % 5000, 'pro', CASE WHEN n <= 5000 THEN 'active' ELSE 'cancelled' END, 'c' || n, 'd' || n,
       '2026-01-01', '2026-01-01'
  FROM generate_series(1, 20000) n;
INSERT INTO usage (id, user_id, tokens_used, model, created_at)
SELECT 'r' || n, 'u' || 1 + n % 500, 10, 'm', timestamp '2026-01-01' + n * interval '1 minute'
  FROM generate_series(1, 100000) n;
INSERT INTO kitrocket.dodo_subscriptions (subscription_id, user_id, customer_id, product_id, plan, status, event_at,
                                          event_key, reproject_at, needs_check)
SELECT 'd' || n, 'u' || 1 + n % 5000, 'c' || n, 'p', 'pro', 'active', '2026-02-01', n,
       CASE WHEN n % 100 = 0 THEN timestamp '2026-03-02' END, n % 100 = 0
  FROM generate_series(1, 10000) n;
INSERT INTO kitrocket.dodo_payments (payment_id, subscription_ids, customer_id, status)
SELECT 'p' || n, jsonb_build_array('d' || n), 'c' || n, 'succeeded' FROM generate_series(1, 10000) n;
INSERT INTO kitrocket.webhook_events (webhook_id, type, subscription_id, payment_id, customer_id, user_id, user_hint,
                                      received_at, finished_at, body_sha256, payload, state, reason, next_attempt_at)
SELECT 'w' || n, 'subscription.active', 'd' || n, 'p' || n, 'c' || n, 'u' || n, 'gone', '2026-02-01', '2026-02-01', 'x',
       '{}', CASE WHEN n % 1000 = 0 THEN 'parked' ELSE 'applied' END, CASE WHEN n % 1000 = 0 THEN 'no_user' END,
       CASE WHEN n % 1000 = 0 THEN timestamp '2026-02-02' END
  FROM generate_series(1, 20000) n;
"""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def full(server: Server, template: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to a migrated database with many rows, past any pooler; each EXPLAIN leaves them as they are."""
    name = await server.direct.create(template=template)
    connection = await asyncpg.connect(server.url(name, direct=True))
    try:
        await connection.execute(ROWS)
        await connection.execute("VACUUM ANALYZE")
        yield connection
    finally:
        await connection.close()
        await server.direct.drop(name)


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", []):
        yield from nodes(part)


async def plan_of(connection: asyncpg.Connection, sql: str, *arguments: object) -> list[dict[str, Any]]:
    return list(nodes(json.loads(await connection.fetchval(f"EXPLAIN (FORMAT JSON) {sql}", *arguments))[0]["Plan"]))


HOT = [
    ("sessions", "validate", ("t7", NOW, WEEK, DAY, None), {"sessions_token_unique", "users_pkey"}),
    ("sessions", "list", ("u7", NOW, WEEK, None, ["t7"], 100, None, None), {"sessions_user_id_idx"}),
    ("sessions", "revoke_others", ("u7", ["t7"]), {"sessions_user_id_idx"}),
    ("sessions", "delete_expired", (NOW, 100, True, None), {"sessions_expires_at_idx"}),
    ("sessions", "any_expired", (NOW + 2 * WEEK, None), {"sessions_expires_at_idx"}),
    (
        "sessions",
        "rotate",
        ("u7", ["t7"], NOW, WEEK, DAY, None, True, True, "id", "token"),
        {"sessions_user_id_idx", "sessions_pkey"},
    ),
    ("accounts", "accounts_of_user", ("u7",), {"accounts_user_id_idx"}),
    ("accounts", "account_of_identity", ("github", "7"), {"accounts_provider_provider_account_id_idx"}),
    ("accounts", "tokens_of_provider", ("u7", "github"), {"users_pkey", "accounts_user_id_idx"}),
    ("users", "user_by_email", ("user7@example.com",), {"users_lower_email_idx"}),
    ("users", "credential_by_email", ("user7@example.com",), {"users_lower_email_idx", "accounts_user_id_idx"}),
    ("users", "credential_of_user", ("u7",), {"users_pkey", "accounts_user_id_idx"}),
    (
        "users",
        "rows_of_user",
        ("u7",),
        {"users_pkey", "sessions_user_id_idx", "accounts_user_id_idx", "subscriptions_user_id_idx"},
    ),
    ("users", "user_with_subscription", ("u7",), {"users_pkey", "subscriptions_user_id_idx"}),
    ("subscriptions", "row_of_user", ("u7",), {"subscriptions_user_id_idx"}),
    ("subscriptions", "access", ("u7",), {"subscriptions_user_id_idx", "dodo_subscriptions_user_id_idx"}),
    ("usage", "total", ("u7", NOW - timedelta(days=30), None, None), {"usage_user_created_idx"}),
    ("usage", "by_model", ("u7", NOW - timedelta(days=30), NOW), {"usage_user_created_idx"}),
]


@pytest.mark.parametrize(("file", "name", "arguments", "expected"), HOT, ids=[f"{row[0]}.{row[1]}" for row in HOT])
async def test_a_hot_statement_reads_indexes_only(
    full: asyncpg.Connection, file: str, name: str, arguments: tuple[object, ...], expected: set[str]
) -> None:
    plan = await plan_of(full, statements(file)[name], *arguments)
    assert expected <= {node["Index Name"] for node in plan if "Index Name" in node}
    assert [node["Relation Name"] for node in plan if node["Node Type"] == "Seq Scan"] == []


#: How often this connection scanned each table as a whole, and each index.
SCANS = """
SELECT c.relname, c.relkind = 'r' AS whole, pg_stat_get_xact_numscans(c.oid) AS scans
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname IN ('public', 'kitrocket') AND c.relkind IN ('r', 'i')
"""
STORED = """
INSERT INTO kitrocket.webhook_events (webhook_id, type, subscription_id, customer_id, user_id, user_hint, received_at,
                                      finished_at, body_sha256, payload, state)
SELECT 'x' || n, 'subscription.active', 'd7', 'c7', 'u8', 'u8', '2026-02-01', '2026-02-01', 'x', '{}', 'applied'
  FROM generate_series(1, 10000) n;
"""
HELD = {"dodo_subscriptions_user_id_idx", "subscriptions_user_id_idx", "billing_incidents_user_id_idx"}
LOCKED = {"dodo_subscriptions_pkey", "users_pkey", "dodo_payments_subscription_ids_idx"} | HELD
BY_CUSTOMER = {"dodo_subscriptions_customer_id_idx", "subscriptions_dodo_customer_id_idx"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("d7", "c7", True, "u8", None), LOCKED),
        (("d7", "c7", False, None, None), LOCKED),
        (("new", "c7", False, None, None), LOCKED | BY_CUSTOMER),
        (("new", "new", False, None, "user8@example.com"), LOCKED | BY_CUSTOMER | {"users_lower_email_idx"}),
    ],
    ids=["named", "linked", "customer", "email"],
)
async def test_a_delivery_reads_indexes_only_however_many_events_are_stored(
    full: asyncpg.Connection, arguments: tuple[object, ...], expected: set[str]
) -> None:
    """The functions hide their plans from EXPLAIN, so that what they scanned is looked at."""
    transaction = full.transaction()
    await transaction.start()
    try:
        # As many incidents as make a whole table dear.
        await full.execute(
            "INSERT INTO kitrocket.billing_incidents (id, kind, subject, user_id, opened_at)"
            " SELECT n, 'double_billing', 'u' || n, 'u' || n, '2026-02-01' FROM generate_series(1, 5000) n;"
            "ANALYZE kitrocket.billing_incidents"
        )
        await full.execute(STORED)
        before = set(await full.fetch(SCANS))
        read = json.loads(await full.fetchval(statements("subscriptions")["lock_for_snapshot"], *arguments))
        assert read["kept"] == ["u8"]
        assert [len(holding["snapshots"]) for holding in read["holdings"]] == [2]
        scanned = set(await full.fetch(SCANS)) - before
    finally:
        await transaction.rollback()
    assert [row["relname"] for row in scanned if row["whole"]] == []
    found = {row["relname"] for row in scanned}
    assert expected <= found
    assert [name for name in found if name.startswith("webhook_events")] == []


async def test_sums_are_read_from_the_index_alone(full: asyncpg.Connection) -> None:
    plan = await plan_of(full, statements("usage")["total"], "u7", NOW - timedelta(days=30), None, None)
    assert "Index Only Scan" in {node["Node Type"] for node in plan}


async def test_the_cost_of_a_user_reads_indexes_however_often_it_is_asked(full: asyncpg.Connection) -> None:
    """One statement serves one user and all of them; a plan for both would read the whole table."""
    arguments = ("u7", NOW - timedelta(days=30), NOW, "USD", False, True, [NOW - timedelta(days=30)], 100)
    for name, index in (("cost", "usage_user_created_idx"), ("cost_rolled", "usage_daily_pkey")):
        sql = statements("prices")[name]
        plan = await plan_of(full, sql, *arguments)
        assert index in {node.get("Index Name") for node in plan}
        scanned = {node["Relation Name"] for node in plan if node["Node Type"] == "Seq Scan"}
        assert scanned <= {"usage_state", "model_prices"}
        statement = await full.prepare(sql)
        for _ in range(8):
            await statement.fetch(*arguments)
        chosen = "SELECT generic_plans FROM pg_prepared_statements WHERE name = $1"
        assert await full.fetchval(chosen, statement.get_name()) == 0


async def test_a_users_sum_is_planned_once_and_everybodys_each_time(full: asyncpg.Connection) -> None:
    """Planning takes longer than summing a user; a plan for all windows would not read all users in parallel."""
    until, midnight = NOW - timedelta(hours=1), NOW.replace(hour=0)
    days = (midnight - timedelta(days=30), midnight + timedelta(days=1))
    for name, arguments, generic in (
        ("total_rolled", ("u7", NOW - timedelta(days=30), None, days[0], None, None), 3),
        ("top_users_rolled", (NOW - timedelta(days=30), None, days[0], None, 20), 0),
        ("top_users_rolled", (NOW - timedelta(days=30), until, *days, 20), 0),
    ):
        statement = await full.prepare(statements("usage")[name])
        for _ in range(8):
            await statement.fetch(*arguments)
        chosen = "SELECT generic_plans FROM pg_prepared_statements WHERE name = $1"
        assert await full.fetchval(chosen, statement.get_name()) == generic, name


async def test_a_batch_of_the_sweep_does_not_read_what_the_batches_before_it_killed(full: asyncpg.Connection) -> None:
    """The index keeps entries of deleted rows until it is vacuumed."""

    async def entries_read(begin_at: datetime | None) -> int:
        sql = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statements('sessions')['delete_expired']}"
        plan = json.loads(await full.fetchval(sql, NOW + WEEK, 100, False, begin_at))[0]["Plan"]
        scan = next(node for node in nodes(plan) if node.get("Index Name") == "sessions_expires_at_idx")
        assert {node["Node Type"] for node in nodes(plan)} >= {"Tid Scan"}
        return int(scan["Shared Hit Blocks"] + scan["Shared Read Blocks"])

    transaction = full.transaction()
    await transaction.start()
    try:
        first = await entries_read(None)
        row = await full.fetchrow(statements("sessions")["delete_expired"], NOW + WEEK, 9_000, False, None)
        assert row is not None
        assert row["gone"] == row["found"] == 9_000
        assert await entries_read(row["last"]) < 2 * first < await entries_read(None)
    finally:
        await transaction.rollback()


@pytest.mark.parametrize("count", [1, 2, 30])
async def test_validating_is_planned_once_however_many_ask_first(full: asyncpg.Connection, count: int) -> None:
    """PostgreSQL plans five calls anew, then each one, if a plan for these looks cheaper than one for all."""
    tokens = [f"t{number}" for number in range(1, count + 1)]
    for name, arguments in (
        ("validate_many", (tokens, [NOW] * count, WEEK, DAY, 4 * WEEK)),
        ("look_up", (tokens, NOW, WEEK, 4 * WEEK)),
        ("validate", ("t1", NOW, WEEK, DAY, 4 * WEEK)),
    ):
        statement = await full.prepare(statements("sessions")[name])
        for _ in range(8):
            await statement.fetch(*arguments)
        plans = "SELECT generic_plans FROM pg_prepared_statements WHERE name = $1"
        assert await full.fetchval(plans, statement.get_name()) == 3, name
        plan = await plan_of(full, statements("sessions")[name], *arguments)
        assert [node for node in plan if node["Node Type"] == "Seq Scan"] == []


async def test_a_page_of_very_many_sessions_is_sorted_in_the_memory_of_a_page(full: asyncpg.Connection) -> None:
    """No index has this order, so every session of the user is read, but no more than a page is kept and sent."""
    transaction = full.transaction()
    await transaction.start()
    try:
        await full.execute(
            "INSERT INTO sessions (id, user_id, token, expires_at, user_agent, created_at)"
            " SELECT 'many' || n, 'u7', 'many' || n, timestamp '2026-03-20' + n * interval '1 s', repeat('x', 200),"
            " timestamp '2026-02-25' + n * interval '1 s' FROM generate_series(1, 4000) n"
        )
        sql = f"EXPLAIN (ANALYZE, FORMAT JSON) {statements('sessions')['list']}"
        found = json.loads(await full.fetchval(sql, "u7", NOW, WEEK, None, [], 50, None, None))[0]["Plan"]
        plan = list(nodes(found))
    finally:
        await transaction.rollback()
    assert {node["Relation Name"] for node in plan if node["Node Type"] == "Seq Scan"} == set()
    sorts = [node for node in plan if node["Node Type"] == "Sort"]
    assert {node["Sort Method"] for node in sorts} <= {"top-N heapsort", "quicksort"}
    assert max(node["Sort Space Used"] for node in sorts) < 200  # kB, of which the rows have a thousand
    assert found["Actual Rows"] == 50


BY_HAND = [
    ("SELECT FROM accounts WHERE provider = 'credential' AND provider_account_id = '7'",
     "accounts_provider_provider_account_id_idx"),
    ("SELECT FROM subscriptions WHERE dodo_subscription_id = 'd7'", "subscriptions_dodo_subscription_id_idx"),
    ("SELECT id FROM usage WHERE created_at BETWEEN '2026-01-02' AND '2026-01-03'", "usage_created_at_brin"),
    ("SELECT FROM kitrocket.webhook_events WHERE state IN ('received', 'parked') AND next_attempt_at <= '2026-03-01'",
     "webhook_events_due_idx"),
    ("SELECT FROM kitrocket.webhook_events WHERE state IN ('parked', 'dead') AND reason = 'no_user'",
     "webhook_events_blocked_idx"),
    ("SELECT FROM kitrocket.webhook_events WHERE hook_state = 'pending' AND hook_next_at <= '2026-03-01'",
     "webhook_events_hooks_due_idx"),
    ("SELECT FROM kitrocket.webhook_events WHERE user_id = 'u7'", "webhook_events_user_id_idx"),
    ("SELECT FROM kitrocket.webhook_events WHERE subscription_id = 'd7'", "webhook_events_subscription_id_idx"),
    ("SELECT FROM kitrocket.webhook_events WHERE payment_id = 'p7'", "webhook_events_payment_id_idx"),
    ("SELECT FROM kitrocket.webhook_events WHERE payload IS NOT NULL AND finished_at <= '2026-01-01'",
     "webhook_events_finished_idx"),
    ("SELECT FROM kitrocket.webhook_events ORDER BY received_at DESC LIMIT 10", "webhook_events_received_at_idx"),
    ("SELECT FROM kitrocket.dodo_subscriptions WHERE reproject_at <= '2026-03-01'",
     "dodo_subscriptions_reproject_at_idx"),
    ("SELECT FROM kitrocket.dodo_subscriptions WHERE needs_check", "dodo_subscriptions_needs_check_idx"),
    ("SELECT FROM kitrocket.dodo_payments WHERE customer_id = 'c7'", "dodo_payments_customer_id_idx"),
]  # fmt: skip


@pytest.mark.parametrize(("sql", "index"), BY_HAND, ids=[row[1] for row in BY_HAND])
async def test_an_index_serves_what_it_is_for(full: asyncpg.Connection, sql: str, index: str) -> None:
    assert index in {node.get("Index Name") for node in await plan_of(full, sql)}


async def test_what_is_due_for_retry_is_found_without_reading_the_inbox(full: asyncpg.Connection) -> None:
    plan = await plan_of(full, statements("webhooks")["events_to_retry"], NOW)
    found = {node["Relation Name"] for node in plan if node["Node Type"] == "Seq Scan"}
    assert "webhook_events" not in found


async def test_a_claim_of_the_export_reads_indexes_however_long_the_backlog_is(full: asyncpg.Connection) -> None:
    transaction = full.transaction()
    await transaction.start()
    await full.execute(
        "INSERT INTO kitrocket.usage_outbox (usage_id, user_id, created_at, next_at)"
        " SELECT id, user_id, created_at, created_at FROM usage; ANALYZE kitrocket.usage_outbox"
    )
    plan = await plan_of(full, statements("export")["claim"], NOW, NOW, 1000)
    await transaction.rollback()
    assert [node["Relation Name"] for node in plan if node["Node Type"] == "Seq Scan"] == []
    assert {node["Index Name"] for node in plan if "Index Name" in node} >= {"usage_outbox_due_idx", "usage_pkey"}
