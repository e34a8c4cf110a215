"""The five tables of the seed, side by side, then kitrocket's own.

The five are laid out so that a TypeScript application's schema tool sees no difference: names, column order,
types, nullability, defaults and constraint names are Drizzle's. Timestamps hold naive UTC.

Migrations import :class:`NewId` and :class:`UtcNow` from here for ever, so their path may not change.
"""

from __future__ import annotations

from datetime import datetime

from piccolo.columns import ForeignKey, OnDelete, OnUpdate, Text, Timestamp
from piccolo.columns.column_types import JSON, JSONB, BigInt, Boolean, Integer
from piccolo.columns.defaults.base import Default
from piccolo.columns.defaults.timestamp import TimestampNow
from piccolo.constraints import Unique
from piccolo.table import Table

from kitrocket.clock import to_db, utc_now
from kitrocket.ids import new_id

SCHEMA = "kitrocket"


class NewId(str, Default):
    """A new id made in Python, which leaves no default in the database.

    A ``str``, because ``Text`` accepts only a string as its default.
    """

    __hash__ = Default.__hash__
    __eq__ = Default.__eq__

    @property
    def postgres(self) -> str:
        return "null"

    sqlite = cockroach = postgres

    def python(self) -> str:
        return new_id()

    def __repr__(self) -> str:
        return "NewId()"

    __str__ = __repr__


class UtcNow(TimestampNow):
    """The present as naive UTC; ``now()`` in the database, whose sessions run in UTC."""

    @property
    def postgres(self) -> str:
        return "now()"

    def python(self) -> datetime:
        return to_db(utc_now())


def _user() -> ForeignKey[Users]:
    return ForeignKey(Users, null=False, on_delete=OnDelete.cascade, on_update=OnUpdate.no_action)


class Users(Table, tablename="users"):
    id = Text(primary_key=True, default=NewId())
    email = Text(default=None)
    name = Text(default=None)
    email_verified = Timestamp(null=True, default=None)
    avatar = Text(null=True, default=None)
    created_at = Timestamp(default=UtcNow())
    updated_at = Timestamp(default=UtcNow())

    users_email_unique = Unique([email])


class Sessions(Table, tablename="sessions"):
    id = Text(primary_key=True, default=NewId())
    user_id = _user()
    token = Text(default=None, secret=True)
    expires_at = Timestamp(default=None)
    ip_address = Text(null=True, default=None)
    user_agent = Text(null=True, default=None)
    created_at = Timestamp(default=UtcNow())

    sessions_token_unique = Unique([token])


class Accounts(Table, tablename="accounts"):
    id = Text(primary_key=True, default=NewId())
    user_id = _user()
    provider = Text(default=None)
    provider_account_id = Text(default=None)
    access_token = Text(null=True, default=None, secret=True)
    refresh_token = Text(null=True, default=None, secret=True)
    expires_at = Timestamp(null=True, default=None)
    password = Text(null=True, default=None, secret=True)
    created_at = Timestamp(default=UtcNow())


class Subscriptions(Table, tablename="subscriptions"):
    id = Text(primary_key=True, default=NewId())
    user_id = _user()
    plan = Text(default=None)
    status = Text(default="active")
    dodo_customer_id = Text(null=True, default=None)
    dodo_subscription_id = Text(null=True, default=None)
    current_period_end = Timestamp(null=True, default=None)
    created_at = Timestamp(default=UtcNow())
    updated_at = Timestamp(default=UtcNow())


class Usage(Table, tablename="usage"):
    id = Text(primary_key=True, default=NewId())
    user_id = _user()
    tokens_used = Integer(default=None)
    model = Text(default=None)
    created_at = Timestamp(default=UtcNow())


class WebhookEvents(Table, tablename="webhook_events", schema=SCHEMA):
    """The inbox: every verified delivery, as it came."""

    webhook_id = Text(primary_key=True, default=None)
    type = Text(default=None)
    subscription_id = Text(null=True, default=None)
    payment_id = Text(null=True, default=None)
    customer_id = Text(null=True, default=None)
    user_id = Text(null=True, default=None)
    user_hint = Text(null=True, default=None)
    customer_email = Text(null=True, default=None)
    event_at = Timestamp(null=True, default=None)
    received_at = Timestamp(default=None)
    body_sha256 = Text(default=None)
    payload = JSON(null=True, default=None)
    state = Text(default=None)
    reason = Text(null=True, default=None)
    attempts = Integer(default=0)
    next_attempt_at = Timestamp(null=True, default=None)
    last_error = Text(null=True, default=None)
    deliveries = Integer(default=1)
    finished_at = Timestamp(null=True, default=None)
    hook_state = Text(default="none")
    hook_attempts = Integer(default=0)
    hook_next_at = Timestamp(null=True, default=None)


