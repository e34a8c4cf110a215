"""Take over a database whose five tables another tool made, such as Drizzle."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from kitrocket import piccolo_migrations
from kitrocket.ddl import Connection
from kitrocket.engine import Engine
from kitrocket.errors import SchemaMismatchError
from kitrocket.migrations.forwards import (
    APP,
    Report,
    applied,
    create_history,
    fill,
    forwards,
    modules_of,
    note,
    refuse_duplicates,
    silence,
    turn,
)

#: The migration that gives foreign keys the names they have in a database made by Drizzle.
_RENAMING = "2026-11-24T22:06:59:582920"

_TEXT = "text"
_TIME = "timestamp without time zone"
_REQUIRED = " NOT NULL"
_NOW = f"{_TIME} NOT NULL DEFAULT now()"

#: The seed's columns, as PostgreSQL describes them.
_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "users": {
        "id": _TEXT + _REQUIRED,
        "email": _TEXT + _REQUIRED,
        "name": _TEXT + _REQUIRED,
        "email_verified": _TIME,
        "avatar": _TEXT,
        "created_at": _NOW,
        "updated_at": _NOW,
    },
    "sessions": {
        "id": _TEXT + _REQUIRED,
        "user_id": _TEXT + _REQUIRED,
        "token": _TEXT + _REQUIRED,
        "expires_at": _TIME + _REQUIRED,
        "ip_address": _TEXT,
        "user_agent": _TEXT,
        "created_at": _NOW,
    },
    "accounts": {
        "id": _TEXT + _REQUIRED,
        "user_id": _TEXT + _REQUIRED,
        "provider": _TEXT + _REQUIRED,
        "provider_account_id": _TEXT + _REQUIRED,
        "access_token": _TEXT,
        "refresh_token": _TEXT,
        "expires_at": _TIME,
        "password": _TEXT,
        "created_at": _NOW,
    },
    "subscriptions": {
        "id": _TEXT + _REQUIRED,
        "user_id": _TEXT + _REQUIRED,
        "plan": _TEXT + _REQUIRED,
        "status": "text NOT NULL DEFAULT 'active'::text",
        "dodo_customer_id": _TEXT,
        "dodo_subscription_id": _TEXT,
        "current_period_end": _TIME,
        "created_at": _NOW,
        "updated_at": _NOW,
    },
    "usage": {
        "id": _TEXT + _REQUIRED,
        "user_id": _TEXT + _REQUIRED,
        "tokens_used": "integer NOT NULL",
        "model": _TEXT + _REQUIRED,
        "created_at": _NOW,
    },
}

_CHILD = "FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE"

#: The seed's constraints by table, then by name.
_CONSTRAINTS: Mapping[str, Mapping[str, str]] = {
    "users": {"users_pkey": "PRIMARY KEY (id)", "users_email_unique": "UNIQUE (email)"},
    "sessions": {
        "sessions_pkey": "PRIMARY KEY (id)",
        "sessions_token_unique": "UNIQUE (token)",
        "sessions_user_id_users_id_fk": _CHILD,
    },
    "accounts": {"accounts_pkey": "PRIMARY KEY (id)", "accounts_user_id_users_id_fk": _CHILD},
    "subscriptions": {"subscriptions_pkey": "PRIMARY KEY (id)", "subscriptions_user_id_users_id_fk": _CHILD},
    "usage": {"usage_pkey": "PRIMARY KEY (id)", "usage_user_id_users_id_fk": _CHILD},
}

_FIND_COLUMNS = """
SELECT a.attname AS name,
       format_type(a.atttypid, a.atttypmod)
         || CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END
         || coalesce(' DEFAULT ' || pg_get_expr(d.adbin, d.adrelid), '') AS description,
       a.attnotnull AND d.adbin IS NULL AND a.attidentity = '' AS required
  FROM pg_attribute a
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped
 ORDER BY a.attnum
"""

_FIND_CONSTRAINTS = """
SELECT conname AS name, pg_get_constraintdef(oid) AS description
  FROM pg_constraint
 WHERE conrelid = to_regclass($1) AND contype IN ('p', 'u', 'f')
 ORDER BY conname
