"""The user's row in ``subscriptions``: one per user, written only when a column differs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any

import asyncpg

from kitrocket.clock import from_db, to_db
from kitrocket.dodo.projection import LIVE, Policy, Projection, project
from kitrocket.engine import Engine
from kitrocket.ids import new_id
from kitrocket.models import Subscription
from kitrocket.sql import statements
from kitrocket.subscriptions.incidents import note_incidents
from kitrocket.subscriptions.mirror import Mirrored, optional_to_db

_SQL = statements("subscriptions")
_COLUMNS = (
    "plan",
    "status",
    "dodo_customer_id",
    "dodo_subscription_id",
    "current_period_end",
    "created_at",
    "updated_at",
)


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


async def project_users(
    engine: Engine, user_ids: Iterable[str], now: datetime, policy: Policy, is_heard: Callable[[str], bool]
) -> None:
    """Bring the rows of users, whose locks this transaction holds, to what their snapshots mean at ``now``.

    ``is_heard`` says whether a hook wants incidents of a type.
    """
    wanted = sorted(user_ids)
    if not wanted:
        return
    found = await engine.fetch(_SQL["holdings"], wanted)
    for user_id, group in groupby(found, key=lambda row: row["owner_id"]):
        held = list(group)
        snapshots = {row["subscription_id"]: Mirrored.from_row(row).snapshot for row in held if row["subscription_id"]}
        await _write(engine, user_id, held, project(snapshots.values(), now, policy))
        await note_incidents(engine, user_id, snapshots.values(), set(held[0]["incidents"]), now, is_heard)


async def _write(engine: Engine, user_id: str, held: Sequence[asyncpg.Record], projection: Projection | None) -> None:
    ours = _ours([row for row in held if row["row_id"] is not None], projection)
    if projection is None:
        if ours is not None:
            await _touch_one(engine, "delete_row", ours["row_id"], user_id)
        return
    columns = _columns(projection)
    if ours is None:
        await _touch_one(engine, "insert_row", new_id(), user_id, *columns)
    elif tuple(ours[f"row_{name}"] for name in _COLUMNS) != columns:
        await _touch_one(engine, "update_row", ours["row_id"], user_id, *columns)


def _ours(rows: Sequence[asyncpg.Record], projection: Projection | None) -> asyncpg.Record | None:
    """Choose the row to write from a user's, the one that counts first; ``None``: a new one.

    A live result takes the live row, whoever wrote it, since there can only be one; else the mirror's own.
    """
    if projection is not None and projection.status in LIVE:
        live = next((row for row in rows if row["row_status"] in LIVE), None)
        if live is not None:
            return live
    return next((row for row in rows if row["row_known"]), None)


def _columns(projection: Projection) -> tuple[Any, ...]:
    return (
        projection.plan,
        projection.status,
        projection.dodo_customer_id,
        projection.dodo_subscription_id,
        optional_to_db(projection.current_period_end),
        to_db(projection.created_at),
        to_db(projection.updated_at),
    )


async def _touch_one(engine: Engine, statement: str, *parameters: Any) -> None:
    if await engine.fetchval(_SQL[statement], *parameters) is None:
        raise RuntimeError(f"{statement} touched no row of `subscriptions`")
