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

#: A row of a statement, or one that came as JSON.
Row = asyncpg.Record | Mapping[str, Any]

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
    def from_row(cls, row: Row) -> Mirrored:
        """Read a row of the table."""
        aware = _aware(row)
        snapshot = Snapshot(**_named(Snapshot, aware), facts=Facts(**_named(Facts, aware)))
        return cls(snapshot=snapshot, **_named(cls, aware))

    def columns(self) -> dict[str, Any]:
        """Return the columns of the row, all but ``version``."""
        columns = vars(self.snapshot) | vars(self.snapshot.facts) | vars(self)
        return {name: value for name, value in columns.items() if name not in ("snapshot", "facts", "version")}


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


def payment_from_row(row: Row) -> Payment:
    """Read a row of ``kitrocket.dodo_payments``."""
    aware = _aware(row)
    return Payment(
        **_named(Payment, aware)
        | {
            "subscription_ids": frozenset(_loaded(row["subscription_ids"])),
            "service_periods": tuple(ServicePeriod.model_validate(item) for item in _loaded(row["service_periods"])),
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


def _claims(stored: Any) -> dict[str, Claim]:
    return {
        id: Claim(item["amount"], item["status"], parse_instant(item["at"])) for id, item in _loaded(stored).items()
    }


def _loaded(value: Any) -> Any:
    """Return a value of JSON, which is text in a row of its own and a part of a row that came as JSON."""
    return json.loads(value) if isinstance(value, str) else value


def _claims_text(claims: Mapping[str, Claim]) -> str:
    return json.dumps(
        {
            id: {"amount": claim.amount, "status": claim.status, "at": claim.at.isoformat()}
            for id, claim in claims.items()
        }
    )


def _aware(row: Row) -> dict[str, Any]:
    return {name: from_db(value) if isinstance(value, datetime) else value for name, value in row.items()}


def _named(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: values[field.name] for field in fields(kind) if field.name in values}
