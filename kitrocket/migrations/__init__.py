"""Bring a database to the schema of this version, safely when several processes start at once.

Piccolo writes and understands the migration files; this package runs them on the engine it is given, so that two
databases can be migrated in one process, past any pooler, one migrator at a time. It keeps Piccolo's history table, so
``piccolo migrations forwards kitrocket`` and :func:`migrate` can take turns. Nothing is printed.
"""

from kitrocket.migrations.adoption import adopt, is_foreign
from kitrocket.migrations.forwards import Report, applied, check, migrate, migrate_app, pending
from kitrocket.migrations.outbox import check_outbox, fill_outbox, is_outbox_filled
from kitrocket.migrations.protection import find_exposed, protect
from kitrocket.migrations.push import push

__all__ = [
    "Report",
    "adopt",
    "applied",
    "check",
    "check_outbox",
    "fill_outbox",
    "find_exposed",
    "is_foreign",
    "is_outbox_filled",
    "migrate",
    "migrate_app",
    "pending",
    "protect",
    "push",
]
