from piccolo.apps.migrations.auto.migration_manager import MigrationManager
from kitrocket.ddl import execute
from kitrocket.tables import NewId
from piccolo.columns.base import OnDelete
from piccolo.columns.base import OnUpdate
from piccolo.columns.column_types import BigInt
from piccolo.columns.column_types import Boolean
from piccolo.columns.column_types import ForeignKey
from piccolo.columns.column_types import Integer
from piccolo.columns.column_types import JSON
from piccolo.columns.column_types import JSONB
from piccolo.columns.column_types import Text
from piccolo.columns.column_types import Timestamp
from piccolo.columns.indexes import IndexMethod
from piccolo.table import Table


class Users(Table, tablename="users", schema=None):
    id = Text(
        default=NewId(),
        null=False,
        primary_key=True,
        unique=False,
        index=False,
        index_method=IndexMethod.btree,
        choices=None,
        db_column_name=None,
        secret=False,
    )


ID = "2026-11-24T22:07:00:864300"
VERSION = "1.38.0"
DESCRIPTION = "the inbox, the mirror and the index of payments"


async def forwards():
    manager = MigrationManager(
        migration_id=ID, app_name="kitrocket", description=DESCRIPTION
    )

    async def wait_at_most_a_second_for_users():
        await execute("SET LOCAL lock_timeout = '1s'")

    # The key into users locks out its writers, and whoever waits for that lock holds them up too.
    manager.add_raw(wait_at_most_a_second_for_users)
    manager.add_raw_backwards(wait_at_most_a_second_for_users)

    manager.add_table(
        class_name="DodoPayments",
        tablename="dodo_payments",
        schema="kitrocket",
        columns=None,
    )

    manager.add_table(
        class_name="WebhookEvents",
        tablename="webhook_events",
        schema="kitrocket",
        columns=None,
    )

    manager.add_table(
        class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        schema="kitrocket",
        columns=None,
    )

    manager.add_column(
        table_class_name="DodoPayments",
        tablename="dodo_payments",
        column_name="payment_id",
        db_column_name="payment_id",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": False,
            "primary_key": True,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoPayments",
        tablename="dodo_payments",
        column_name="subscription_ids",
        db_column_name="subscription_ids",
        column_class_name="JSONB",
        column_class=JSONB,
        params={
            "default": "[]",
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoPayments",
        tablename="dodo_payments",
        column_name="customer_id",
        db_column_name="customer_id",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoPayments",
        tablename="dodo_payments",
        column_name="status",
        db_column_name="status",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoPayments",
        tablename="dodo_payments",
        column_name="charge_type",
        db_column_name="charge_type",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoPayments",
        tablename="dodo_payments",
        column_name="total_amount",
        db_column_name="total_amount",
        column_class_name="BigInt",
        column_class=BigInt,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoPayments",
        tablename="dodo_payments",
        column_name="currency",
        db_column_name="currency",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoPayments",
        tablename="dodo_payments",
        column_name="service_periods",
        db_column_name="service_periods",
        column_class_name="JSONB",
        column_class=JSONB,
        params={
            "default": "[]",
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoPayments",
        tablename="dodo_payments",
        column_name="created_at",
        db_column_name="created_at",
        column_class_name="Timestamp",
        column_class=Timestamp,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoPayments",
        tablename="dodo_payments",
        column_name="event_at",
        db_column_name="event_at",
        column_class_name="Timestamp",
        column_class=Timestamp,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoPayments",
        tablename="dodo_payments",
        column_name="refunds",
        db_column_name="refunds",
        column_class_name="JSONB",
        column_class=JSONB,
        params={
            "default": "{}",
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoPayments",
        tablename="dodo_payments",
        column_name="disputes",
        db_column_name="disputes",
        column_class_name="JSONB",
        column_class=JSONB,
        params={
            "default": "{}",
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="webhook_id",
        db_column_name="webhook_id",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": False,
            "primary_key": True,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="type",
        db_column_name="type",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="subscription_id",
        db_column_name="subscription_id",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="payment_id",
        db_column_name="payment_id",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="customer_id",
        db_column_name="customer_id",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="user_id",
        db_column_name="user_id",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="user_hint",
        db_column_name="user_hint",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="customer_email",
        db_column_name="customer_email",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="event_at",
        db_column_name="event_at",
        column_class_name="Timestamp",
        column_class=Timestamp,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="received_at",
        db_column_name="received_at",
        column_class_name="Timestamp",
        column_class=Timestamp,
        params={
            "default": None,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="body_sha256",
        db_column_name="body_sha256",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="payload",
        db_column_name="payload",
        column_class_name="JSON",
        column_class=JSON,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="state",
        db_column_name="state",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="reason",
        db_column_name="reason",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="attempts",
        db_column_name="attempts",
        column_class_name="Integer",
        column_class=Integer,
        params={
            "default": 0,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="next_attempt_at",
        db_column_name="next_attempt_at",
        column_class_name="Timestamp",
        column_class=Timestamp,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="last_error",
        db_column_name="last_error",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="deliveries",
        db_column_name="deliveries",
        column_class_name="Integer",
        column_class=Integer,
        params={
            "default": 1,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="finished_at",
        db_column_name="finished_at",
        column_class_name="Timestamp",
        column_class=Timestamp,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="hook_state",
        db_column_name="hook_state",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": "none",
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="hook_attempts",
        db_column_name="hook_attempts",
        column_class_name="Integer",
        column_class=Integer,
        params={
            "default": 0,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="WebhookEvents",
        tablename="webhook_events",
        column_name="hook_next_at",
        db_column_name="hook_next_at",
        column_class_name="Timestamp",
        column_class=Timestamp,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="subscription_id",
        db_column_name="subscription_id",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": False,
            "primary_key": True,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="user_id",
        db_column_name="user_id",
        column_class_name="ForeignKey",
        column_class=ForeignKey,
        params={
            "references": Users,
            "on_delete": OnDelete.set_null,
            "on_update": OnUpdate.no_action,
            "target_column": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="customer_id",
        db_column_name="customer_id",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="product_id",
        db_column_name="product_id",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="plan",
        db_column_name="plan",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="status",
        db_column_name="status",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="created_at",
        db_column_name="created_at",
        column_class_name="Timestamp",
        column_class=Timestamp,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="previous_billing_date",
        db_column_name="previous_billing_date",
        column_class_name="Timestamp",
        column_class=Timestamp,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="next_billing_date",
        db_column_name="next_billing_date",
        column_class_name="Timestamp",
        column_class=Timestamp,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="cancel_at_next_billing_date",
        db_column_name="cancel_at_next_billing_date",
        column_class_name="Boolean",
        column_class=Boolean,
        params={
            "default": False,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="cancelled_at",
        db_column_name="cancelled_at",
        column_class_name="Timestamp",
        column_class=Timestamp,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="expires_at",
        db_column_name="expires_at",
        column_class_name="Timestamp",
        column_class=Timestamp,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="paused_at",
        db_column_name="paused_at",
        column_class_name="Timestamp",
        column_class=Timestamp,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="past_due_ends_at",
        db_column_name="past_due_ends_at",
        column_class_name="Timestamp",
        column_class=Timestamp,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="trial_period_days",
        db_column_name="trial_period_days",
        column_class_name="Integer",
        column_class=Integer,
        params={
            "default": 0,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="pending_plan",
        db_column_name="pending_plan",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="pending_plan_at",
        db_column_name="pending_plan_at",
        column_class_name="Timestamp",
        column_class=Timestamp,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="started",
        db_column_name="started",
        column_class_name="Boolean",
        column_class=Boolean,
        params={
            "default": False,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="event_at",
        db_column_name="event_at",
        column_class_name="Timestamp",
        column_class=Timestamp,
        params={
            "default": None,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="event_key",
        db_column_name="event_key",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="webhook_id",
        db_column_name="webhook_id",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="fetched_at",
        db_column_name="fetched_at",
        column_class_name="Timestamp",
        column_class=Timestamp,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="needs_check",
        db_column_name="needs_check",
        column_class_name="Boolean",
        column_class=Boolean,
        params={
            "default": False,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="reproject_at",
        db_column_name="reproject_at",
        column_class_name="Timestamp",
        column_class=Timestamp,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="version",
        db_column_name="version",
        column_class_name="BigInt",
        column_class=BigInt,
        params={
            "default": 1,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="revoked_at",
        db_column_name="revoked_at",
        column_class_name="Timestamp",
        column_class=Timestamp,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="revoked_reason",
        db_column_name="revoked_reason",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": None,
            "null": True,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="dispute_open",
        db_column_name="dispute_open",
        column_class_name="Boolean",
        column_class=Boolean,
        params={
            "default": False,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="charged",
        db_column_name="charged",
        column_class_name="Boolean",
        column_class=Boolean,
        params={
            "default": False,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="DodoSubscriptions",
        tablename="dodo_subscriptions",
        column_name="charge_failed",
        db_column_name="charge_failed",
        column_class_name="Boolean",
        column_class=Boolean,
        params={
            "default": False,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": False,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    return manager
