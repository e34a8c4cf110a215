"""AI token usage: one row a call, counted exactly once, summed over any window."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import asyncpg
from pydantic import BaseModel

from kitrocket.clock import Clock, from_db, to_db, utc_now
from kitrocket.engine import Engine
from kitrocket.errors import DatabaseError, InvalidInputError, UsageConflictError
from kitrocket.ids import new_usage_id
from kitrocket.inputs import flag, instant, label, whole_number
from kitrocket.models import RecordedUsage, TopUser, UsageBucket, UsageEntry, UsageRecord
from kitrocket.sql import statements
from kitrocket.windows import Dimension, Window, bucket_starts, dimension, time_zone, window

#: How far ahead of the clock a call may be dated: clocks of several machines differ a little.
FUTURE_LIMIT = timedelta(minutes=5)
#: How many rows one statement inserts; a longer list takes several, in one transaction.
_BATCH = 5_000
#: How often a batch is tried whose ids are taken but whose rows are gone before they can be read.
_ROUNDS = 5

_SQL = statements("usage")
_NAMES = frozenset(UsageEntry.model_fields)
_REQUIRED = ("user_id", "tokens", "model")


@dataclass(frozen=True, slots=True)
class _Row:
    """A call as it is to be written. ``is_given`` says that the id is the caller's, so that it may be known already."""

    id: str
    user_id: str
    tokens: int
    model: str
    at: datetime
    is_given: bool

    @property
    def content(self) -> tuple[object, ...]:
        """What must be equal for the same id to be the same call; its time need not be."""
        return (self.user_id, self.tokens, self.model)


class UsageService:
    """Records AI calls and sums them. A row is one call, its id the key that keeps it from being counted twice.

    Windows are ``since <= t < until``, timezone-aware, to the microsecond. Without ``until`` there is no upper bound;
    without ``since`` the window begins 30 times 24 hours before ``until`` or now. An unknown user has used nothing.
    Every method raises :class:`InvalidInputError` for bad input, before anything is written.
    """

    def __init__(self, engine: Engine, *, clock: Clock = utc_now) -> None:
        self._engine = engine
        self._clock = clock

    # -- recording ----------------------------------------------------------------------------------------------

    async def record(
        self, user_id: str, *, tokens: int, model: str, id: str | None = None, at: datetime | None = None
    ) -> UsageRecord:
        """Record one call and return it once it is committed; inside a transaction, the caller's commit counts.

        ``tokens`` is 0 to 2^31-1. ``id`` makes a repetition safe: the same id with the same user, tokens and model is a
        ``duplicate``, which answers the row as it was first recorded. Without one, the id is a new time-ordered UUID.
        ``at`` is the time of the call, at most 5 minutes ahead of the clock; now if left out.

        Raises :class:`UsageConflictError` when the id is recorded with another user, model or number of tokens, and
        :class:`UserNotFoundError`.
        """
        row = _checked("", now=self._now(), user_id=user_id, tokens=tokens, model=model, id=id, at=at)
        there = (await self._write([row])).get(row.id)
        return UsageRecord(
            id=row.id,
            user_id=row.user_id,
            tokens=row.tokens,
            model=row.model,
            at=row.at if there is None else from_db(there["created_at"]),
            duplicate=there is not None and row.is_given,
        )

    async def record_many(self, entries: Iterable[UsageEntry | Mapping[str, object]]) -> RecordedUsage:
        """Record many calls in one transaction, all of them or none, and return how many were new.

        An entry is a :class:`UsageEntry` or a mapping with the names of :meth:`record`. An id that comes twice counts
        once. Raises as :meth:`record`; an error's ``field`` names the entry, such as ``entries[3].tokens``.
        """
        now = self._now()
        if not isinstance(entries, Iterable):
            raise InvalidInputError("entries", f"it is a {type(entries).__name__}", "an iterable of entries")
        rows: dict[str, _Row] = {}
        count = 0
        for number, entry in enumerate(entries):
            row = _read(f"entries[{number}]", entry, now)
            if rows.setdefault(row.id, row).content != row.content:
                raise UsageConflictError(row.id)
            count += 1
        there = await self._write(sorted(rows.values(), key=lambda row: row.id)) if rows else {}
        inserted = sum(1 for row in rows.values() if row.id not in there or not row.is_given)
        return RecordedUsage(inserted=inserted, duplicates=count - inserted)

    async def _write(self, rows: Sequence[_Row]) -> dict[str, asyncpg.Record]:
        """Insert rows whose ids differ and ascend, all or none, and return by id those that were there already."""

        async def unit() -> dict[str, asyncpg.Record]:
            if len(rows) == 1 and not self._engine.in_transaction():
                return await self._insert(rows)
            there: dict[str, asyncpg.Record] = {}
            async with self._engine.transaction():
                for start in range(0, len(rows), _BATCH):
                    there |= await self._insert(rows[start : start + _BATCH])
            return there

        return await self._engine.retry(unit, idempotent=True)

    async def _insert(self, rows: Sequence[_Row]) -> dict[str, asyncpg.Record]:
        there: dict[str, asyncpg.Record] = {}
        for _ in range(_ROUNDS):
            new = {row["id"] for row in await self._engine.fetch(_SQL["insert"], *_columns(rows))}
            taken = [row for row in rows if row.id not in new]
            if not taken:
                return there
            found = {row["id"]: row for row in await self._engine.fetch(_SQL["recorded"], [row.id for row in taken])}
            for row in taken:
                if row.id in found and row.content != _content(found[row.id]):
                    raise UsageConflictError(row.id)
            there |= found
            # A row that was deleted between the two statements is free to be written again.
            rows = [row for row in taken if row.id not in found]
            if not rows:
                return there
        raise DatabaseError("usage rows can be neither inserted nor read; may this role see every row of the table?")

    # -- reading ------------------------------------------------------------------------------------------------

    async def total(
        self,
        user_id: str,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        model: str | None = None,
    ) -> int:
        """Return a user's tokens in a window, of one model or of all."""
        label("user_id", user_id)
        if model is not None:
            label("model", model)
        chosen = window(since=since, until=until, now=self._now())
        rows = await self._fetch("total", user_id, *_bounds(chosen), model)
        return int(rows[0]["tokens"])

    async def breakdown(
        self,
        user_id: str,
        *,
        by: Dimension = "day",
        since: datetime | None = None,
        until: datetime | None = None,
        tz: str = "UTC",
        fill: bool = False,
    ) -> list[UsageBucket]:
        """Return a user's tokens and calls by ``"hour"``, ``"day"``, ``"month"`` or ``"model"``.

        Hours, days and months are those of the clocks of ``tz``, an IANA name, cut at the window's edges, in the order
        of time; without ``until`` the last bucket is open. Those without a call are left out unless ``fill`` asks for
        them. More than 10,000 are refused. Models come with the largest sum first.
        """
        label("user_id", user_id)
        grain, zone, now = dimension("by", by), time_zone("tz", tz), self._now()
        fill = flag("fill", fill)
        chosen = window(since=since, until=until, now=now)
        if grain == "model":
            rows = await self._fetch("by_model", user_id, *_bounds(chosen))
            return [_bucket(chosen.since, chosen.until, row["model"], row) for row in rows]
        starts = bucket_starts(chosen, by=grain, zone=zone, now=now)
        if not starts:
            return []
        rows = await self._fetch("by_time", user_id, *_bounds(chosen), [to_db(start) for start in starts])
        used = {row["bucket"]: row for row in rows}
        return [
            _bucket(start, end, None, used.get(number))
            for number, (start, end) in enumerate(pairwise([*starts, chosen.until]), start=1)
            if start is not None and (fill or number in used)
        ]

    async def top_users(
        self, *, since: datetime | None = None, until: datetime | None = None, limit: int = 20
    ) -> list[TopUser]:
        """Return the users with the most tokens in a window, most first; ``limit`` is 1 to 1,000."""
        whole_number("limit", limit, min=1, max=1000)
        chosen = window(since=since, until=until, now=self._now())
        rows = await self._fetch("top_users", *_bounds(chosen), limit)
        return [TopUser(user_id=row["user_id"], tokens=row["tokens"], calls=row["calls"]) for row in rows]

    async def _fetch(self, name: str, *arguments: object) -> list[asyncpg.Record]:
        return await self._engine.retry(lambda: self._engine.fetch(_SQL[name], *arguments), idempotent=True)

    def _now(self) -> datetime:
        return self._clock().astimezone(UTC)


