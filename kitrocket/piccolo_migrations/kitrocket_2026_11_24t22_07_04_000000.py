from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from kitrocket.ddl import (
    SUBSCRIPTIONS_DODO_CUSTOMER,
    SUBSCRIPTIONS_DODO_ID,
    SUBSCRIPTIONS_LIVE,
    SUBSCRIPTIONS_USER_ID,
)

ID = "2026-11-24T22:07:04:000000"
VERSION = "1.38.0"
DESCRIPTION = "indexes of subscriptions: one live row per user"

INDEXES = (SUBSCRIPTIONS_LIVE, SUBSCRIPTIONS_USER_ID, SUBSCRIPTIONS_DODO_ID, SUBSCRIPTIONS_DODO_CUSTOMER)


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
