from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from kitrocket.ddl import execute

ID = "2026-11-25T01:13:00:000000"
VERSION = "1.38.0"
DESCRIPTION = "a delivery's locks and reads in one message, its writes in another"

#: In a VOLATILE plpgsql function each statement has a snapshot of its own: what is read after a lock is what was
#: committed when the lock was got.
FUNCTIONS = {
    # What users have whose locks the transaction holds: their snapshots, their rows and the incidents that are open
    # about them. Of the rows the one that counts comes first; the ORDER BY stands in users.sql too, and must stay the
    # same.
    "holdings(ids text[])": """
        RETURNS json LANGUAGE plpgsql VOLATILE AS $$
        BEGIN
            RETURN (
                SELECT coalesce(json_agg(json_build_object(
                    'user_id', holder,
                    'snapshots', ARRAY(
                        SELECT row_to_json(m) FROM kitrocket.dodo_subscriptions m
                        WHERE m.user_id = holder ORDER BY m.subscription_id
                    ),
                    'rows', ARRAY(
                        SELECT json_build_object(
                            'id', s.id, 'plan', s.plan, 'status', s.status, 'dodo_customer_id', s.dodo_customer_id,
                            'dodo_subscription_id', s.dodo_subscription_id, 'current_period_end', s.current_period_end,
                            'created_at', s.created_at, 'updated_at', s.updated_at,
                            'is_known', k.subscription_id IS NOT NULL
                        )
                        FROM public.subscriptions s
                        LEFT JOIN kitrocket.dodo_subscriptions k ON k.subscription_id = s.dodo_subscription_id
                        WHERE s.user_id = holder
                        ORDER BY
                            s.status IN ('active', 'trialing', 'past_due') DESC, k.subscription_id IS NOT NULL DESC,
                            s.created_at DESC, s.id DESC
                    ),
                    'incidents', ARRAY(
                        SELECT i.kind || ' ' || i.subject FROM kitrocket.billing_incidents i
                        WHERE
                            i.user_id = holder AND i.closed_at IS NULL
                            AND i.kind IN ('double_billing', 'still_billing')
                    )
                )), '[]')
                FROM unnest(ids) AS holder
            );
        END $$""",
    # Locks a subscription, then the users it may belong to, and returns what is known of all of them from then on.
    # `named` is the user that the event names, `is_named` whether it names one at all; where it does not, the user is
    # the one linked to the subscription, else to its customer, else the one with its address, in lower case.
    "lock_for_snapshot(wanted text, customer text, is_named boolean, named text, address text)": """
        RETURNS json LANGUAGE plpgsql VOLATILE AS $$
        DECLARE
            known kitrocket.dodo_subscriptions;
            candidates text[];
            kept text[];
        BEGIN
            SELECT * INTO known FROM kitrocket.lock_subscriptions(ARRAY[wanted]);

            IF is_named THEN
                candidates := ARRAY[named];
            ELSIF known.user_id IS NOT NULL THEN
                candidates := ARRAY[known.user_id];
            ELSE
                candidates := ARRAY(
                    SELECT m.user_id FROM kitrocket.dodo_subscriptions m
                    WHERE m.customer_id = customer AND m.user_id IS NOT NULL
                    UNION
                    SELECT s.user_id FROM public.subscriptions s WHERE s.dodo_customer_id = customer
                    LIMIT 2
                );
                IF cardinality(candidates) = 0 THEN
                    candidates := ARRAY(
                        SELECT u.id FROM public.users u
                        WHERE lower(u.email) = address AND u.email_verified IS NOT NULL LIMIT 2
                    );
                END IF;
            END IF;
            candidates := array_remove(candidates, NULL);

            kept := ARRAY[known.user_id] || CASE WHEN cardinality(candidates) = 1 THEN candidates END;
            kept := ARRAY(SELECT kitrocket.keep_users(array_remove(kept, NULL)));

            RETURN json_build_object(
                'known', CASE WHEN known.subscription_id IS NOT NULL THEN row_to_json(known) END,
                'candidates', candidates,
                'kept', kept,
                'payments', ARRAY(
                    SELECT row_to_json(p) FROM kitrocket.dodo_payments p
                    WHERE p.subscription_ids @> jsonb_build_array(wanted) ORDER BY p.payment_id
                ),
                'holdings', kitrocket.holdings(kept)
            );
        END $$""",
    # Writes what a transaction changes, each part a list that may be missing: `snapshots` into the mirror, users'
    # `rows`, ids of rows that are `gone`, incidents `closed` and `opened`, and what became of the `event`. A row that
    # is not touched is an error.
    "write_changes(changes jsonb)": """
        RETURNS void LANGUAGE plpgsql VOLATILE AS $$
        DECLARE
            touched bigint;
        BEGIN
            IF changes ? 'snapshots' THEN
                INSERT INTO kitrocket.dodo_subscriptions AS known (
                    subscription_id, user_id, customer_id, product_id, plan, status, created_at, previous_billing_date,
                    next_billing_date, cancel_at_next_billing_date, cancelled_at, expires_at, paused_at,
                    past_due_ends_at, trial_period_days, pending_plan, pending_plan_at, started, event_at, event_key,
                    webhook_id, fetched_at, needs_check, reproject_at, revoked_at, revoked_reason, dispute_open,
                    charged, charge_failed, named_key, version
                )
                SELECT
                    subscription_id, user_id, customer_id, product_id, plan, status, created_at, previous_billing_date,
                    next_billing_date, cancel_at_next_billing_date, cancelled_at, expires_at, paused_at,
                    past_due_ends_at, trial_period_days, pending_plan, pending_plan_at, started, event_at, event_key,
                    webhook_id, fetched_at, needs_check, reproject_at, revoked_at, revoked_reason, dispute_open,
                    charged, charge_failed, named_key, 1
                FROM jsonb_populate_recordset(NULL::kitrocket.dodo_subscriptions, changes->'snapshots')
                ON CONFLICT (subscription_id) DO UPDATE SET
                    user_id = excluded.user_id,
                    customer_id = excluded.customer_id,
                    product_id = excluded.product_id,
                    plan = excluded.plan,
                    status = excluded.status,
                    created_at = excluded.created_at,
                    previous_billing_date = excluded.previous_billing_date,
                    next_billing_date = excluded.next_billing_date,
                    cancel_at_next_billing_date = excluded.cancel_at_next_billing_date,
                    cancelled_at = excluded.cancelled_at,
                    expires_at = excluded.expires_at,
                    paused_at = excluded.paused_at,
                    past_due_ends_at = excluded.past_due_ends_at,
                    trial_period_days = excluded.trial_period_days,
                    pending_plan = excluded.pending_plan,
                    pending_plan_at = excluded.pending_plan_at,
                    started = excluded.started,
                    event_at = excluded.event_at,
                    event_key = excluded.event_key,
                    webhook_id = excluded.webhook_id,
                    fetched_at = excluded.fetched_at,
                    needs_check = excluded.needs_check,
                    reproject_at = excluded.reproject_at,
                    revoked_at = excluded.revoked_at,
                    revoked_reason = excluded.revoked_reason,
                    dispute_open = excluded.dispute_open,
                    charged = excluded.charged,
                    charge_failed = excluded.charge_failed,
                    named_key = excluded.named_key,
                    version = known.version + 1;
            END IF;

            IF changes ? 'gone' THEN
                DELETE FROM public.subscriptions s
                WHERE s.id IN (SELECT jsonb_array_elements_text(changes->'gone'));
                GET DIAGNOSTICS touched = ROW_COUNT;
                IF touched <> jsonb_array_length(changes->'gone') THEN
                    RAISE 'a row of subscriptions vanished while its user was locked';
                END IF;
            END IF;

            IF changes ? 'rows' THEN
                INSERT INTO public.subscriptions AS known (
                    id, user_id, plan, status, dodo_customer_id, dodo_subscription_id, current_period_end, created_at,
                    updated_at
                )
                SELECT
                    id, user_id, plan, status, dodo_customer_id, dodo_subscription_id, current_period_end, created_at,
                    updated_at
                FROM jsonb_populate_recordset(NULL::public.subscriptions, changes->'rows')
                ON CONFLICT (id) DO UPDATE SET
                    plan = excluded.plan,
                    status = excluded.status,
                    dodo_customer_id = excluded.dodo_customer_id,
                    dodo_subscription_id = excluded.dodo_subscription_id,
                    current_period_end = excluded.current_period_end,
                    created_at = excluded.created_at,
                    updated_at = excluded.updated_at
                WHERE known.user_id = excluded.user_id;
                GET DIAGNOSTICS touched = ROW_COUNT;
                IF touched <> jsonb_array_length(changes->'rows') THEN
                    RAISE 'a row of subscriptions was given to another user while its user was locked';
                END IF;
            END IF;

            IF changes ? 'closed' THEN
                UPDATE kitrocket.billing_incidents i
                SET closed_at = over.closed_at
                FROM jsonb_populate_recordset(NULL::kitrocket.billing_incidents, changes->'closed') AS over
                WHERE i.kind = over.kind AND i.subject = over.subject AND i.closed_at IS NULL;
            END IF;

            -- One that is open stays the same incident, and follows its subscription to another user.
            IF changes ? 'opened' THEN
                INSERT INTO kitrocket.billing_incidents AS known (
                    id, kind, subject, user_id, opened_at, detail, hook_state, hook_attempts, hook_next_at
                )
                SELECT id, kind, subject, user_id, opened_at, detail, hook_state, 0, hook_next_at
                FROM jsonb_populate_recordset(NULL::kitrocket.billing_incidents, changes->'opened')
                ON CONFLICT (kind, subject) WHERE closed_at IS NULL DO UPDATE SET user_id = excluded.user_id
                WHERE known.user_id IS DISTINCT FROM excluded.user_id;
            END IF;

            -- The e-mail address stays only while the user is missing; without `hook_next_at` hooks stay as they are.
            IF changes ? 'event' THEN
                UPDATE kitrocket.webhook_events known
                SET
                    state = told.state, reason = told.reason, user_id = coalesce(told.user_id, known.user_id),
                    customer_email = told.customer_email, attempts = told.attempts,
                    next_attempt_at = told.next_attempt_at, last_error = told.last_error,
                    finished_at = coalesce(known.finished_at, told.finished_at),
                    hook_state = CASE WHEN told.hook_next_at IS NULL THEN known.hook_state ELSE 'pending' END,
                    hook_attempts = CASE WHEN told.hook_next_at IS NULL THEN known.hook_attempts ELSE 0 END,
                    hook_next_at = coalesce(told.hook_next_at, known.hook_next_at)
                FROM jsonb_populate_record(NULL::kitrocket.webhook_events, changes->'event') AS told
                WHERE known.webhook_id = told.webhook_id;
                IF NOT FOUND THEN
                    RAISE 'an event vanished from the inbox while it was locked';
                END IF;
            END IF;
        END $$""",
}


async def forwards():
    manager = MigrationManager(migration_id=ID, app_name="kitrocket", description=DESCRIPTION)

    async def build():
        for signature, body in FUNCTIONS.items():
            await execute(f"CREATE OR REPLACE FUNCTION kitrocket.{signature} {body}")

    async def drop():
        for signature in reversed(FUNCTIONS):
            await execute(f"DROP FUNCTION IF EXISTS kitrocket.{signature}")

    manager.add_raw(build)
    manager.add_raw_backwards(drop)

    return manager
