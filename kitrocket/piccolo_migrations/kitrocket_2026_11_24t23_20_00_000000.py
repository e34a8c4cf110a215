from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from kitrocket.ddl import execute

ID = "2026-11-24T23:20:00:000000"
VERSION = "1.38.0"
DESCRIPTION = "indexes by which a user's webhooks are found, and what is left of finished ones"

INDEXES = {
    "webhook_events_user_hint_idx": "webhook_events (user_hint)",
    "webhook_events_customer_id_idx": "webhook_events (customer_id)",
    "webhook_events_unfinished_idx": "webhook_events (received_at) WHERE payload IS NOT NULL AND finished_at IS NULL",
}


async def forwards():
    manager = MigrationManager(migration_id=ID, app_name="kitrocket", description=DESCRIPTION)

    async def build():
        await execute("SET LOCAL lock_timeout = '1s'")
        for name, definition in INDEXES.items():
            await execute(f"CREATE INDEX IF NOT EXISTS {name} ON kitrocket.{definition}")

    async def drop():
        await execute("SET LOCAL lock_timeout = '1s'")
        for name in reversed(INDEXES):
            await execute(f"DROP INDEX IF EXISTS kitrocket.{name}")

    manager.add_raw(build)
    manager.add_raw_backwards(drop)

    return manager
