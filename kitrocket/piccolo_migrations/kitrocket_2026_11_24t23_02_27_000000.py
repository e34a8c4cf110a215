from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from kitrocket.ddl import execute

ID = "2026-11-24T23:02:27:000000"
VERSION = "1.38.0"
DESCRIPTION = "locks and the reads they protect in one message; indexes of the incidents"

#: In a VOLATILE plpgsql function each statement has a snapshot of its own, so that a read sees what was committed while
#: the statement before it waited for the lock.
FUNCTIONS = {
    "lock_payment(id text)": """
        RETURNS SETOF kitrocket.dodo_payments LANGUAGE plpgsql VOLATILE AS $$
        BEGIN
            PERFORM pg_advisory_xact_lock(1802633217, hashtext(id));
            RETURN QUERY SELECT p.* FROM kitrocket.dodo_payments p WHERE p.payment_id = id;
        END $$""",
    "lock_subscriptions(ids text[])": """
        RETURNS SETOF kitrocket.dodo_subscriptions LANGUAGE plpgsql VOLATILE AS $$
        BEGIN
            PERFORM pg_advisory_xact_lock(1802633218, hash)
            FROM (SELECT DISTINCT hashtext(wanted) AS hash FROM unnest(ids) AS wanted ORDER BY hash) AS hashes;
            RETURN QUERY
            SELECT m.* FROM kitrocket.dodo_subscriptions m
            WHERE m.subscription_id = ANY(ids) ORDER BY m.subscription_id;
        END $$""",
    "keep_users(ids text[])": """
        RETURNS SETOF text LANGUAGE plpgsql VOLATILE AS $$
        BEGIN
            PERFORM pg_advisory_xact_lock(1802633219, hash)
            FROM (SELECT DISTINCT hashtext(wanted) AS hash FROM unnest(ids) AS wanted ORDER BY hash) AS hashes;
            RETURN QUERY SELECT u.id FROM public.users u WHERE u.id = ANY(ids) ORDER BY u.id FOR KEY SHARE;
        END $$""",
}


async def forwards():
    manager = MigrationManager(migration_id=ID, app_name="kitrocket", description=DESCRIPTION)

    async def build():
        await execute("SET LOCAL lock_timeout = '1s'")
        await execute('ALTER TABLE kitrocket.dodo_subscriptions ALTER COLUMN named_key TYPE text COLLATE "C"')
        await execute(
            "CREATE UNIQUE INDEX IF NOT EXISTS billing_incidents_one_open_idx"
            " ON kitrocket.billing_incidents (kind, subject) WHERE closed_at IS NULL"
        )
        await execute(
            "CREATE INDEX IF NOT EXISTS billing_incidents_user_id_idx ON kitrocket.billing_incidents (user_id)"
        )
        await execute(
            "CREATE INDEX IF NOT EXISTS billing_incidents_hooks_due_idx"
            " ON kitrocket.billing_incidents (hook_next_at) WHERE hook_state = 'pending'"
        )
        for signature, body in FUNCTIONS.items():
            await execute(f"CREATE OR REPLACE FUNCTION kitrocket.{signature} {body}")

    async def drop():
        await execute("SET LOCAL lock_timeout = '1s'")
        for signature in FUNCTIONS:
            await execute(f"DROP FUNCTION IF EXISTS kitrocket.{signature}")
        await execute("DROP INDEX IF EXISTS kitrocket.billing_incidents_hooks_due_idx")
        await execute("DROP INDEX IF EXISTS kitrocket.billing_incidents_user_id_idx")
        await execute("DROP INDEX IF EXISTS kitrocket.billing_incidents_one_open_idx")
        await execute('ALTER TABLE kitrocket.dodo_subscriptions ALTER COLUMN named_key TYPE text COLLATE "default"')

    manager.add_raw(build)
    manager.add_raw_backwards(drop)

    return manager
