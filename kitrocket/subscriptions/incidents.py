"""Incidents: what kitrocket sees and may not change by itself, open for as long as it lasts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime

from kitrocket.clock import to_db
from kitrocket.dodo.projection import Snapshot
from kitrocket.engine import Engine
from kitrocket.ids import new_id
from kitrocket.sql import statements

_SQL = statements("subscriptions")


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


async def note_incidents(
    engine: Engine,
    user_id: str,
    snapshots: Iterable[Snapshot],
    known: set[str],
    now: datetime,
    is_heard: Callable[[str], bool],
) -> None:
    """Open and close a user's incidents; ``known`` are the open ones. The transaction holds the user's lock."""
    wanted = incidents_of(user_id, snapshots)
    for name in sorted(wanted.keys() - known):
        kind, _, subject = name.partition(" ")
        await open_incident(engine, kind, subject, user_id, {"subscriptions": wanted[name]}, now, is_heard)
    for name in sorted(known - wanted.keys()):
        kind, _, subject = name.partition(" ")
        await engine.fetch(_SQL["close_incident"], kind, subject, to_db(now))


async def open_incident(
    engine: Engine,
    kind: str,
    subject: str,
    user_id: str | None,
    detail: Mapping[str, object],
    now: datetime,
    is_heard: Callable[[str], bool],
) -> bool:
    """Open an incident, and return whether none of its kind and subject was open. Hooks that want it are told."""
    hooks = "pending" if is_heard(f"incident.{kind}") else "none"
    id = await engine.fetchval(
        _SQL["open_incident"], new_id(), kind, subject, user_id, to_db(now), json.dumps(detail), hooks
    )
    return id is not None
