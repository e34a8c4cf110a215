from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from kitrocket.ddl import execute

ID = "2026-11-25T01:11:00:000000"
VERSION = "1.38.0"
DESCRIPTION = "dated prices of models"

# PostgreSQL takes NaN for larger than every number, so that >= 0 alone would let it in.
TABLE = """
    CREATE TABLE IF NOT EXISTS kitrocket.model_prices (
        model text NOT NULL,
        currency text NOT NULL,
        valid_from date NOT NULL,
        per_million numeric(20, 10) NOT NULL
            CONSTRAINT model_prices_are_not_negative CHECK (per_million >= 0 AND per_million <> 'NaN'),
        CONSTRAINT model_prices_pkey PRIMARY KEY (model, currency, valid_from)
    )
    """


async def forwards():
    manager = MigrationManager(migration_id=ID, app_name="kitrocket", description=DESCRIPTION)

    async def create():
        await execute(TABLE)

    async def drop():
        await execute("SET LOCAL lock_timeout = '1s'")
        await execute("DROP TABLE IF EXISTS kitrocket.model_prices")

    manager.add_raw(create)
    manager.add_raw_backwards(drop)

    return manager
