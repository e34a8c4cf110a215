"""The Studio: Piccolo Admin on the kit's engine."""

from __future__ import annotations

import secrets
import types
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from piccolo.columns import Column, ForeignKey, Timestamp
from piccolo.columns.readable import Readable
from piccolo.table import Table
from piccolo_admin.endpoints import TableConfig, create_admin
from piccolo_api.crud.endpoints import OrderBy
from starlette.types import ASGIApp

from kitrocket import tables
from kitrocket.admin import forms, repair
from kitrocket.admin.door import Door
from kitrocket.admin.front import Front
from kitrocket.admin.tables import StudioSessions, StudioStaff
from kitrocket.engine import Engine, choose_conf
from kitrocket.errors import InvalidInputError
from kitrocket.kit import KitRocket

#: Columns that the Studio hides although they are no secrets to Piccolo: they hold other people's data.
_HIDDEN = {"webhook_events": ("payload", "customer_email")}
_NOTES = {
    "subscriptions": "A projection of the provider's snapshots: what is edited here lasts until the next webhook.",
    "webhook_events": "Every verified delivery. Read-only: the payload is not shown.",
    "dodo_subscriptions": "The provider's newest snapshot of each subscription.",
    "dodo_payments": "The index of payments, with refunds and disputes.",
    "billing_incidents": "What somebody should look at: open until it is over.",
    "usage_reservations": "Tokens set aside for calls that run now; an expired one no longer counts.",
}
_GROUPS: Mapping[str, tuple[type[Table], ...]] = {
    "People": (tables.Users, tables.Accounts, tables.Sessions),
    "Billing": (tables.Subscriptions, *(table for table in tables.OWN_TABLES if table is not tables.UsageReservations)),
    "Usage": (tables.Usage, tables.UsageReservations),
}
#: What is newest first, where a table has no ``created_at``.
_NEWEST_BY = {"webhook_events": "received_at", "billing_incidents": "opened_at"}
#: What stands first, where that is not the table's own order: what is wrong, for whoever is on call.
_FIRST = {
    "webhook_events": ("webhook_id", "type", "state", "reason", "attempts", "last_error", "hook_state", "received_at")
}
#: Tables that people may edit; the others are read-only unless ``studio_allow_writes`` says otherwise.
_EDITABLE = (tables.Users, tables.Subscriptions)


def create_studio(kit: KitRocket) -> ASGIApp:
    """Return the Studio as an ASGI application, to be mounted (``Mount("/admin", …)``: its address ends in a slash).

    Its queries run on ``kit.engine``, whose pool the host opens by entering the kit. It has table classes of its own
    for that, so ``_meta.db`` of :mod:`kitrocket.tables`, which is the application's, stays as it is, and two
    Studios in one process never meet. Its logins need :func:`migrate_studio` once.

    ``studio_hosts`` are the host names it answers to (and must be set behind https), ``studio_secure`` sends its
    cookies over https only, ``studio_allow_writes`` lifts the write protection of sessions, accounts, usage and
    kitrocket's own tables. It has the cookies ``id`` and ``csrftoken`` on its host name: give it one of its own where
    the application has such cookies too.
    """
    choose_conf()
    door = Door(kit.engine)
    classes = _table_classes(door)
    configs = [
        _config(classes[table], group, kit, read_only=not (table in _EDITABLE or kit.settings.studio_allow_writes))
        for group, members in _GROUPS.items()
        for table in members
    ]
    admin = create_admin(
        configs,
        forms=repair.forms(kit),
        auth_table=_bound(StudioStaff, door),
        session_table=_bound(StudioSessions, door),
        session_expiry=timedelta(hours=1),
        site_name="kitrocket Studio",
        production=kit.settings.studio_secure,
        allowed_hosts=kit.settings.studio_hosts,
        auto_include_related=False,
    )
    return Front(admin, kit.settings.studio_hosts)


