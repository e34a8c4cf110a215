from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from kitrocket.ddl import execute

ID = "2026-11-24T22:06:59:582920"
VERSION = "1.38.0"
DESCRIPTION = "the names Drizzle gives foreign keys"

TABLES = ("sessions", "accounts", "subscriptions", "usage")


async def forwards():
    manager = MigrationManager(migration_id=ID, app_name="kitrocket", description=DESCRIPTION)

    async def rename():
        for table in TABLES:
            await execute(
                f"ALTER TABLE {table} RENAME CONSTRAINT {table}_user_id_fkey TO {table}_user_id_users_id_fk"
            )

    async def rename_back():
        for table in TABLES:
            await execute(
                f"ALTER TABLE {table} RENAME CONSTRAINT {table}_user_id_users_id_fk TO {table}_user_id_fkey"
            )

    manager.add_raw(rename)
    manager.add_raw_backwards(rename_back)

    return manager
