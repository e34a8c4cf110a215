"""The index of payments: how facts about one payment merge, and what its subscriptions follow from them. Pure.

Every merge keeps the newest by event time, then by rank, so that the order of arrival has no influence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from kitrocket.dodo.events import DisputeState, PaymentState, RefundState, ServicePeriod

#: The refund that stands for a payment's own ``refund_status: full``, which names no refund.
WHOLE = "*"

#: A charge without service periods belongs to a period that begins at most this long after it.
_EARLY = timedelta(days=2)

_PAYMENT_RANKS = {"processing": 1, "failed": 2, "cancelled": 2, "succeeded": 3}
_REFUND_RANKS = {"pending": 1, "review": 1, "failed": 2, "succeeded": 3}
_DISPUTE_RANKS = {"opened": 1, "challenged": 2, "expired": 3, "accepted": 3, "cancelled": 3, "won": 3, "lost": 3}
_OPEN = {"opened", "challenged"}
_LOST = {"lost", "accepted", "expired"}
_RENEWING = {"renewal", "plan_change"}

_BEGINNING = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Claim:
    """A refund or a dispute.

    A refund's ``amount`` is in minor units, and ``None`` means all of the payment; a dispute's is text, as it came.
    """

    amount: int | str | None
    status: str
    at: datetime


@dataclass(frozen=True)
class Payment:
    """What is known of a payment. ``status`` is ``None`` while only refunds or disputes of it were seen."""

    payment_id: str
    subscription_ids: frozenset[str] = frozenset()
    customer_id: str | None = None
    status: str | None = None
    charge_type: str | None = None
    total_amount: int | None = None
    currency: str | None = None
    service_periods: tuple[ServicePeriod, ...] = ()
    created_at: datetime | None = None
    event_at: datetime | None = None
    refunds: Mapping[str, Claim] = field(default_factory=dict)
    disputes: Mapping[str, Claim] = field(default_factory=dict)

    @property
    def made_at(self) -> datetime:
        """When it was made, as far as is known."""
        return self.created_at or self.event_at or _BEGINNING

    def with_state(self, state: PaymentState, at: datetime) -> Payment:
        """Return this payment after an event of the instant ``at`` that carried ``state``."""
        refunds = [(item.refund_id, _of_refund(item, item.created_at or at)) for item in state.refunds]
        if state.refund_status == "full":
            refunds.append((WHOLE, Claim(None, "succeeded", at)))
        disputes = [(item.dispute_id, _of_dispute(item, item.created_at or at)) for item in state.disputes]
        merged = replace(
            self,
            subscription_ids=self.subscription_ids | state.all_subscription_ids(),
            refunds=_merged(self.refunds, refunds, _REFUND_RANKS),
            disputes=_merged(self.disputes, disputes, _DISPUTE_RANKS),
        )
        newer = replace(
            merged,
            customer_id=state.customer.customer_id if state.customer else None,
            status=state.status,
            charge_type=state.charge_type,
            total_amount=state.total_amount,
            currency=state.currency,
            service_periods=state.service_periods,
            created_at=state.created_at,
            event_at=at,
        )
        return newer if self.status is None or newer._order() > self._order() else merged

    def _order(self) -> tuple[datetime, int, str]:
        """Return what a state is newer by: its time, its rank, then an order that is always the same."""
        rest = (self.status, self.total_amount, self.charge_type, self.currency, self.customer_id, self.created_at)
        periods = [period.model_dump(mode="json") for period in self.service_periods]
        return self.event_at or _BEGINNING, _PAYMENT_RANKS.get(self.status or "", 0), repr((rest, periods))

    def with_refund(self, refund: RefundState, at: datetime) -> Payment:
        """Return this payment after a refund's event of the instant ``at``."""
        return replace(self, refunds=_merged(self.refunds, [(refund.refund_id, _of_refund(refund, at))], _REFUND_RANKS))

    def with_dispute(self, dispute: DisputeState, at: datetime) -> Payment:
        """Return this payment after a dispute's event of the instant ``at``."""
        claims = [(dispute.dispute_id, _of_dispute(dispute, at))]
        return replace(self, disputes=_merged(self.disputes, claims, _DISPUTE_RANKS))

    def refunded_at(self) -> datetime | None:
        """Return when succeeded refunds reached the whole amount, or ``None``."""
        returned = 0
        for claim in sorted(self.refunds.values(), key=lambda claim: claim.at):
            if claim.status == "succeeded":
                returned += claim.amount if isinstance(claim.amount, int) else self.total_amount or 0
                if returned >= (self.total_amount or 0):
                    return claim.at
        return None

    def lost_at(self) -> datetime | None:
        """Return when the first of its disputes was lost, accepted or expired, or ``None``."""
        return min((claim.at for claim in self.disputes.values() if claim.status in _LOST), default=None)

    def is_for_period(self, subscription_id: str, previous: datetime | None) -> bool:
        """Say whether it paid for the subscription's period that began at ``previous``."""
        if previous is None:
            return True
        ends = [item.ends_at for item in self.service_periods if item.subscription_id == subscription_id]
        known = [end for end in ends if end is not None]
        return max(known) > previous if known else self.made_at > earlier(previous, _EARLY)


