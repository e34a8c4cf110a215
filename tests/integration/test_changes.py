"""A write that touches no row, or another one than its locks protect, is an error and changes nothing."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from factories import make_user
from kitrocket import Engine
from kitrocket.subscriptions.changes import Changes

pytestmark = pytest.mark.asyncio

ROW = {
    "id": "s1",
    "plan": "pro",
    "status": "active",
    "created_at": "2026-03-01T12:00:00",
    "updated_at": "2026-03-01T12:00:00",
}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"gone": ["nobody's"]}, "a row of subscriptions vanished"),
        ({"rows": [ROW | {"user_id": "second"}]}, "a row of subscriptions was given to another user"),
        ({"event": {"webhook_id": "nobody's", "state": "applied"}}, "an event vanished"),
    ],
    ids=["gone", "rows", "event"],
)
async def test_a_write_that_misses_its_row_changes_nothing(
    engine: Engine, changes: dict[str, Any], complaint: str
) -> None:
    for id in ("first", "second"):
        await make_user(engine, id=id)
    await Changes(rows=[ROW | {"user_id": "first"}]).write(engine)
    with pytest.raises(asyncpg.RaiseError, match=complaint):
        await Changes(**changes).write(engine)
    rows = await engine.fetch("SELECT id, user_id FROM subscriptions")
    assert [tuple(row) for row in rows] == [("s1", "first")]