def _checked(
    prefix: str, *, now: datetime, user_id: object, tokens: object, model: object, id: object = None, at: object = None
) -> _Row:
    """Check a call's values; ``prefix`` stands before their names in an error."""
    when = now if at is None else instant(f"{prefix}at", at)
    if when > now + FUTURE_LIMIT:
        raise InvalidInputError(f"{prefix}at", "it is in the future", "a time at most 5 minutes ahead of the clock")
    return _Row(
        user_id=label(f"{prefix}user_id", user_id),
        tokens=whole_number(f"{prefix}tokens", tokens),
        model=label(f"{prefix}model", model),
        id=new_usage_id(now) if id is None else label(f"{prefix}id", id),
        at=when,
        is_given=id is not None,
    )


def _read(field: str, entry: object, now: datetime) -> _Row:
    """Read an entry of ``record_many``."""
    values = dict(entry) if isinstance(entry, BaseModel | Mapping) else None
    if values is None:
        raise InvalidInputError(
            field, f"it is a {type(entry).__name__}", "a UsageEntry or a mapping with record's names"
        )
    if not values.keys() <= _NAMES:
        raise InvalidInputError(field, "it has a name that record does not know", ", ".join(sorted(_NAMES)))
    for name in _REQUIRED:
        if name not in values:
            raise InvalidInputError(f"{field}.{name}", "it is missing", "a value")
    return _checked(f"{field}.", now=now, **values)


def _columns(rows: Sequence[_Row]) -> tuple[list[str], list[str], list[int], list[str], list[datetime]]:
    return (
        [row.id for row in rows],
        [row.user_id for row in rows],
        [row.tokens for row in rows],
        [row.model for row in rows],
        [to_db(row.at) for row in rows],
    )


def _content(row: asyncpg.Record) -> tuple[object, ...]:
    return (row["user_id"], row["tokens_used"], row["model"])


def _bounds(window: Window) -> tuple[datetime, datetime | None]:
    return to_db(window.since), None if window.until is None else to_db(window.until)


def _bucket(start: datetime, end: datetime | None, model: str | None, row: asyncpg.Record | None) -> UsageBucket:
    tokens, calls = (0, 0) if row is None else (row["tokens"], row["calls"])
    return UsageBucket(start=start, end=end, model=model, tokens=tokens, calls=calls)