class DodoSubscriptions(Table, tablename="dodo_subscriptions", schema=SCHEMA):
    """The mirror: the provider's newest understood snapshot of each subscription."""

    subscription_id = Text(primary_key=True, default=None)
    user_id = ForeignKey(Users, null=True, default=None, on_delete=OnDelete.set_null, on_update=OnUpdate.no_action)
    customer_id = Text(default=None)
    product_id = Text(default=None)
    plan = Text(default=None)
    status = Text(default=None)
    created_at = Timestamp(null=True, default=None)
    previous_billing_date = Timestamp(null=True, default=None)
    next_billing_date = Timestamp(null=True, default=None)
    cancel_at_next_billing_date = Boolean(default=False)
    cancelled_at = Timestamp(null=True, default=None)
    expires_at = Timestamp(null=True, default=None)
    paused_at = Timestamp(null=True, default=None)
    past_due_ends_at = Timestamp(null=True, default=None)
    trial_period_days = Integer(default=0)
    pending_plan = Text(null=True, default=None)
    pending_plan_at = Timestamp(null=True, default=None)
    started = Boolean(default=False)
    event_at = Timestamp(default=None)
    event_key = Text(default=None)
    webhook_id = Text(null=True, default=None)
    fetched_at = Timestamp(null=True, default=None)
    needs_check = Boolean(default=False)
    reproject_at = Timestamp(null=True, default=None)
    version = BigInt(default=1)
    revoked_at = Timestamp(null=True, default=None)
    revoked_reason = Text(null=True, default=None)
    dispute_open = Boolean(default=False)
    charged = Boolean(default=False)
    charge_failed = Boolean(default=False)
    #: The key of the newest event that named an existing user.
    named_key = Text(null=True, default=None)


class DodoPayments(Table, tablename="dodo_payments", schema=SCHEMA):
    """The index of payments, with their refunds and disputes."""

    payment_id = Text(primary_key=True, default=None)
    subscription_ids = JSONB(default="[]")
    customer_id = Text(null=True, default=None)
    status = Text(null=True, default=None)
    charge_type = Text(null=True, default=None)
    total_amount = BigInt(null=True, default=None)
    currency = Text(null=True, default=None)
    service_periods = JSONB(default="[]")
    created_at = Timestamp(null=True, default=None)
    event_at = Timestamp(null=True, default=None)
    refunds = JSONB(default="{}")
    disputes = JSONB(default="{}")


class BillingIncidents(Table, tablename="billing_incidents", schema=SCHEMA):
    """What somebody should look at: open until it is over, at most one of a kind and subject at a time."""

    id = Text(primary_key=True, default=NewId())
    kind = Text(default=None)
    subject = Text(default=None)
    user_id = Text(null=True, default=None)
    opened_at = Timestamp(default=None)
    closed_at = Timestamp(null=True, default=None)
    detail = JSONB(default="{}")
    hook_state = Text(default="none")
    hook_attempts = Integer(default=0)
    hook_next_at = Timestamp(null=True, default=None)


class UsageReservations(Table, tablename="usage_reservations", schema=SCHEMA):
    """Tokens set aside for calls that run now. One that has expired is free, swept or not."""

    id = Text(primary_key=True, default=None)
    user_id = ForeignKey(Users, null=False, on_delete=OnDelete.cascade, on_update=OnUpdate.no_action, index=True)
    model = Text(default=None)
    tokens = Integer(default=None)
    #: What the call has used so far, as of its last renewal.
    used = Integer(default=0)
    created_at = Timestamp(default=None)
    expires_at = Timestamp(default=None)
    #: The limits and percentages that are looked at again when it is settled.
    thresholds = JSONB(null=True, default=None)


#: The seed's five, in the order of their foreign keys.
SEED_TABLES: tuple[type[Table], ...] = (Users, Sessions, Accounts, Subscriptions, Usage)

#: kitrocket's own, in schema ``kitrocket``.
OWN_TABLES: tuple[type[Table], ...] = (
    WebhookEvents,
    DodoSubscriptions,
    DodoPayments,
    BillingIncidents,
    UsageReservations,
)
