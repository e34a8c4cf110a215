"""What a transaction reads once it holds the locks: rows that PostgreSQL sends as JSON, in one message."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from kitrocket.clock import from_db
from kitrocket.dodo.payments import Payment
from kitrocket.dodo.projection import LIVE
from kitrocket.subscriptions.mirror import Mirrored, payment_from_row

_INSTANTS = ("_at", "_date", "_end")
#: As the driver reads them. Other writers may have stored one.
_ENDLESS = {"infinity": datetime.max.replace(tzinfo=UTC), "-infinity": datetime.min.replace(tzinfo=UTC)}


@dataclass(frozen=True)
class Holding:
    """What a locked user has: snapshots by their ids, rows, the one that counts first, and open incidents."""

    user_id: str
    snapshots: Mapping[str, Mirrored]
    rows: Sequence[Mapping[str, Any]]
    incidents: frozenset[str]

    def after(self, changed: Mapping[str, Mirrored]) -> Holding:
        """Return what the user will have once the ``changed`` snapshots are in the mirror."""
        snapshots = dict(self.snapshots)
        for id, snapshot in changed.items():
            if snapshot.user_id == self.user_id:
                snapshots[id] = snapshot
            else:
                snapshots.pop(id, None)
        rows = [{**row, "is_known": row["is_known"] or row["dodo_subscription_id"] in changed} for row in self.rows]
        rows.sort(key=lambda row: (row["status"] in LIVE, row["is_known"]), reverse=True)
        return replace(self, snapshots=snapshots, rows=rows)


@dataclass(frozen=True)
class Reading:
    """What is known of a locked subscription, of the users it may belong to, and of its payments.

    ``candidates`` are the users that it may belong to; ``kept`` those that exist and are locked, the user that it is
    linked to among them.
    """

    known: Mirrored | None
    candidates: Sequence[str]
    kept: frozenset[str]
    payments: Sequence[Payment]
    holdings: Sequence[Holding]

    @classmethod
    def from_json(cls, text: str) -> Reading:
        """Read what ``lock_for_snapshot`` answers."""
        read = json.loads(text)
        return cls(
            known=None if read["known"] is None else Mirrored.from_row(_row(read["known"])),
            candidates=read["candidates"],
            kept=frozenset(read["kept"]),
            payments=[payment_from_row(_row(row)) for row in read["payments"]],
            holdings=[_holding(holding) for holding in read["holdings"]],
        )


def holdings_from_json(text: str) -> list[Holding]:
    """Read what ``holdings`` answers."""
    return [_holding(holding) for holding in json.loads(text)]


def _holding(read: Mapping[str, Any]) -> Holding:
    return Holding(
        user_id=read["user_id"],
        snapshots={row["subscription_id"]: Mirrored.from_row(_row(row)) for row in read["snapshots"]},
        rows=[_row(row) for row in read["rows"]],
        incidents=frozenset(read["incidents"]),
    )


def _row(read: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _instant(value) if isinstance(value, str) and name.endswith(_INSTANTS) else value
        for name, value in read.items()
    }


def _instant(text: str) -> datetime:
    return _ENDLESS.get(text) or from_db(datetime.fromisoformat(text))
