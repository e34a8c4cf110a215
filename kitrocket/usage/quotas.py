"""Reservations: under a lock of the user's own, so that racing calls never pass a limit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from weakref import WeakValueDictionary

import anyio

from kitrocket.clock import from_db, to_db
from kitrocket.engine import Engine
from kitrocket.errors import TransactionError, UsageConflictError, UserNotFoundError
from kitrocket.models import Decision, Limit, UsageAlert
from kitrocket.sql import statements
from kitrocket.usage.limits import Quota, quotas
from kitrocket.usage.sums import Sums, refuse_cut_days
from kitrocket.usage.thresholds import Seen, Thresholds, Watch
from kitrocket.windows import Window

_SQL = statements("quotas")
_USAGE = statements("usage")
_SECOND = timedelta(seconds=1)
#: When a reservation expires, and how many tokens it holds.
_Held = tuple[datetime, int]


@dataclass(frozen=True, slots=True)
class Reservation:
    """Tokens to set aside. Its id is fixed before the first attempt; ``is_given`` says that it is the caller's."""

    id: str
    user_id: str
    model: str
    tokens: int
    ttl: timedelta
    is_given: bool


@dataclass(frozen=True, slots=True)
class _Counted:
    """What was found under the lock: a sum and the newest call for each limit, and what others have reserved."""

    used: list[int]
    newest: list[datetime | None]
    others: int
    allowed: bool
    alerts: list[UsageAlert]


