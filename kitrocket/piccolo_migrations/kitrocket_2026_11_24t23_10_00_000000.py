from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from kitrocket.ddl import execute

ID = "2026-11-24T23:10:00:000000"
VERSION = "1.38.0"
DESCRIPTION = "tables of usage summed by user, UTC day and model"

TABLES = (
    """
    CREATE TABLE IF NOT EXISTS kitrocket.usage_daily (
        user_id text NOT NULL CONSTRAINT usage_daily_user_id_users_id_fk REFERENCES public.users (id) ON DELETE CASCADE,
        day date NOT NULL,
        model text NOT NULL,
        tokens bigint NOT NULL,
        calls bigint NOT NULL,
        CONSTRAINT usage_daily_pkey PRIMARY KEY (user_id, day, model)
    ) WITH (fillfactor = 70)
    """,
    "CREATE INDEX IF NOT EXISTS usage_daily_day_idx ON kitrocket.usage_daily (day)",
    """
    CREATE TABLE IF NOT EXISTS kitrocket.usage_state (
        one boolean DEFAULT true CONSTRAINT usage_state_pkey PRIMARY KEY CONSTRAINT usage_state_is_one_row CHECK (one),
        rollup_from date NOT NULL,
        raw_from date NOT NULL
    )
    """,
)


async def forwards():
    manager = MigrationManager(migration_id=ID, app_name="kitrocket", description=DESCRIPTION)

    async def create():
        await execute("SET LOCAL lock_timeout = '500ms'")
        for table in TABLES:
            await execute(table)

    async def drop():
        await execute("SET LOCAL lock_timeout = '500ms'")
        await execute("DROP TABLE IF EXISTS kitrocket.usage_state")
        await execute("DROP TABLE IF EXISTS kitrocket.usage_daily")

    manager.add_raw(create)
    manager.add_raw_backwards(drop)

    return manager
