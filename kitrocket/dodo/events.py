"""Read events: small tolerant models of our own, and nothing that raises but the envelope.

The provider's payloads grow and its own SDK refuses some of them; what is not read here cannot break anything.
State comes from ``data``, never from the event's type.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from kitrocket.clock import to_db
from kitrocket.errors import WebhookPayloadError

#: The provider's statuses of a subscription, each higher than the one before where two events share a time.
STATUS_RANKS = ("pending", "active", "past_due", "on_hold", "paused", "cancelled", "failed", "expired")

#: What a column of type ``bigint`` holds, and ``integer``.
_BIG, _INT = 2**63 - 1, 2**31 - 1
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def parse_instant(value: object) -> datetime:
    """Read an ISO 8601 text as an instant in UTC; without a zone it means UTC. Raises ``ValueError``."""
    if isinstance(value, datetime):
        return value
    if not isinstance(value, str):
        raise ValueError("an instant is ISO 8601 text")
    instant = datetime.fromisoformat(value)
    try:
        return instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("an instant outside the years 1 to 9999") from error


def _word(value: object) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 255 or _CONTROL.search(value):
        raise ValueError("text of 1 to 255 characters, none a control character")
    return value


def _amount(value: object) -> str:
    return _word(str(value) if isinstance(value, int | float) else value)


def _metadata(value: object) -> object:
    # An empty map comes as [] from some languages.
    return value or {}


#: An id or a keyword of the provider's.
Word = Annotated[str, BeforeValidator(_word)]
Instant = Annotated[datetime, BeforeValidator(parse_instant)]
Metadata = Annotated[dict[str, Any], BeforeValidator(_metadata)]


class _Read(BaseModel):
    """A frozen model that reads what it knows, and takes null for missing."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_missing(cls, value: object) -> object:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class Customer(_Read):
    """Whose subscription it is, at the provider."""

    customer_id: Word
    email: str | None = None
    metadata: Metadata = {}


class ScheduledChange(_Read):
    """The product that a subscription will change to, and when."""

    product_id: Word | None = None
    effective_at: Instant | None = None


class SubscriptionSnapshot(_Read):
    """The state of a subscription that an event carries."""

    subscription_id: Word
    status: Word
    product_id: Word
    customer: Customer
    metadata: Metadata = {}
    created_at: Instant | None = None
    previous_billing_date: Instant | None = None
    next_billing_date: Instant | None = None
    cancel_at_next_billing_date: bool = False
    cancelled_at: Instant | None = None
    expires_at: Instant | None = None
    paused_at: Instant | None = None
    past_due_ends_at: Instant | None = None
    trial_period_days: Annotated[int, Field(ge=0, le=_INT)] = 0
    scheduled_change: ScheduledChange | None = None

    def order_key(self, event_at: datetime) -> str:
        """Return fixed-width text by which snapshots of one subscription are ordered, greatest last.

        Event time, previous and next billing date (missing first), rank of the status, digest of what was read. The
        status must be one of :data:`STATUS_RANKS`.
        """
        fields = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        digest = hashlib.sha256(fields.encode()).hexdigest()
        dates = (event_at, self.previous_billing_date, self.next_billing_date)
        return " ".join([*map(_fixed, dates), str(STATUS_RANKS.index(self.status)), digest])


class ServicePeriod(_Read):
    """The time that a payment pays for, in one subscription."""

    subscription_id: Word
    starts_at: Instant | None = None
    ends_at: Instant | None = None


class RefundState(_Read):
    """A refund; ``amount`` is in minor units, and missing when all was refunded at once."""

    refund_id: Word
    payment_id: Word
    status: Word = "pending"
    amount: Annotated[int, Field(ge=0, le=_BIG)] | None = None
    is_partial: bool = False
    created_at: Instant | None = None