async def create_staff(engine: Engine, username: str, password: str | None = None) -> str:
    """Make a Studio login, or give an existing one a new password, and return the password.

    Without a password a random one is made. Raises :class:`InvalidInputError` for a name or a password that cannot be.
    """
    password = password or secrets.token_urlsafe(12)
    if not 1 <= len(username) <= 100 or "\0" in username:
        raise InvalidInputError("username", "it cannot be one", "1 to 100 characters")
    staff = _bound(StudioStaff, Door(engine))
    try:
        if await staff.exists().where(staff.username == username).run():
            await staff.update_password(username, password)
        else:
            await staff.create_user(username, password, email=username, active=True, admin=True, superuser=True)
    except ValueError as error:
        raise InvalidInputError("password", str(error), "6 to 128 characters") from error
    return password


async def has_staff(engine: Engine) -> bool:
    """Whether anyone can log in to the Studio."""
    staff = _bound(StudioStaff, Door(engine))
    return bool(await staff.exists().where(staff.active.eq(True), staff.admin.eq(True)).run())


def _bound(table: type[Any], door: Door, columns: Mapping[str, object] | None = None) -> Any:
    """Return a subclass of a table that runs on ``door``."""
    return types.new_class(
        table.__name__,
        (table,),
        {
            "tablename": table._meta.tablename,
            "schema": table._meta.schema,
            "db": door,
            "help_text": _NOTES.get(table._meta.tablename),
        },
        lambda namespace: namespace.update({"__module__": __name__, **(columns or {})}),
    )


def _table_classes(door: Door) -> dict[type[Table], type[Table]]:
    """Return the Studio's own class of each table."""

    def readable(cls: Any) -> Readable:
        return Readable(template="%s", columns=[cls.email])

    users = _bound(tables.Users, door, {**_columns(tables.Users), "get_readable": classmethod(readable)})
    classes: dict[type[Table], type[Table]] = {tables.Users: users}
    for table in (*tables.SEED_TABLES[1:], *tables.OWN_TABLES):
        classes[table] = _bound(table, door, _columns(table, users))
    return classes


def _columns(table: type[Table], users: type[Table] = tables.Users) -> dict[str, Column]:
    """Return a table's columns as the Studio wants them: hidden where they must be, required where NULL is refused."""
    found: dict[str, Column] = {}
    for column in table._meta.columns:
        name, null = column._meta.name, column._meta.null
        if isinstance(column, ForeignKey):
            found[name] = ForeignKey(users, null=null, default=None, required=not null)
            continue
        column = column.copy()
        column._meta.secret = column._meta.secret or name in _HIDDEN.get(table._meta.tablename, ())
        has_default = column._meta.params.get("default") is not None
        column._meta.required = not (null or has_default or column._meta.secret or column._meta.primary_key)
        if column._meta.secret:
            column._meta.help_text = "Hidden. Leave it empty: what is stored is kept."
        found[name] = column
    return found


def _config(table: type[Table], group: str, kit: KitRocket, *, read_only: bool) -> TableConfig:
    columns: Sequence[Column] = table._meta.columns
    newest_by = _NEWEST_BY.get(table._meta.tablename, "created_at")
    first = _FIRST.get(table._meta.tablename, ())
    shown = [column for column in columns if not column._meta.secret]
    shown.sort(key=lambda column: first.index(column._meta.name) if column._meta.name in first else len(first))
    return TableConfig(
        table,
        visible_columns=shown,
        visible_filters=shown,
        menu_group=group,
        order_by=[OrderBy(table._meta.get_column_by_name(newest_by), ascending=False)],
        time_resolution={column: 1 for column in columns if isinstance(column, Timestamp)},
        hooks=forms.hooks(
            table, kit.clock, kit.users.delete if table._meta.tablename == tables.Users._meta.tablename else None
        ),
        validators=forms.validators(read_only=read_only),
    )
