from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from kitrocket.ddl import execute

ID = "2026-11-25T01:12:00:000000"
VERSION = "1.38.0"
DESCRIPTION = "table of usage that is to be sent to the provider"

TABLES = (
    """
    CREATE TABLE IF NOT EXISTS kitrocket.usage_outbox (
        usage_id text CONSTRAINT usage_outbox_pkey PRIMARY KEY,
        user_id text NOT NULL CONSTRAINT usage_outbox_user_id_users_id_fk REFERENCES public.users (id) ON DELETE CASCADE,
        created_at timestamp NOT NULL,
        state text NOT NULL DEFAULT 'pending' CONSTRAINT usage_outbox_state CHECK (state IN ('pending', 'parked')),
        attempts integer NOT NULL DEFAULT 0,
        next_at timestamp NOT NULL,
        error text
    )
    """,
    "CREATE INDEX IF NOT EXISTS usage_outbox_due_idx ON kitrocket.usage_outbox (next_at) WHERE state = 'pending'",
)


async def forwards():
    manager = MigrationManager(migration_id=ID, app_name="kitrocket", description=DESCRIPTION)

    async def create():
        await execute("SET LOCAL lock_timeout = '500ms'")
        for table in TABLES:
            await execute(table)

    async def drop():
        await execute("SET LOCAL lock_timeout = '500ms'")
        await execute("DROP TABLE IF EXISTS kitrocket.usage_outbox")

    manager.add_raw(create)
    manager.add_raw_backwards(drop)

    return manager
