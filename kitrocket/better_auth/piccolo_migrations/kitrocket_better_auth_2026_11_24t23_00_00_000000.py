from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from kitrocket.ddl import execute

ID = "2026-11-24T23:00:00:000000"
VERSION = "1.38.0"
DESCRIPTION = "what Better Auth wants: five columns and the table verification"

COLUMNS = {
    "sessions": {"updated_at": "timestamp"},
    "accounts": {
        "updated_at": "timestamp",
        "id_token": "text",
        "scope": "text",
        "refresh_token_expires_at": "timestamp",
    },
}


async def forwards():
    manager = MigrationManager(
        migration_id=ID, app_name="kitrocket_better_auth", description=DESCRIPTION
    )

    async def add():
        await execute("SET LOCAL lock_timeout = '1s'")
        for table, columns in COLUMNS.items():
            added = ", ".join(
                f"ADD COLUMN IF NOT EXISTS {name} {type}"
                for name, type in columns.items()
            )
            await execute(f"ALTER TABLE public.{table} {added}")
        await execute(
            "CREATE TABLE IF NOT EXISTS public.verification (id text PRIMARY KEY, identifier text NOT NULL,"
            " value text NOT NULL, expires_at timestamp NOT NULL, created_at timestamp, updated_at timestamp)"
        )
        await execute(
            "CREATE INDEX IF NOT EXISTS verification_identifier_idx ON public.verification (identifier)"
        )

    async def drop():
        await execute("SET LOCAL lock_timeout = '1s'")
        await execute("DROP TABLE IF EXISTS public.verification")
        for table, columns in COLUMNS.items():
            dropped = ", ".join(f"DROP COLUMN IF EXISTS {name}" for name in columns)
            await execute(f"ALTER TABLE public.{table} {dropped}")

    manager.add_raw(add)
    manager.add_raw_backwards(drop)

    return manager
