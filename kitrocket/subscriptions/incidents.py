"""Incidents: what kitrocket sees and may not change by itself, open for as long as it lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime

from kitrocket.dodo.projection import Snapshot
from kitrocket.ids import new_id
from kitrocket.subscriptions.changes import Changes
from kitrocket.subscriptions.reading import Holding


def incidents_of(user_id: str, snapshots: Iterable[Snapshot]) -> dict[str, list[str]]:
    """Return the incidents that a user's snapshots amount to: kind and subject → the subscriptions concerned.

    ``double_billing``: two or more subscriptions of the user bill. ``still_billing``: a subscription whose period was
    paid back bills on.
    """
    billing = [item for item in snapshots if item.status in ("active", "past_due")]
    billing = [item for item in billing if not item.cancel_at_next_billing_date]
    found: dict[str, list[str]] = {
        f"still_billing {item.subscription_id}": [item.subscription_id]
        for item in billing
        if item.facts.revoked_at is not None
    }
    if len(billing) > 1:
        found[f"double_billing {user_id}"] = sorted(item.subscription_id for item in billing)
    return found


def note_incidents(
    holdings: Sequence[Holding], changes: Changes, now: datetime, is_heard: Callable[[str], bool]
) -> None:
    """Open and close the incidents of users, whose locks the transaction holds.

    Of all of them at once: one that is over for a user may last for the user that the subscription moved to.
    """
    lasting: set[str] = set()
    for holding in holdings:
        wanted = incidents_of(holding.user_id, (item.snapshot for item in holding.snapshots.values()))
        lasting |= wanted.keys()
        for name in sorted(wanted.keys() - holding.incidents):
            kind, _, subject = name.partition(" ")
            open_incident(changes, kind, subject, holding.user_id, {"subscriptions": wanted[name]}, now, is_heard)
    for holding in holdings:
        for name in sorted(holding.incidents - lasting):
            kind, _, subject = name.partition(" ")
            changes.closed.append({"kind": kind, "subject": subject, "closed_at": now})


def open_incident(
    changes: Changes,
    kind: str,
    subject: str,
    user_id: str | None,
    detail: Mapping[str, object],
    now: datetime,
    is_heard: Callable[[str], bool],
) -> None:
    """Open an incident; one that is open stays, and becomes the user's. Hooks that want a new one are told."""
    is_told = is_heard(f"incident.{kind}")
    changes.opened.append(
        {
            "id": new_id(),
            "kind": kind,
            "subject": subject,
            "user_id": user_id,
            "opened_at": now,
            "detail": detail,
            "hook_state": "pending" if is_told else "none",
            "hook_next_at": now if is_told else None,
        }
    )
