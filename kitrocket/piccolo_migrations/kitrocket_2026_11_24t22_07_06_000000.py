from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from kitrocket.ddl import execute

ID = "2026-11-24T22:07:06:000000"
VERSION = "1.38.0"
DESCRIPTION = "indexes of the inbox, the mirror and the payments; event keys compared bytewise"

INDEXES = {
    "webhook_events_subscription_id_idx": "webhook_events (subscription_id)",
    "webhook_events_payment_id_idx": "webhook_events (payment_id)",
    "webhook_events_user_id_idx": "webhook_events (user_id)",
    "webhook_events_received_at_idx": "webhook_events (received_at)",
    "webhook_events_due_idx": "webhook_events (next_attempt_at) WHERE state IN ('received', 'parked')",
    "webhook_events_blocked_idx": "webhook_events (reason) WHERE state IN ('parked', 'dead')",
    "webhook_events_hooks_due_idx": "webhook_events (hook_next_at) WHERE hook_state = 'pending'",
    "webhook_events_finished_idx": "webhook_events (finished_at) WHERE payload IS NOT NULL",
    "dodo_subscriptions_user_id_idx": "dodo_subscriptions (user_id)",
    "dodo_subscriptions_customer_id_idx": "dodo_subscriptions (customer_id)",
    "dodo_subscriptions_reproject_at_idx": "dodo_subscriptions (reproject_at) WHERE reproject_at IS NOT NULL",
    "dodo_subscriptions_needs_check_idx": "dodo_subscriptions (subscription_id) WHERE needs_check",
    "dodo_payments_subscription_ids_idx": "dodo_payments USING gin (subscription_ids jsonb_path_ops)",
    "dodo_payments_customer_id_idx": "dodo_payments (customer_id)",
}


async def forwards():
    manager = MigrationManager(migration_id=ID, app_name="kitrocket", description=DESCRIPTION)

    async def build():
        await execute("SET LOCAL lock_timeout = '1s'")
        await execute('ALTER TABLE kitrocket.dodo_subscriptions ALTER COLUMN event_key TYPE text COLLATE "C"')
        for name, definition in INDEXES.items():
            await execute(f"CREATE INDEX IF NOT EXISTS {name} ON kitrocket.{definition}")

    async def drop():
        await execute("SET LOCAL lock_timeout = '1s'")
        for name in reversed(INDEXES):
            await execute(f"DROP INDEX IF EXISTS kitrocket.{name}")
        await execute('ALTER TABLE kitrocket.dodo_subscriptions ALTER COLUMN event_key TYPE text COLLATE "default"')

    manager.add_raw(build)
    manager.add_raw_backwards(drop)

    return manager
