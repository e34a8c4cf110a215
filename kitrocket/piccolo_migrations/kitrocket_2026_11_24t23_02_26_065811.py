from piccolo.apps.migrations.auto.migration_manager import MigrationManager
from kitrocket.tables import NewId
from piccolo.columns.column_types import Integer
from piccolo.columns.column_types import JSONB
from piccolo.columns.column_types import Text
from piccolo.columns.column_types import Timestamp
from piccolo.columns.indexes import IndexMethod

ID = "2026-11-24T23:02:26:065811"
VERSION = "1.38.0"
DESCRIPTION = "incidents; which event named a subscription's user"


async def forwards():
    manager = MigrationManager(
        migration_id=ID, app_name="kitrocket", description=DESCRIPTION
    )

    manager.add_table(
        class_name="BillingIncidents",
        tablename="billing_incidents",
        schema="kitrocket",
        columns=None,
    )

    manager.add_column(
        table_class_name="BillingIncidents",
        tablename="billing_incidents",
        column_name="id",
        db_column_name="id",
        column_class_name="Text",
        column_class=Text,
        params={
            "default": NewId(),
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
        table_class_name="BillingIncidents",
        tablename="billing_incidents",
        column_name="kind",
        db_column_name="kind",
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
        table_class_name="BillingIncidents",
        tablename="billing_incidents",
        column_name="subject",
        db_column_name="subject",
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
        table_class_name="BillingIncidents",
        tablename="billing_incidents",
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
        table_class_name="BillingIncidents",
        tablename="billing_incidents",
        column_name="opened_at",
        db_column_name="opened_at",
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
        table_class_name="BillingIncidents",
        tablename="billing_incidents",
        column_name="closed_at",
        db_column_name="closed_at",
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
        table_class_name="BillingIncidents",
        tablename="billing_incidents",
        column_name="detail",
        db_column_name="detail",
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
        table_class_name="BillingIncidents",
        tablename="billing_incidents",
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
        table_class_name="BillingIncidents",
        tablename="billing_incidents",
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
        table_class_name="BillingIncidents",
        tablename="billing_incidents",
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
        column_name="named_key",
        db_column_name="named_key",
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

    return manager
