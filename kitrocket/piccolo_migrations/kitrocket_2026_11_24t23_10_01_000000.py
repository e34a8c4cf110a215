from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from kitrocket.ddl import execute

ID = "2026-11-24T23:10:01:000000"
VERSION = "1.38.0"
DESCRIPTION = "triggers that keep summed usage exact"

# Keys are always locked in the order of the primary key, so that no two writers wait for each other.
FUNCTIONS = {
    "usage_inserted": """
    BEGIN
        INSERT INTO kitrocket.usage_daily AS kept (user_id, day, model, tokens, calls)
        SELECT user_id, created_at::date, model, sum(tokens_used), count(*)
        FROM new_rows
        GROUP BY 1, 2, 3
        ORDER BY 1, 2, 3
        ON CONFLICT (user_id, day, model) DO UPDATE
        SET tokens = kept.tokens + excluded.tokens, calls = kept.calls + excluded.calls;
        RETURN NULL;
    END
    """,
    "usage_updated": """
    BEGIN
        INSERT INTO kitrocket.usage_daily AS kept (user_id, day, model, tokens, calls)
        SELECT user_id, day, model, sum(tokens), sum(calls)
        FROM (
            SELECT user_id, created_at::date AS day, model, tokens_used::bigint AS tokens, 1::bigint AS calls
            FROM new_rows
            UNION ALL
            SELECT user_id, created_at::date, model, -(tokens_used::bigint), -1
            FROM old_rows
        ) AS changes
        GROUP BY 1, 2, 3
        HAVING sum(tokens) <> 0 OR sum(calls) <> 0
        ORDER BY 1, 2, 3
        ON CONFLICT (user_id, day, model) DO UPDATE
        SET tokens = kept.tokens + excluded.tokens, calls = kept.calls + excluded.calls;
        RETURN NULL;
    END
    """,
    # Never inserts: when a user is deleted, these rows may be gone before the calls are.
    "usage_deleted": """
    BEGIN
        IF current_setting('kitrocket.pruning', true) = 'on' THEN
            RETURN NULL;
        END IF;
        PERFORM FROM kitrocket.usage_daily AS kept
        WHERE (kept.user_id, kept.day, kept.model) IN (SELECT user_id, created_at::date, model FROM old_rows)
        ORDER BY kept.user_id, kept.day, kept.model
        FOR NO KEY UPDATE;
        UPDATE kitrocket.usage_daily AS kept
        SET tokens = kept.tokens - gone.tokens, calls = kept.calls - gone.calls
        FROM (
            SELECT user_id, created_at::date AS day, model, sum(tokens_used) AS tokens, count(*) AS calls
            FROM old_rows
            GROUP BY 1, 2, 3
        ) AS gone
        WHERE kept.user_id = gone.user_id AND kept.day = gone.day AND kept.model = gone.model;
        RETURN NULL;
    END
    """,
    "usage_truncated": """
    BEGIN
        DELETE FROM kitrocket.usage_daily;
        UPDATE kitrocket.usage_state SET rollup_from = '-infinity', raw_from = '-infinity';
        RETURN NULL;
    END
    """,
}

TRIGGERS = {
    "usage_inserted": "INSERT ON public.usage REFERENCING NEW TABLE AS new_rows",
    "usage_updated": "UPDATE ON public.usage REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows",
    "usage_deleted": "DELETE ON public.usage REFERENCING OLD TABLE AS old_rows",
    "usage_truncated": "TRUNCATE ON public.usage",
}


async def forwards():
    manager = MigrationManager(migration_id=ID, app_name="kitrocket", description=DESCRIPTION)

    async def create():
        await execute("SET LOCAL lock_timeout = '500ms'")
        # One table's lock alone, since writers hold several. Until the commit they wait, so that no row escapes both the
        # triggers and the filling.
        await execute("LOCK TABLE public.usage IN SHARE ROW EXCLUSIVE MODE")
        for name, body in FUNCTIONS.items():
            # Defined here and not by the writer: a role without rights on this schema may write usage.
            await execute(
                f"CREATE OR REPLACE FUNCTION kitrocket.{name}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER "
                f"SET search_path = pg_catalog, pg_temp AS $${body}$$"
            )
            await execute(f"REVOKE ALL ON FUNCTION kitrocket.{name}() FROM PUBLIC")
        # Applied again where all of it stands, because the history was lost, it leaves complete sums as they are.
        await execute(
            f"""
            INSERT INTO kitrocket.usage_state AS state (rollup_from, raw_from)
            SELECT CASE WHEN EXISTS (SELECT FROM public.usage) THEN 'infinity' ELSE '-infinity' END::date, '-infinity'
            ON CONFLICT (one) DO UPDATE SET rollup_from = greatest(excluded.rollup_from, state.raw_from)
            WHERE {len(TRIGGERS)} > (
                SELECT count(*) FROM pg_trigger
                WHERE tgrelid = 'public.usage'::regclass AND starts_with(tgname::text, 'kitrocket_usage_')
            )
            """
        )
        for name, event in TRIGGERS.items():
            await execute(
                f"CREATE OR REPLACE TRIGGER kitrocket_{name} AFTER {event} FOR EACH STATEMENT "
                f"EXECUTE FUNCTION kitrocket.{name}()"
            )

    async def drop():
        await execute("SET LOCAL lock_timeout = '500ms'")
        for name in reversed(TRIGGERS):
            await execute(f"DROP TRIGGER IF EXISTS kitrocket_{name} ON public.usage")
        for name in reversed(FUNCTIONS):
            await execute(f"DROP FUNCTION IF EXISTS kitrocket.{name}()")

    manager.add_raw(create)
    manager.add_raw_backwards(drop)

    return manager