"""


async def adopt(engine: Engine, *, report: Report | None = None) -> list[str]:
    """Take over a database that holds the seed's five tables, with their rows, and bring it to this version.

    What already stands is noted as applied, the rest runs as in :func:`~kitrocket.migrations.migrate`. Returns the ids
    of the migrations that ran. Columns beyond the seed's stay, and ``report`` names them.

    Raises :class:`SchemaMismatchError`, and changes nothing, when a table differs from the seed or when rows are in the
    way of a unique index; ``differences`` has a line for each.
    """
    tell = report or silence
    modules = modules_of(piccolo_migrations)
    async with turn(engine, tell) as connection:
        differences = [line for table in _COLUMNS for line in await _differences(connection, table, tell)]
        if differences:
            raise SchemaMismatchError(differences)
        done = await applied(connection, APP)
        standing = [
            module for name, module in modules.items() if name not in done and await _stands(connection, module)
        ]
        await refuse_duplicates(
            connection, [module for name, module in modules.items() if name not in done and module not in standing]
        )
        await create_history(connection)
        async with connection.transaction():
            for module in standing:
                await note(connection, APP, module.ID)
                tell(f"already there {module.ID}: {module.DESCRIPTION}")
        done_now = await forwards(connection, APP, modules, tell)
    await fill(engine, report)
    return done_now


async def is_foreign(engine: Engine) -> bool:
    """Whether the five tables stand without a history of ours: another tool made them, or dropped the history."""
    if await applied(engine, APP):
        return False
    standing: int = await engine.fetchval(
        "SELECT count(*) FROM unnest($1::text[]) t WHERE to_regclass('public.' || t) IS NOT NULL", list(_COLUMNS)
    )
    return standing == len(_COLUMNS)


async def _stands(connection: Connection, module: ModuleType) -> bool:
    """Whether what a migration makes is there: the tables it creates, or the names of the compared constraints."""
    if module.ID == _RENAMING:
        return True
    manager = await module.forwards()
    tables = [f"{table.schema or 'public'}.{table.tablename}" for table in manager.add_tables]
    if not tables:
        return False
    missing = await connection.fetchval(
        "SELECT count(*) FROM unnest($1::text[]) t WHERE to_regclass(t) IS NULL", tables
    )
    return bool(missing == 0)


async def _differences(connection: Connection, table: str, tell: Report) -> list[str]:
    """Return a line for each way in which a table is not the seed's."""
    columns = {row["name"]: row for row in await connection.fetch(_FIND_COLUMNS, f"public.{table}")}
    if not columns:
        return [f"{table}: the table is missing"]
    lines: list[str] = []
    for name, expected in _COLUMNS[table].items():
        if name not in columns:
            lines.append(f"{table}.{name}: the column is missing; expected {expected}")
        elif columns[name]["description"] != expected:
            lines.append(f"{table}.{name}: is {columns[name]['description']}; expected {expected}")
    for name in columns.keys() - _COLUMNS[table].keys():
        if columns[name]["required"]:
            lines.append(f"{table}.{name}: a column that is not the seed's must be nullable or have a default")
        else:
            tell(f"{table}.{name} is not the seed's and stays as it is")
    found = {row["name"]: row["description"] for row in await connection.fetch(_FIND_CONSTRAINTS, f"public.{table}")}
    return [*sorted(lines), *_constraint_differences(table, found)]


def _constraint_differences(table: str, found: Mapping[str, str]) -> list[str]:
    lines: list[str] = []
    for name, expected in _CONSTRAINTS[table].items():
        if found.get(name) == expected:
            continue
        others = [other for other, description in found.items() if description == expected]
        if name in found:
            lines.append(f"{table}: constraint {name} is {found[name]}; expected {expected}")
        elif others:
            lines.append(f"{table}: constraint {expected} is named {others[0]}; expected {name}")
        else:
            lines.append(f"{table}: constraint {name} is missing; expected {expected}")
    return lines
