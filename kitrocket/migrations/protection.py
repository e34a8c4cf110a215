"""Keep the tables from those who hold a public key: Supabase's roles ``anon`` and ``authenticated``.

Supabase serves every table of schema ``public`` over HTTP under these two roles. The revoked grant is the protection;
row-level security is the second lock, which ``drizzle-kit push`` opens again unless its schema says ``.enableRLS()``.
"""

from __future__ import annotations

import random

import anyio
import asyncpg

from kitrocket.ddl import Connection
from kitrocket.engine import Engine
from kitrocket.errors import MigrationError
from kitrocket.migrations.forwards import Report, silence, turn

#: The roles of who holds a public key, or is signed in with one.
ROLES = ("anon", "authenticated")
#: The five, and what else stands in ``public``: Better Auth's reset tokens, Piccolo's history of migrations.
_TABLES = ("users", "sessions", "accounts", "subscriptions", "usage", "verification", "migration")
_LOCK_ATTEMPTS = 30

_FIND = """
SELECT c.relname AS name, c.relrowsecurity AS secured,
       array_agg(DISTINCT r.rolname::text ORDER BY r.rolname::text) FILTER (WHERE p.granted) AS roles
  FROM pg_class c
  CROSS JOIN pg_roles r
  CROSS JOIN LATERAL (
    SELECT bool_or(has_table_privilege(r.oid, c.oid, privilege)) AS granted
      FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']
                  || CASE WHEN current_setting('server_version_num')::int >= 170000 THEN ARRAY['MAINTAIN'] END)
           AS privilege
     UNION ALL
    SELECT has_any_column_privilege(r.oid, c.oid, 'SELECT, INSERT, UPDATE, REFERENCES')
  ) p
 WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p')
   AND c.relname = ANY ($1::text[]) AND r.rolname = ANY ($2::text[])
 GROUP BY c.oid, c.relname, c.relrowsecurity
 ORDER BY array_position($1::text[], c.relname::text)
"""
_SCHEMA = """
SELECT r.rolname FROM pg_roles r
 WHERE r.rolname = ANY ($1::text[]) AND to_regnamespace('kitrocket') IS NOT NULL
   AND (has_schema_privilege(r.rolname, 'kitrocket', 'USAGE') OR has_schema_privilege(r.rolname, 'kitrocket', 'CREATE'))
 ORDER BY 1
"""


async def find_exposed(engine: Engine) -> list[str]:
    """Return a line for each way in which Supabase's roles can reach a table; none where the roles don't exist."""
    async with engine.direct() as connection:
        return await _exposed(connection)


async def protect(engine: Engine, *, report: Report | None = None) -> bool:
    """Revoke what Supabase's roles were granted and switch row-level security on; answer whether the roles exist.

    The owner of the tables, through which applications connect, is unaffected. A role of yours that is not the owner
    sees no row any more until it has a policy. Can be run again at any time.

    Raises :class:`MigrationError` when the connected role may not do so, or when something is left, which then comes
    from a role that these two are members of.
    """
    tell = report or silence
    async with turn(engine, tell) as connection:
        roles = [row["name"] for row in await connection.fetch(_EXISTING, list(ROLES))]
        if not roles:
            return False
        from_whom = ", ".join(["PUBLIC", *roles])
        tables = [row["name"] for row in await connection.fetch(_FIND, list(_TABLES), roles)]
        if await connection.fetchval("SELECT to_regnamespace('kitrocket') IS NOT NULL"):
            await _run(connection, f"REVOKE ALL ON SCHEMA kitrocket FROM {from_whom}")
        for table in tables:
            await _run(
                connection,
                f"REVOKE ALL ON TABLE public.{table} FROM {from_whom};"
                f" ALTER TABLE public.{table} ENABLE ROW LEVEL SECURITY",
            )
            tell(f"protected {table}")
        left = await _exposed(connection)
    if left:
        raise MigrationError("still exposed, through another role or another grantor: " + "; ".join(left))
    return True


_EXISTING = "SELECT rolname::text AS name FROM pg_roles WHERE rolname = ANY ($1::text[]) ORDER BY 1"


async def _exposed(connection: Connection) -> list[str]:
    lines = []
    for row in await connection.fetch(_FIND, list(_TABLES), list(ROLES)):
        if row["roles"]:
            lines.append(f"table {row['name']} is granted to {' and '.join(row['roles'])}")
        if not row["secured"]:
            lines.append(f"table {row['name']} has no row-level security")
    lines += [f"schema kitrocket is granted to {row[0]}" for row in await connection.fetch(_SCHEMA, list(ROLES))]
    return lines


async def _run(connection: Connection, sql: str) -> None:
    """Run statements that wait for the table's writers, in one transaction, for a second at a time."""
    for attempt in range(1, _LOCK_ATTEMPTS + 1):
        try:
            async with connection.transaction():
                await connection.execute(sql)
        except asyncpg.LockNotAvailableError as error:
            if attempt == _LOCK_ATTEMPTS:
                raise MigrationError("a table is locked by somebody else; try again later") from error
            await anyio.sleep(random.uniform(0.05, 0.5))  # noqa: S311 - jitter is no secret
        except asyncpg.InsufficientPrivilegeError as error:
            raise MigrationError("only the owner of the tables can protect them; connect as that role") from error
        else:
            return
