from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from kitrocket.ddl import SESSIONS_EXPIRES_AT, SESSIONS_USER_ID

ID = "2026-11-24T22:07:01:000000"
VERSION = "1.38.0"
DESCRIPTION = "indexes of sessions"

INDEXES = (SESSIONS_EXPIRES_AT, SESSIONS_USER_ID)


async def forwards():
    manager = MigrationManager(
        migration_id=ID, app_name="kitrocket", description=DESCRIPTION, wrap_in_transaction=False
    )

    async def build():
        for index in INDEXES:
            await index.build()

    async def drop():
        for index in reversed(INDEXES):
            await index.drop()

    manager.add_raw(build)
    manager.add_raw_backwards(drop)

    return manager
