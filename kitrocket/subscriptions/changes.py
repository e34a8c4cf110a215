"""What a transaction writes: collected while it is decided, then sent in one message."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from kitrocket.clock import to_db
from kitrocket.engine import Engine
from kitrocket.sql import statements
from kitrocket.subscriptions.mirror import Mirrored

_SQL = statements("subscriptions")


@dataclass
class Changes:
    """Snapshots by their ids, and columns of rows, of incidents and of the event; ``gone`` are ids of rows."""

    snapshots: dict[str, Mirrored] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    closed: list[dict[str, Any]] = field(default_factory=list)
    opened: list[dict[str, Any]] = field(default_factory=list)
    event: dict[str, Any] | None = None

    def mirror(self, snapshot: Mirrored) -> None:
        """Put a snapshot into the mirror."""
        self.snapshots[snapshot.snapshot.subscription_id] = snapshot

    async def write(self, engine: Engine) -> None:
        """Write them in the current transaction, which holds the locks of all that they touch."""
        parts = vars(self) | {"snapshots": [snapshot.columns() for snapshot in self.snapshots.values()]}
        wanted = {name: part for name, part in parts.items() if part}
        if wanted:
            await engine.fetch(_SQL["write_changes"], json.dumps(wanted, default=_column))


def _column(value: object) -> str:
    if isinstance(value, datetime):
        return to_db(value).isoformat()
    raise TypeError(f"a {type(value).__name__} is no column")
