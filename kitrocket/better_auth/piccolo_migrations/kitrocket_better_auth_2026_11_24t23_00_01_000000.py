from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from kitrocket.better_auth import SESSIONS_CREATED_AT

ID = "2026-11-24T23:00:01:000000"
VERSION = "1.38.0"
DESCRIPTION = "the index that finds sessions past their cap"

INDEXES = (SESSIONS_CREATED_AT,)


async def forwards():
    manager = MigrationManager(
        migration_id=ID,
        app_name="kitrocket_better_auth",
        description=DESCRIPTION,
        wrap_in_transaction=False,
    )

    manager.add_raw(SESSIONS_CREATED_AT.build)
    manager.add_raw_backwards(SESSIONS_CREATED_AT.drop)

    return manager