class Quotas:
    """Admits what fits. ``rollup`` says whether whole days are summed from the rollup."""

    def __init__(self, engine: Engine, sums: Sums, thresholds: Thresholds, *, rollup: bool) -> None:
        self._engine = engine
        self._sums = sums
        self._thresholds = thresholds
        self._rollup = rollup
        #: Whoever of this process waits for a user's lock waits here, and not with a connection of the pool.
        self._turns: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()

    async def reserve(
        self, wanted: Reservation, limits: Sequence[Limit], percents: Sequence[int], *, now: datetime
    ) -> Decision:
        """Set tokens aside where they fit into every limit, in a short transaction of its own.

        Raises :class:`TransactionError` inside a transaction, which would keep the lock, :class:`UserNotFoundError`,
        :class:`UsageConflictError` for the id of another call, :class:`NoBillingPeriodError` and
        :class:`WindowNotExactError`.
        """
        if self._engine.in_transaction():
            raise TransactionError("tokens are reserved under a lock, so they cannot be inside a transaction")
        asked = await quotas(self._sums, wanted.user_id, limits, now)
        async with self._turns.setdefault(wanted.user_id, anyio.Lock()):
            counted = await self._engine.retry(
                lambda: self._admit(wanted, asked, limits, percents, now), idempotent=True
            )
        decision = await self._decide(wanted, asked, counted, now)
        crossed = await self._thresholds.tell(counted.alerts)
        return decision.model_copy(update={"crossed": crossed}) if crossed else decision

    async def used(self, user_id: str, asked: Sequence[Quota]) -> list[tuple[int, datetime | None]]:
        """Return for each limit what calls have used of it, and when the newest of them was made."""
        found = []
        for quota in asked:
            name = "used_rolled" if self._rollup else "used"
            [row] = await self._engine.fetch(_SQL[name], user_id, to_db(quota.since))
            if self._rollup:
                refuse_cut_days(Window(quota.since, None), row["raw_from"])
            found.append((row["tokens"], row["newest"]))
        return found

    async def _admit(
        self,
        wanted: Reservation,
        asked: Sequence[Quota],
        limits: Sequence[Limit],
        percents: Sequence[int],
        now: datetime,
    ) -> _Counted:
        user_id, alerts = wanted.user_id, list[UsageAlert]()
        watch = Watch(limits=list(limits), percents=list(percents)).model_dump_json() if percents else None
        async with self._engine.transaction(read_committed=True) as transaction:
            if await self._engine.fetchval(_SQL["lock"], user_id, to_db(now)) is None:
                raise UserNotFoundError(user_id)
            seen = await self._thresholds.seen(user_id, asked) if percents else Seen({})
            counted = await self.used(user_id, asked)
            used = [tokens for tokens, _ in counted]
            if wanted.is_given and await self._engine.fetch(_USAGE["recorded"], [wanted.id]):
                raise UsageConflictError(wanted.id)
            [row] = await self._engine.fetch(
                _SQL["admit"],
                wanted.id,
                user_id,
                wanted.model,
                wanted.tokens,
                to_db(now),
                to_db(now + wanted.ttl),
                min(quota.tokens - some for quota, some in zip(asked, used, strict=True)),
                watch,
            )
            if row["fits"] and not row["admitted"]:
                raise UsageConflictError(wanted.id)
            if percents:
                alerts = await self._thresholds.note(user_id, asked, used, percents, seen=seen, now=now)
            elif not row["fits"]:
                # Nothing is to be kept, and whoever waits for the lock need not wait for the disk.
                await transaction.rollback()
        return _Counted(used, [newest for _, newest in counted], row["others"], row["fits"], alerts)

    async def _decide(self, wanted: Reservation, asked: Sequence[Quota], counted: _Counted, now: datetime) -> Decision:
        reserved = counted.others + (wanted.tokens if counted.allowed else 0)
        left = [quota.tokens - some - reserved for quota, some in zip(asked, counted.used, strict=True)]
        number, retry_after = min(range(len(asked)), key=left.__getitem__), 0 if counted.allowed else None
        if not counted.allowed:
            rows = await self._engine.fetch(_SQL["held"], wanted.user_id, to_db(now), wanted.id)
            held = [(from_db(row["expires_at"]), int(row["tokens"])) for row in rows]
            waits = [
                (await self._wait(wanted, quota, counted.used[index], reserved, held, now), index)
                for index, quota in enumerate(asked)
                if left[index] < wanted.tokens
            ]
            retry_after, number = max(waits, key=lambda wait: (wait[0] is None, wait[0] or 0, -wait[1]))
        return Decision(
            allowed=counted.allowed,
            id=wanted.id if counted.allowed else None,
            limit=asked[number].tokens,
            window=asked[number].window,
            used=counted.used[number],
            reserved=reserved,
            remaining=max(0, left[number]),
            reset_at=_reset_at(asked[number], counted.newest[number], now),
            retry_after=retry_after,
            crossed=[],
        )

    async def _wait(
        self,
        wanted: Reservation,
        quota: Quota,
        used: int,
        reserved: int,
        held: Sequence[_Held],
        now: datetime,
    ) -> int | None:
        """Return in how many seconds the tokens fit into a limit into which they don't fit now."""
        if wanted.tokens > quota.tokens:
            return None
        surplus = used + reserved + wanted.tokens - quota.tokens
        at = await (
            self._fits_in_period(wanted, quota, surplus, held, now)
            if quota.reach is None
            else self._fits_in_window(wanted, quota.since, quota.reach, used, surplus, held)
        )
        return None if at is None else max(1, -((now - at) // _SECOND))

    async def _fits_in_window(
        self, wanted: Reservation, since: datetime, reach: timedelta, used: int, surplus: int, held: Sequence[_Held]
    ) -> datetime:
        leaving = [(at - reach, tokens) for at, tokens in held]
        call = await self._engine.fetchrow(
            _SQL["leaves_at"],
            wanted.user_id,
            to_db(since),
            [to_db(at) for at, _ in leaving],
            [tokens for _, tokens in leaving],
            surplus,
        )
        at, gone = (None, used) if call is None else (from_db(call["at"]), int(call["before"]))
        for expires_at, tokens in leaving:
            gone += tokens
            if gone >= surplus and (at is None or expires_at < at):
                return expires_at + reach
        # Without one, a call that was counted has ended with less than it reserved: it is worth a try at once.
        return (since if at is None else at) + reach

    async def _fits_in_period(
        self, wanted: Reservation, quota: Quota, surplus: int, held: Sequence[_Held], now: datetime
    ) -> datetime | None:
        leaving = list(held)
        if quota.until is not None and quota.until > now:
            window = Window(quota.since, quota.until)
            leaving.append((quota.until, await self._sums.total(wanted.user_id, window, None)))
        for at, tokens in sorted(leaving):
            surplus -= tokens
            if surplus <= 0:
                return at
        return None


def _reset_at(quota: Quota, newest: datetime | None, now: datetime) -> datetime | None:
    if quota.reach is not None:
        return None if newest is None else from_db(newest) + quota.reach
    return quota.until if quota.until is not None and quota.until > now else None
