"""Bring the Studio's login tables to the schema of this version."""

from __future__ import annotations

from kitrocket.admin import piccolo_migrations
from kitrocket.engine import Engine
from kitrocket.migrations import migrate_app

APP = "kitrocket_admin"


async def migrate_studio(engine: Engine) -> list[str]:
    """Make or change the tables of the Studio's logins and return the ids of what was applied.

    Safe when several processes start at once. Raises :class:`MigrationError`, and :class:`ConfigurationError` behind a
    pooler without ``DATABASE_DIRECT_URL``.
    """
    return await migrate_app(engine, APP, piccolo_migrations)
