"""How calls reach the provider that bills them, each once.

Rows of the outbox are leased in a transaction that is committed before anything is sent, so that nothing waits for the
provider with a lock in its hand. They are deleted after the provider has accepted them. Whoever dies between the two
leaves rows that are due again when the lease ends; the provider knows them by their id and ignores them.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import anyio
import asyncpg
from pydantic import SecretStr

from kitrocket.clock import Clock, from_db, to_db
from kitrocket.engine import Engine
from kitrocket.errors import ConfigurationError, ProviderError, TransactionError
from kitrocket.models import ExportBacklog, ExportResult, ParkedExport
from kitrocket.sql import statements

if TYPE_CHECKING:
    from dodopayments.types.event_input_param import EventInputParam

    from kitrocket.dodo.ingest import Ingest

#: The most rows that one claim takes, which is the most events that one call takes.
_BATCH = 1_000
#: How long claimed rows are nobody else's, and how long after the claim a call may still begin: it takes 20 s at most.
_LEASE, _LAST_CALL = timedelta(seconds=60), 35.0
#: Older calls are not sent as they are: the provider refuses what is an hour old when it arrives.
_LATE_AFTER = timedelta(minutes=55)
#: When a user who is no customer yet is looked at again.
_NO_CUSTOMER = timedelta(minutes=5)
#: The shortest and the longest pause after a failure, and the longest that the provider may ask for, in seconds.
_FIRST_PAUSE, _LONGEST_PAUSE, _LONGEST_WANTED = 1.0, 60.0, 600.0
#: How long to wait before each further attempt to delete what was locked, in seconds.
_FORGET_PAUSES = (0.02, 0.05, 0.1, 0.2, 0.4)

_SQL = statements("export")
_log = logging.getLogger("kitrocket.usage")


@dataclass
class _Counts:
    sent: int = 0
    parked: int = 0
    dropped: int = 0
    waiting: int = 0
    postponed: int = 0
    requests: int = 0


class Exporter:
    """Sends what is in the outbox. ``event`` is the events' name at the provider; ``late`` as in the settings.

    Any number of processes may do so at once. After a failure one pauses, longer each time.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        clock: Clock,
        event: str | None,
        late: Literal["restamp", "park"],
        api_key: str | SecretStr | None,
        base_url: str | SecretStr | None,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._event = event
        self._late = late
        self._api_key = api_key
        self._base_url = base_url
        self._failures = 0
        self._resume_at: datetime | None = None

    async def export(self, *, budget: timedelta | None, on_progress: Callable[[int], object] | None) -> ExportResult:
        """Send everything that is due, until the provider wants a pause or the budget is spent."""
        if self._engine.in_transaction():
            raise TransactionError("usage.export commits before it sends, so it cannot run inside a transaction")
        if self._event is None or self._api_key is None:
            raise ConfigurationError(
                "exporting usage needs KITROCKET_USAGE_EXPORT_EVENT, the events' name, and DODO_PAYMENTS_API_KEY"
            )
        from kitrocket.dodo.ingest import Ingest  # only here: it needs the extra

        counts, more = _Counts(), False
        give_up_at = None if budget is None else anyio.current_time() + budget.total_seconds()
        async with AsyncExitStack() as stack:
            ingest: Ingest | None = None
            while not more:
                now = self._clock().astimezone(UTC)
                if self._resume_at is not None and now < self._resume_at:
                    break
                rows = await self._claim(now)
                if not rows:
                    break
                last_call = anyio.current_time() + _LAST_CALL
                if sendable := await self._sort_out(rows, now, counts):
                    if ingest is None:
                        ingest = Ingest(api_key=self._api_key, base_url=self._base_url)
                        await stack.enter_async_context(ingest)
                    await self._send(ingest, sendable, now, last_call, counts)
                if on_progress is not None:
                    on_progress(counts.sent + counts.parked + counts.dropped + counts.waiting)
                more = give_up_at is not None and anyio.current_time() >= give_up_at
        return ExportResult(**vars(counts), more=more, retry_at=self._resume_at)

    async def backlog(self) -> ExportBacklog:
        """Count what the provider does not have yet."""
        row = await self._engine.fetchrow(_SQL["backlog"])
        assert row is not None
        oldest = row["oldest"]
        return ExportBacklog(
            pending=row["pending"],
            waiting=row["waiting"],
            parked=row["parked"],
            oldest_at=None if oldest is None else from_db(oldest),
        )

    async def parked(self, limit: int) -> list[ParkedExport]:
        """Return what the provider refused, the oldest first."""
        return [
            ParkedExport(
                usage_id=row["usage_id"],
                user_id=row["user_id"],
                at=from_db(row["created_at"]),
                attempts=row["attempts"],
                error=row["error"],
            )
            for row in await self._engine.fetch(_SQL["parked"], limit)
        ]

    async def unpark(self) -> int:
        """Make what is parked due again, and return how many rows that are."""
        return int(await self._engine.fetchval(_SQL["unpark"], to_db(self._clock())))

    async def _claim(self, now: datetime) -> list[asyncpg.Record]:
        return await self._engine.fetch(_SQL["claim"], to_db(now), to_db(now + _LEASE), _BATCH)

    async def _sort_out(self, rows: Sequence[asyncpg.Record], now: datetime, counts: _Counts) -> list[asyncpg.Record]:
        """Settle what cannot be sent now, and return the rest."""
        late = to_db(now - _LATE_AFTER)
        gone, waiting, parked, sendable = [], [], [], []
        for row in rows:
            if row["tokens"] is None:
                gone.append(row)
            elif self._late == "park" and row["created_at"] < late:
                parked.append(row)
            elif row["customer_id"] is None:
                waiting.append(row)
            else:
                sendable.append(row)
        if gone:
            await self._forget(gone)
        if waiting:
            await self._engine.fetch(_SQL["postpone"], *_held(waiting), to_db(now + _NO_CUSTOMER), "no customer")
        if parked:
            await self._park(parked, "late", counts)
        counts.dropped += len(gone)
        counts.waiting += len(waiting)
        return sendable

    async def _send(
        self, ingest: Ingest, rows: Sequence[asyncpg.Record], now: datetime, last_call: float, counts: _Counts
    ) -> None:
        """Send claimed rows; where the provider refuses some, halve them until the one to blame is alone.

        What is left when the lease is about to end comes due with it.
        """
        parts = [rows]
        while parts and anyio.current_time() < last_call:
            part = parts.pop()
            counts.requests += 1
            try:
                answer = await ingest.send([self._as_event(row, now) for row in part])
            except ProviderError as error:
                reason = "failed" if error.status_code is None else f"HTTP {error.status_code}"
                await self._pause([part, *parts], _LONGEST_PAUSE, reason, counts)
                raise
            if answer.kind == "taken":
                self._failures, self._resume_at = 0, None
                await self._forget(part)
                counts.sent += len(part)
            elif answer.kind == "later":
                self._failures += 1
                pause = min(_FIRST_PAUSE * 2**self._failures, _LONGEST_PAUSE) * random.uniform(0.5, 1)  # noqa: S311 - jitter is no secret
                wanted = min(answer.retry_after or 0.0, _LONGEST_WANTED)
                await self._pause([part, *parts], max(pause, wanted), answer.reason, counts)
                return
            elif len(part) == 1:
                await self._park(part, answer.reason, counts)
            else:
                middle = (len(part) + 1) // 2
                parts += [part[middle:], part[:middle]]

    async def _forget(self, rows: Sequence[asyncpg.Record]) -> None:
        """Delete rows. Those that stay locked come due with their lease, and the provider ignores them then."""
        left = set(_ids(rows))
        for pause in _FORGET_PAUSES:
            delete = partial(self._engine.fetch, _SQL["forget"], list(left))
            left -= {row["usage_id"] for row in await self._engine.retry(delete, idempotent=True)}
            if not left:
                return
            # A claim that began before ours looks at the same rows, and holds them until it ends.
            await anyio.sleep(pause)

    def _as_event(self, row: asyncpg.Record, now: datetime) -> EventInputParam:
        at = from_db(row["created_at"])
        metadata: dict[str, Any] = {"tokens": row["tokens"], "model": row["model"]}
        if at < now - _LATE_AFTER:
            metadata["recorded_at"] = at.isoformat()
            at = now
        assert self._event is not None
        return {
            "event_id": row["usage_id"],
            "customer_id": row["customer_id"],
            "event_name": self._event,
            "timestamp": at.isoformat(),
            "metadata": metadata,
        }

    async def _pause(
        self, parts: Sequence[Sequence[asyncpg.Record]], seconds: float, reason: str, counts: _Counts
    ) -> None:
        """Send nothing for a while."""
        rows = [row for part in parts for row in part]
        # Read again, since the provider may have taken its time.
        self._resume_at = self._clock().astimezone(UTC) + timedelta(seconds=seconds)
        counts.postponed += len(rows)
        await self._engine.fetch(_SQL["postpone"], *_held(rows), to_db(self._resume_at), reason)
        _log.warning("usage is not exported for %.0f s: %s", seconds, reason)

    async def _park(self, rows: Sequence[asyncpg.Record], reason: str, counts: _Counts) -> None:
        await self._engine.fetch(_SQL["park"], *_held(rows), reason)
        counts.parked += len(rows)
        _log.error("%d call(s) are not exported, the first is %s: %s", len(rows), rows[0]["usage_id"], reason)


def _ids(rows: Sequence[asyncpg.Record]) -> list[str]:
    return [row["usage_id"] for row in rows]


def _held(rows: Sequence[asyncpg.Record]) -> tuple[list[str], list[int]]:
    return _ids(rows), [row["attempts"] for row in rows]
