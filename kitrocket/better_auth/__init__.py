"""What Better Auth wants beyond the five tables, for a database that both write: an opt-in Piccolo app.

``kitrocket db migrate --better-auth`` applies it, as does ``"kitrocket.better_auth.piccolo_app"`` in an application's
``APP_REGISTRY`` with ``piccolo migrations forwards kitrocket_better_auth``. kitrocket itself needs none of it.
"""

from __future__ import annotations

from kitrocket.better_auth import piccolo_migrations
from kitrocket.ddl import ConcurrentIndex
from kitrocket.engine import Engine
from kitrocket.migrations import Report, migrate_app

__all__ = ["APP", "SESSIONS_CREATED_AT", "migrate_better_auth"]

APP = "kitrocket_better_auth"

#: For the sweep of sessions past ``max_lifetime``, which Better Auth does not know and extends beyond.
SESSIONS_CREATED_AT = ConcurrentIndex("sessions_created_at_idx", "sessions", "(created_at)")


async def migrate_better_auth(engine: Engine, *, report: Report | None = None) -> list[str]:
    """Add what Better Auth wants to a database that has the five tables, and return the ids of what was applied.

    What stands already, because Drizzle made it, stays. Safe when several processes start at once. Raises
    :class:`MigrationError`, and :class:`ConfigurationError` behind a pooler without ``DATABASE_DIRECT_URL``.
    """
    return await migrate_app(engine, APP, piccolo_migrations, report=report)
