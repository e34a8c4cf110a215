"""What subscriptions' snapshots mean at an instant: the row the application sees, and the access it gives. Pure.

Both :func:`project` and :func:`access` pick through one :func:`view` of each snapshot, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple

from kitrocket.dodo.payments import Facts
from kitrocket.models import Access

#: The statuses of a row that count as a subscription under way.
LIVE = frozenset({"active", "trialing", "past_due"})

#: The billing date may be this much later than the trial's end, for a trial counted in whole days.
_TRIAL_SLACK = timedelta(days=2)

_FOREVER = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Snapshot:
    """The provider's newest understood state of one subscription. Every instant is in UTC.

    ``status`` is the provider's; ``started`` says that a status other than pending or failed was ever seen.
    """

    subscription_id: str
    customer_id: str
    plan: str
    status: str
    event_at: datetime
    created_at: datetime | None = None
    previous_billing_date: datetime | None = None
    next_billing_date: datetime | None = None
    cancel_at_next_billing_date: bool = False
    cancelled_at: datetime | None = None
    expires_at: datetime | None = None
    paused_at: datetime | None = None
    past_due_ends_at: datetime | None = None
    trial_period_days: int = 0
    started: bool = False
    facts: Facts = field(default_factory=Facts)


@dataclass(frozen=True)
class Policy:
    """The choices an application makes; the defaults are those of ``Settings``."""

    plans: tuple[str, ...] = ("starter", "pro")
    honour_paid_period: bool = True
    past_due: timedelta = timedelta(days=3)
    renewal_leeway: timedelta = timedelta(hours=72)
    dispute_policy: Literal["flag", "suspend"] = "flag"


class View(NamedTuple):
    """A snapshot at an instant.

    ``fact_at`` is the time of what is shown: the event, a boundary that passed since, or the revocation. ``turns_at``
    is the next instant at which time alone changes the view.
    """

    status: str
    period_end: datetime | None
    allowed: bool
    until: datetime | None
    reason: str
    fact_at: datetime
    turns_at: datetime | None = None


class Projection(NamedTuple):
    """The columns of the row in ``subscriptions``."""

    plan: str
    status: str
    dodo_customer_id: str
    dodo_subscription_id: str
    current_period_end: datetime | None
    created_at: datetime
    updated_at: datetime


def view(snapshot: Snapshot, now: datetime, policy: Policy) -> View | None:
    """Return what a snapshot means at ``now``; ``None`` for a subscription that never started."""
    if snapshot.status == "pending" or (snapshot.status == "failed" and not snapshot.started):
        return None
    facts = snapshot.facts
    if facts.revoked_at is not None:
        return _denied(snapshot, "cancelled", facts.revoked_at, facts.revoked_reason or "refunded", facts.revoked_at)
    if snapshot.status in ("active", "past_due"):
        return _billed(snapshot, now, policy)
    if snapshot.status == "on_hold":
        return _denied(snapshot, "past_due", snapshot.next_billing_date, "on_hold")
    if snapshot.status == "paused":
        return _denied(snapshot, "past_due", snapshot.paused_at or snapshot.event_at, "paused")
    if snapshot.status == "cancelled":
        return _cancelled(snapshot, now, policy)
    end = _first(snapshot.next_billing_date, snapshot.expires_at, snapshot.event_at)
    return _denied(snapshot, "cancelled", end, snapshot.status)


def _billed(snapshot: Snapshot, now: datetime, policy: Policy) -> View:
    """View a subscription that is active or past_due at the provider."""
    end = snapshot.next_billing_date
    active, leaving = snapshot.status == "active", snapshot.cancel_at_next_billing_date
    if active and leaving and end is not None and now >= end:
        return View("cancelled", end, False, end, "ended", max(end, snapshot.event_at))
    if snapshot.facts.dispute_open and policy.dispute_policy == "suspend":
        return _denied(snapshot, "past_due", end, "dispute_open", turns_at=end if active and leaving else None)
    if not active:
        until = snapshot.past_due_ends_at or later(end, policy.past_due)
        return _until("past_due", end, until, now, ("grace", "past_due"), snapshot.event_at)
    if _in_trial(snapshot, now):
        return View("trialing", end, True, end, "cancel_scheduled" if leaving else "trial", snapshot.event_at, end)
    fact_at = snapshot.event_at
    # The end of a trial is a boundary that the row shows, when it passed after the event.
    if end is not None and now >= end > fact_at and _in_trial(snapshot, fact_at):
        fact_at = end
    if leaving:
        return View("active", end, True, end, "cancel_scheduled", fact_at, end)
    if end is None or now < end:
        return View("active", end, True, end, "active", fact_at, end)
    leeway_end = later(end, policy.renewal_leeway)
    return _until("active", end, leeway_end, now, ("renewal_unconfirmed", "renewal_missing"), fact_at)


def _in_trial(snapshot: Snapshot, now: datetime) -> bool:
    created, previous, end = snapshot.created_at, snapshot.previous_billing_date, snapshot.next_billing_date
    if snapshot.trial_period_days <= 0 or snapshot.facts.charged or not (created and previous and end):
        return False
    # Days as a number: a trial of a million of them has no timedelta to add.
    trial = timedelta(days=min(snapshot.trial_period_days, 366_000))
    return previous < _after(created, trial) and end - previous <= trial + _TRIAL_SLACK and now < end


def _cancelled(snapshot: Snapshot, now: datetime, policy: Policy) -> View:
    end, cancelled_at = snapshot.next_billing_date, snapshot.cancelled_at or snapshot.event_at
    paid = policy.honour_paid_period and snapshot.paused_at is None and not snapshot.facts.charge_failed
    if paid and end is not None and end > cancelled_at:
        return _until("cancelled", end, end, now, ("cancelled_paid", "ended"), snapshot.event_at)
    return _denied(snapshot, "cancelled", _first(end, cancelled_at), "cancelled")


def _denied(
    snapshot: Snapshot,
    status: str,
    end: datetime | None,
    reason: str,
    fact_at: datetime | None = None,
    turns_at: datetime | None = None,
) -> View:
    return View(status, end, False, None, reason, fact_at or snapshot.event_at, turns_at)


def _until(
    status: str,
    end: datetime | None,
    until: datetime | None,
    now: datetime,
    reasons: tuple[str, str],
    fact_at: datetime,
) -> View:
    """View what is allowed for the first of ``reasons`` until an instant, then denied for the second."""
    allowed = until is None or now < until
    return View(status, end, allowed, until, reasons[not allowed], fact_at, until if allowed else None)


class _Chosen(NamedTuple):
    snapshot: Snapshot
    view: View


def _choose(snapshots: Iterable[Snapshot], now: datetime, policy: Policy) -> _Chosen | None:
    """Pick one of a user's subscriptions: allowed, then live, the higher plan, the newer, the greater id."""
    rank = {plan: number for number, plan in enumerate(policy.plans)}
    candidates = [_Chosen(item, seen) for item in snapshots if (seen := view(item, now, policy)) is not None]

    def order(chosen: _Chosen) -> tuple[bool, bool, int, datetime, str]:
        item, seen = chosen
        newness = item.created_at or item.event_at
        return seen.allowed, seen.status in LIVE, rank.get(item.plan, -1), newness, item.subscription_id

    return max(candidates, key=order, default=None)