@dataclass(frozen=True)
class Facts:
    """What the payments say about a subscription's present period."""

    revoked_at: datetime | None = None
    revoked_reason: str | None = None
    dispute_open: bool = False
    charged: bool = False
    charge_failed: bool = False


def facts_of(subscription_id: str, previous: datetime | None, payments: Iterable[Payment]) -> Facts:
    """Return what ``payments`` say about a subscription whose present period began at ``previous``."""
    ours = [payment for payment in payments if payment.status and subscription_id in payment.subscription_ids]
    current = [payment for payment in ours if _is_charge(payment) and payment.is_for_period(subscription_id, previous)]
    since = [payment for payment in ours if previous is None or payment.made_at >= previous]
    newest = max(since, key=lambda payment: (payment.made_at, payment.payment_id), default=None)
    revoked_at, reason = _revocation(current)
    return Facts(
        revoked_at=revoked_at,
        revoked_reason=reason,
        dispute_open=any(claim.status in _OPEN for payment in current for claim in payment.disputes.values()),
        charged=any(_is_charge(payment) and payment.charge_type in _RENEWING for payment in since),
        charge_failed=newest is not None and newest.status == "failed",
    )


def _is_charge(payment: Payment) -> bool:
    return payment.status == "succeeded" and (payment.total_amount or 0) > 0


def _revocation(payments: list[Payment]) -> tuple[datetime | None, str | None]:
    losses = [lost for payment in payments if (lost := payment.lost_at()) is not None]
    returns = [returned for payment in payments if (returned := payment.refunded_at()) is not None]
    decided = [(min(losses), "dispute_lost")] if losses else []
    if returns and len(returns) == len(payments):
        decided.append((max(returns), "refunded"))
    return min(decided, default=(None, None))


def earlier(instant: datetime, by: timedelta) -> datetime:
    """Return ``instant`` less ``by``, or the first instant there is."""
    try:
        return instant - by
    except OverflowError:
        return _BEGINNING


def _of_refund(refund: RefundState, at: datetime) -> Claim:
    # A partial refund of an unknown amount proves nothing about the whole.
    amount = 0 if refund.amount is None and refund.is_partial else refund.amount
    return Claim(amount, refund.status, at)


def _of_dispute(dispute: DisputeState, at: datetime) -> Claim:
    return Claim(dispute.amount, dispute.dispute_status.removeprefix("dispute_"), at)


def _merged(
    known: Mapping[str, Claim], claims: Iterable[tuple[str, Claim]], ranks: Mapping[str, int]
) -> dict[str, Claim]:
    def order(claim: Claim) -> tuple[datetime, int, str, str]:
        return claim.at, ranks.get(claim.status, 0), claim.status, str(claim.amount)

    merged = dict(known)
    for id, claim in claims:
        if id not in merged or order(claim) > order(merged[id]):
            merged[id] = claim
    return merged
