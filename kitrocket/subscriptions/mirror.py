"""The mirror and the index as values: rows in, rows out. Instants are UTC here and naive in the columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

import asyncpg

from kitrocket.clock import from_db, to_db
from kitrocket.dodo.events import ServicePeriod, SubscriptionSnapshot, parse_instant
from kitrocket.dodo.payments import Claim, Facts, Payment
from kitrocket.dodo.projection import Snapshot
from kitrocket.models import Difference

_COMPARED = (
    "status",
    "created_at",
    "previous_billing_date",
    "next_billing_date",
    "cancel_at_next_billing_date",
    "cancelled_at",
    "expires_at",
    "paused_at",
    "past_due_ends_at",
    "trial_period_days",
)


@dataclass(frozen=True)
class Mirrored:
    """A row of ``kitrocket.dodo_subscriptions``: a snapshot and what kitrocket notes about it."""

    snapshot: Snapshot
    product_id: str
    event_key: str
    user_id: str | None = None
    pending_plan: str | None = None
    pending_plan_at: datetime | None = None
    webhook_id: str | None = None
    fetched_at: datetime | None = None
    needs_check: bool = False
    reproject_at: datetime | None = None
    named_key: str | None = None
    #: Counts the writes; 0: not written yet.
    version: int = 0

    @classmethod
    def from_row(cls, row: asyncpg.Record) -> Mirrored:
        """Read a row of the table."""
        aware = _aware(row)
        snapshot = Snapshot(**_named(Snapshot, aware), facts=Facts(**_named(Facts, aware)))
        return cls(snapshot=snapshot, **_named(cls, aware))

    def parameters(self) -> tuple[Any, ...]:
        """Return the parameters of ``write_snapshot``, in the order of its columns."""
        item, facts = self.snapshot, self.snapshot.facts
        values = (
            *(item.subscription_id, self.user_id, item.customer_id, self.product_id, item.plan, item.status),
            *(item.created_at, item.previous_billing_date, item.next_billing_date, item.cancel_at_next_billing_date),
            *(item.cancelled_at, item.expires_at, item.paused_at, item.past_due_ends_at, item.trial_period_days),
            *(self.pending_plan, self.pending_plan_at, item.started, item.event_at, self.event_key, self.webhook_id),
            *(self.fetched_at, self.needs_check, self.reproject_at, facts.revoked_at, facts.revoked_reason),
            *(facts.dispute_open, facts.charged, facts.charge_failed, self.named_key),
        )
        return tuple(to_db(value) if isinstance(value, datetime) else value for value in values)


def differences(
    known: Mirrored | None, state: SubscriptionSnapshot, told: Iterable[str], products: Mapping[str, str]
) -> list[Difference]:
    """Return where a snapshot and a state differ, in what the provider ``told`` and in what ``products`` make of it."""
    id = state.subscription_id
    if known is None:
        return [Difference(subscription_id=id, field="subscription_id", ours=None, theirs=id)]
    pairs: dict[str, tuple[object, object]] = {
        "product_id": (known.product_id, state.product_id),
        "customer_id": (known.snapshot.customer_id, state.customer.customer_id),
    }
    if known.product_id == state.product_id:
        # The application's map has changed since.
        pairs["plan"] = (known.snapshot.plan, products.get(state.product_id, known.snapshot.plan))
    named = set(told)
    if "scheduled_change" in named:
        change = state.scheduled_change
        pairs["pending_plan"] = (known.pending_plan, products.get(change.product_id or "") if change else None)
        pairs["pending_plan_at"] = (known.pending_plan_at, change.effective_at if change else None)
    for name in _COMPARED:
        ours, theirs = getattr(known.snapshot, name), getattr(state, name)
        # A fetched subscription lacks the deadline; as long as it is past due, the one that was told holds.
        is_kept = name == "past_due_ends_at" and theirs is None and state.status == "past_due"
        if name in named and not is_kept:
            pairs[name] = (ours, theirs)
    return [
        Difference(subscription_id=id, field=name, ours=_text(ours), theirs=_text(theirs))
        for name, (ours, theirs) in pairs.items()
        if ours != theirs
    ]


def _text(value: object) -> str | None:
    return None if value is None else value.isoformat() if isinstance(value, datetime) else str(value)


def payment_from_row(row: asyncpg.Record) -> Payment:
    """Read a row of ``kitrocket.dodo_payments``."""
    aware = _aware(row)
    return Payment(
        **_named(Payment, aware)
        | {
            "subscription_ids": frozenset(json.loads(row["subscription_ids"])),
            "service_periods": tuple(ServicePeriod.model_validate(item) for item in json.loads(row["service_periods"])),
            "refunds": _claims(row["refunds"]),
            "disputes": _claims(row["disputes"]),
        }
    )


def payment_parameters(payment: Payment) -> tuple[Any, ...]:
    """Return the parameters of ``write_payment``."""
    return (
        payment.payment_id,
        json.dumps(sorted(payment.subscription_ids)),
        payment.customer_id,
        payment.status,
        payment.charge_type,
        payment.total_amount,
        payment.currency,
        json.dumps([item.model_dump(mode="json") for item in payment.service_periods]),
        optional_to_db(payment.created_at),
        optional_to_db(payment.event_at),
        _claims_text(payment.refunds),
        _claims_text(payment.disputes),
    )


def optional_to_db(instant: datetime | None) -> datetime | None:
    """Convert an instant that may be missing for a column."""
    return None if instant is None else to_db(instant)


def _claims(text: str) -> dict[str, Claim]:
    stored = json.loads(text)
    return {id: Claim(item["amount"], item["status"], parse_instant(item["at"])) for id, item in stored.items()}


def _claims_text(claims: Mapping[str, Claim]) -> str:
    return json.dumps(
        {
            id: {"amount": claim.amount, "status": claim.status, "at": claim.at.isoformat()}
            for id, claim in claims.items()
        }
    )


def _aware(row: asyncpg.Record) -> dict[str, Any]:
    return {name: from_db(value) if isinstance(value, datetime) else value for name, value in row.items()}


def _named(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: values[field.name] for field in fields(kind) if field.name in values}