def project(snapshots: Iterable[Snapshot], now: datetime, policy: Policy) -> Projection | None:
    """Return the row that a user's snapshots make at ``now``, or ``None`` for no row."""
    chosen = _choose(snapshots, now, policy)
    if chosen is None:
        return None
    item, seen = chosen
    return Projection(
        plan=item.plan,
        status=seen.status,
        dodo_customer_id=item.customer_id,
        dodo_subscription_id=item.subscription_id,
        current_period_end=seen.period_end,
        created_at=item.created_at or item.event_at,
        updated_at=seen.fact_at,
    )


def access(snapshots: Sequence[Snapshot], now: datetime, policy: Policy) -> Access:
    """Return the access that a user's snapshots give at ``now``."""
    chosen = _choose(snapshots, now, policy)
    if chosen is None:
        reason = "not_started" if snapshots else "none"
        return Access(allowed=False, plan=None, status=None, until=None, reason=reason)
    item, seen = chosen
    return Access(allowed=seen.allowed, plan=item.plan, status=seen.status, until=seen.until, reason=seen.reason)


def row_access(plan: str, status: str, period_end: datetime | None, now: datetime, policy: Policy) -> Access:
    """Return the access that a row gives whose subscription the provider never told of."""
    until: datetime | None = None
    allowed = False
    if status in ("active", "trialing"):
        until = later(period_end, policy.renewal_leeway)
        allowed = until is None or now < until
    elif status == "cancelled":
        until = period_end
        allowed = until is not None and now < until
    return Access(allowed=allowed, plan=plan, status=status, until=until, reason="row_only")


def later(instant: datetime | None, by: timedelta) -> datetime | None:
    """Return ``instant`` plus ``by``; no instant stays none."""
    return None if instant is None else _after(instant, by)


def _after(instant: datetime, by: timedelta) -> datetime:
    try:
        return instant + by
    except OverflowError:
        return _FOREVER


def _first(*instants: datetime | None) -> datetime:
    return min(instant for instant in instants if instant is not None)
