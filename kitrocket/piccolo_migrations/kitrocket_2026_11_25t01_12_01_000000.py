from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from kitrocket.ddl import execute

ID = "2026-11-25T01:12:01:000000"
VERSION = "1.38.0"
DESCRIPTION = "the trigger that fills the outbox of usage, once it is switched on"

# A call that is dated ahead is due when its time has come: the provider refuses what lies too far ahead.
FUNCTION = """
CREATE OR REPLACE FUNCTION kitrocket.usage_queued() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO kitrocket.usage_outbox (usage_id, user_id, created_at, next_at)
    SELECT id, user_id, created_at, created_at
    FROM new_rows
    ORDER BY id
    ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$$
"""

# Triggers of one event fire in the order of their names: this one after kitrocket_usage_inserted. It begins disabled,
# and one that stands is left as it is, on or off.
TRIGGER = """
DO $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_trigger WHERE tgrelid = 'public.usage'::regclass AND tgname = 'kitrocket_write_outbox'
    ) THEN
        CREATE TRIGGER kitrocket_write_outbox AFTER INSERT ON public.usage REFERENCING NEW TABLE AS new_rows
        FOR EACH STATEMENT EXECUTE FUNCTION kitrocket.usage_queued();
        ALTER TABLE public.usage DISABLE TRIGGER kitrocket_write_outbox;
    END IF;
END
$$
"""


async def forwards():
    manager = MigrationManager(migration_id=ID, app_name="kitrocket", description=DESCRIPTION)

    async def create():
        await execute("SET LOCAL lock_timeout = '500ms'")
        await execute(FUNCTION)
        await execute("REVOKE ALL ON FUNCTION kitrocket.usage_queued() FROM PUBLIC")
        await execute(TRIGGER)

    async def drop():
        await execute("SET LOCAL lock_timeout = '500ms'")
        await execute("DROP TRIGGER IF EXISTS kitrocket_write_outbox ON public.usage")
        await execute("DROP FUNCTION IF EXISTS kitrocket.usage_queued()")

    manager.add_raw(create)
    manager.add_raw_backwards(drop)

    return manager