class DisputeState(_Read):
    """A dispute; ``dispute_status`` is ``dispute_opened`` and the like, ``amount`` a decimal number as text."""

    dispute_id: Word
    payment_id: Word
    dispute_status: Word = "dispute_opened"
    amount: Annotated[str, BeforeValidator(_amount)] | None = None
    created_at: Instant | None = None


class PaymentState(_Read):
    """The state of a payment that an event carries; ``total_amount`` is in minor units."""

    payment_id: Word
    status: Word = "processing"
    customer: Customer | None = None
    metadata: Metadata = {}
    subscription_id: Word | None = None
    subscription_ids: tuple[Word, ...] = ()
    charge_type: Word | None = None
    total_amount: Annotated[int, Field(ge=0, le=_BIG)] = 0
    currency: Word | None = None
    service_periods: tuple[ServicePeriod, ...] = ()
    created_at: Instant | None = None
    refund_status: Word | None = None
    refunds: tuple[RefundState, ...] = ()
    disputes: tuple[DisputeState, ...] = ()

    def all_subscription_ids(self) -> set[str]:
        """Return every subscription that this payment names."""
        periods = (period.subscription_id for period in self.service_periods)
        return {*self.subscription_ids, *periods} | ({self.subscription_id} if self.subscription_id else set())


class Unreadable(NamedTuple):
    """Data of a family that matters, in a form that cannot be read."""

    subscription_id: str | None
    payment_id: str | None
    customer_id: str | None


#: What an event carries; ``None``: nothing that concerns subscriptions.
Content = SubscriptionSnapshot | PaymentState | RefundState | DisputeState | Unreadable | None

_FAMILIES: Mapping[str, type[SubscriptionSnapshot | PaymentState | RefundState | DisputeState]] = {
    "subscription": SubscriptionSnapshot,
    "payment": PaymentState,
    "refund": RefundState,
    "dispute": DisputeState,
}


@dataclass(frozen=True)
class Event:
    """An event as it came: its type as the provider spells it, its own time in UTC, and its data."""

    type: str
    at: datetime
    data: dict[str, Any]

    @cached_property
    def content(self) -> Content:
        """The data, read by the type's family, before the first dot. Raises nothing."""
        model = _FAMILIES.get(self.type.partition(".")[0])
        if model is None:
            return None
        try:
            return model.model_validate(self.data)
        except ValidationError:
            customer = self.data.get("customer")
            return Unreadable(
                _word_or_none(self.data.get("subscription_id")),
                _word_or_none(self.data.get("payment_id")),
                _word_or_none(customer.get("customer_id")) if isinstance(customer, dict) else None,
            )


def read_event(text: str) -> Event:
    """Read the envelope of an event from its JSON. Raises :class:`~kitrocket.errors.WebhookPayloadError`."""
    try:
        envelope = from_json(text, allow_inf_nan=False)
    except ValueError:
        # `from None`: the parser's error quotes the body.
        raise WebhookPayloadError("not_json") from None
    if not isinstance(envelope, dict):
        raise WebhookPayloadError("not_an_object")
    type = _word_or_none(envelope.get("type"))
    if type is None:
        raise WebhookPayloadError("bad_type")
    try:
        at = parse_instant(envelope.get("timestamp"))
    except ValueError:
        raise WebhookPayloadError("bad_event_time") from None
    if not isinstance(envelope.get("data"), dict):
        raise WebhookPayloadError("bad_data")
    return Event(type, at, envelope["data"])


def named_user(keys: Sequence[str], *maps: Mapping[str, Any]) -> str | None:
    """Return the user id that the first of ``keys`` found in the first of ``maps`` names, as text, or ``None``."""
    for metadata in maps:
        for key in keys:
            value = metadata.get(key)
            if value is not None and value != "":
                return str(value)
    return None


def _word_or_none(value: object) -> str | None:
    try:
        return _word(value)
    except ValueError:
        return None


def _fixed(instant: datetime | None) -> str:
    return "-" * 26 if instant is None else to_db(instant).isoformat(timespec="microseconds")
