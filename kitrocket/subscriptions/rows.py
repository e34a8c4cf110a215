"""The user's row in ``subscriptions``: one per user, written only when a column differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import asyncpg

from kitrocket.clock import from_db
from kitrocket.dodo.projection import LIVE, Policy, Projection, project
from kitrocket.ids import new_id
from kitrocket.models import Subscription
from kitrocket.subscriptions.changes import Changes
from kitrocket.subscriptions.incidents import note_incidents
from kitrocket.subscriptions.reading import Holding


def subscription_from_row(row: asyncpg.Record) -> Subscription:
    """Read a row of ``subscriptions``."""
    end = row["current_period_end"]
    return Subscription(
        id=row["id"],
        user_id=row["user_id"],
        plan=row["plan"],
        status=row["status"],
        dodo_customer_id=row["dodo_customer_id"],
        dodo_subscription_id=row["dodo_subscription_id"],
        current_period_end=None if end is None else from_db(end),
        created_at=from_db(row["created_at"]),
        updated_at=from_db(row["updated_at"]),
    )


def project_users(
    holdings: Sequence[Holding], changes: Changes, now: datetime, policy: Policy, is_heard: Callable[[str], bool]
) -> None:
    """Add to ``changes`` what brings the rows of users, whose locks the transaction holds, to their snapshots' meaning.

    That is their meaning at ``now``, of the snapshots in ``changes`` before those in the mirror.

    ``is_heard`` says whether a hook wants incidents of a type.
    """
    holdings = [holding.after(changes.snapshots) for holding in holdings]
    for holding in holdings:
        snapshots = (item.snapshot for item in holding.snapshots.values())
        _change_row(holding, project(snapshots, now, policy), changes)
    note_incidents(holdings, changes, now, is_heard)


def _change_row(holding: Holding, projection: Projection | None, changes: Changes) -> None:
    ours = _ours(holding.rows, projection)
    if projection is None:
        changes.gone += [] if ours is None else [ours["id"]]
        return
    columns = projection._asdict()
    if ours is None or any(ours[name] != value for name, value in columns.items()):
        id = new_id() if ours is None else ours["id"]
        changes.rows.append({"id": id, "user_id": holding.user_id, **columns})


def _ours(rows: Sequence[Mapping[str, Any]], projection: Projection | None) -> Mapping[str, Any] | None:
    """Choose the row to write from a user's, the one that counts first; ``None``: a new one.

    A live result takes the live row, whoever wrote it, since there can only be one; else the mirror's own.
    """
    if projection is not None and projection.status in LIVE:
        live = next((row for row in rows if row["status"] in LIVE), None)
        if live is not None:
            return live
    return next((row for row in rows if row["is_known"]), None)
