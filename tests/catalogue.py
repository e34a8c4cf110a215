"""What PostgreSQL's catalogue says about tables, as rows that can be compared."""

from __future__ import annotations

from pathlib import Path

import asyncpg

SEED_SQL = (Path(__file__).parent / "migrations" / "seed.sql").read_text(encoding="utf-8")
SEED_TABLES = ["users", "sessions", "accounts", "subscriptions", "usage"]

_COLUMNS = """
SELECT c.relname, row_number() OVER (PARTITION BY c.oid ORDER BY a.attnum) AS place, a.attname,
       format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity::text,
       a.attgenerated::text, l.collname, pg_get_expr(d.adbin, d.adrelid)
  FROM pg_attribute a
  JOIN pg_class c ON c.oid = a.attrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
  LEFT JOIN pg_collation l ON l.oid = a.attcollation
 WHERE n.nspname = $1 AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped
 ORDER BY 1, 2
"""
_CONSTRAINTS = """
SELECT c.relname, k.conname, k.contype::text, pg_get_constraintdef(k.oid), k.convalidated, k.condeferrable
  FROM pg_constraint k
  JOIN pg_class c ON c.oid = k.conrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = $1 AND k.contype <> 'n'
 ORDER BY 1, 2
"""
_INDEXES = """
SELECT c.relname, i.relname, pg_get_indexdef(i.oid), x.indisvalid
  FROM pg_index x
  JOIN pg_class i ON i.oid = x.indexrelid
  JOIN pg_class c ON c.oid = x.indrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = $1
 ORDER BY 1, 2
"""

Rows = list[tuple[object, ...]]


async def columns(connection: asyncpg.Connection, schema: str = "public") -> Rows:
    return [tuple(row) for row in await connection.fetch(_COLUMNS, schema)]


async def constraints(connection: asyncpg.Connection, schema: str = "public") -> Rows:
    return [tuple(row) for row in await connection.fetch(_CONSTRAINTS, schema)]


async def indexes(connection: asyncpg.Connection, schema: str = "public") -> Rows:
    return [tuple(row) for row in await connection.fetch(_INDEXES, schema)]


async def everything(connection: asyncpg.Connection) -> dict[str, Rows]:
    """All of both schemas but Piccolo's history."""
    found: dict[str, Rows] = {}
    for schema in ("public", "kitrocket"):
        for kind in (columns, constraints, indexes):
            rows = await kind(connection, schema)
            found[f"{kind.__name__} of {schema}"] = [row for row in rows if row[0] != "migration"]
    return found


async def fill(connection: asyncpg.Connection) -> None:
    """One user with a row in each of the seed's tables."""
    await connection.execute("""
        INSERT INTO users (id, email, name) VALUES ('u1', 'Ada@Example.com', 'Ada');
        INSERT INTO sessions (id, user_id, token, expires_at) VALUES ('s1', 'u1', 'secret', '2030-01-01');
        INSERT INTO accounts (id, user_id, provider, provider_account_id) VALUES ('a1', 'u1', 'github', '42');
        INSERT INTO subscriptions (id, user_id, plan) VALUES ('b1', 'u1', 'pro');
        INSERT INTO usage (id, user_id, tokens_used, model) VALUES ('c1', 'u1', 7, 'claude-sonnet-4-20250514');
    """)


async def counts(connection: asyncpg.Connection) -> dict[str, int]:
    """How many rows each of the seed's tables has."""
    return {table: await connection.fetchval(f"SELECT count(*) FROM public.{table}") for table in SEED_TABLES}
