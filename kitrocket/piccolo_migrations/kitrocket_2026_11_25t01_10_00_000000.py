from piccolo.apps.migrations.auto.migration_manager import MigrationManager
from kitrocket.ddl import execute
from kitrocket.tables import NewId
from piccolo.columns.base import OnDelete
from piccolo.columns.base import OnUpdate
from piccolo.columns.column_types import ForeignKey
from piccolo.columns.column_types import Integer
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


ID = "2026-11-25T01:10:00:000000"
VERSION = "1.38.0"
DESCRIPTION = "tables of quotas: locks, reservations, alerts"

TABLES = (
    """
    CREATE TABLE IF NOT EXISTS kitrocket.usage_quotas (
        user_id text CONSTRAINT usage_quotas_pkey PRIMARY KEY
            CONSTRAINT usage_quotas_user_id_users_id_fk REFERENCES public.users (id) ON DELETE CASCADE,
        touched_at timestamp NOT NULL
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS kitrocket.usage_alerts (
        user_id text NOT NULL
            CONSTRAINT usage_alerts_user_id_users_id_fk REFERENCES public.users (id) ON DELETE CASCADE,
        quota text NOT NULL,
        percent integer NOT NULL,
        period_start timestamp NOT NULL,
        fired_at timestamp NOT NULL,
        CONSTRAINT usage_alerts_pkey PRIMARY KEY (user_id, quota, percent, period_start)
    )
    """,
)


async def forwards():
    manager = MigrationManager(
        migration_id=ID, app_name="kitrocket", description=DESCRIPTION
    )

    async def create():
        await execute("SET LOCAL lock_timeout = '500ms'")
        for table in TABLES:
            await execute(table)

    async def drop():
        await execute("SET LOCAL lock_timeout = '500ms'")
        await execute("DROP TABLE IF EXISTS kitrocket.usage_alerts")
        await execute("DROP TABLE IF EXISTS kitrocket.usage_quotas")

    manager.add_raw(create)
    manager.add_raw_backwards(drop)

    manager.add_table(
        class_name="UsageReservations",
        tablename="usage_reservations",
        schema="kitrocket",
        columns=None,
    )

    manager.add_column(
        table_class_name="UsageReservations",
        tablename="usage_reservations",
        column_name="id",
        db_column_name="id",
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
        table_class_name="UsageReservations",
        tablename="usage_reservations",
        column_name="user_id",
        db_column_name="user_id",
        column_class_name="ForeignKey",
        column_class=ForeignKey,
        params={
            "references": Users,
            "on_delete": OnDelete.cascade,
            "on_update": OnUpdate.no_action,
            "target_column": None,
            "null": False,
            "primary_key": False,
            "unique": False,
            "index": True,
            "index_method": IndexMethod.btree,
            "choices": None,
            "db_column_name": None,
            "secret": False,
        },
        schema="kitrocket",
    )

    manager.add_column(
        table_class_name="UsageReservations",
        tablename="usage_reservations",
        column_name="model",
        db_column_name="model",
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
        table_class_name="UsageReservations",
        tablename="usage_reservations",
        column_name="tokens",
        db_column_name="tokens",
        column_class_name="Integer",
        column_class=Integer,
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
        table_class_name="UsageReservations",
        tablename="usage_reservations",
        column_name="used",
        db_column_name="used",
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
        table_class_name="UsageReservations",
        tablename="usage_reservations",
        column_name="created_at",
        db_column_name="created_at",
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
        table_class_name="UsageReservations",
        tablename="usage_reservations",
        column_name="expires_at",
        db_column_name="expires_at",
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
        table_class_name="UsageReservations",
        tablename="usage_reservations",
        column_name="thresholds",
        db_column_name="thresholds",
        column_class_name="JSONB",
        column_class=JSONB,
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
