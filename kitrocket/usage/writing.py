"""How calls become rows: one statement a batch, the primary key the only thing that knows a repetition."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

import asyncpg

from kitrocket.clock import to_db
from kitrocket.engine import Engine
from kitrocket.errors import DatabaseError, InvalidInputError, UsageConflictError
from kitrocket.sql import statements
from kitrocket.usage.calls import COLUMNS, Call, rows_of

#: How many rows one statement inserts; a longer list takes several, in one transaction.
_BATCH = 50_000
#: From how many rows on COPY is tried first: below, what it saves is less than what a repetition loses by it.
_COPY_FROM = 500
#: How often a batch is tried whose ids are taken but whose rows are gone before they can be read.
_ROUNDS = 5

_SQL = statements("usage")
_ROLLUP = statements("rollup")
_QUOTAS = statements("quotas")


class Source(Protocol):
    """What runs a statement: the engine, or a connection held for it."""

    async def fetch(self, sql: str, *arguments: Any) -> list[asyncpg.Record]:
        """Run a statement and return its rows."""
        ...


class Writer:
    """Writes calls whose ids differ and ascend."""

    def __init__(self, engine: Engine, *, rollup: bool) -> None:
        self._engine = engine
        self._rollup = rollup

    async def write(self, calls: Sequence[Call]) -> dict[str, asyncpg.Record]:
        """Insert all calls or none, and return by id the rows that were there already.

        In the running task's transaction if it has one. Raises :class:`UsageConflictError`,
        :class:`UserNotFoundError`, and :class:`InvalidInputError` for a call in a pruned day.
        """

        async def unit() -> dict[str, asyncpg.Record]:
            if not self._engine.in_transaction() and not self._is_more_than_an_insert(calls):
                if len(calls) == 1:
                    return await self._insert_or_refuse(calls)
                if await self._copy(calls):
                    return {}
            there: dict[str, asyncpg.Record] = {}
            async with self._engine.transaction():
                await self._refuse_pruned(calls)
                for start in range(0, len(calls), _BATCH):
                    there |= await self._insert_or_refuse(calls[start : start + _BATCH])
                await self._forget_reservations(calls)
            return there

        return await self._engine.retry(unit, idempotent=True)

    async def flush(self, lane: Source, calls: Sequence[Call]) -> dict[str, asyncpg.Record]:
        """Insert what is new in one transaction of its own, and return as :meth:`insert`.

        Raises :class:`InvalidInputError` when a call lies in a day whose single rows were pruned.
        """
        if self._is_more_than_an_insert(calls):
            async with self._engine.transaction():
                await self._refuse_pruned(calls)
                there = await self.insert(self._engine, calls)
                await self._forget_reservations(calls)
                return there
        if not any(call.is_given for call in calls):
            try:
                await _insert(lane, calls, "insert_new_one", "insert_new")
            except asyncpg.UniqueViolationError:
                pass  # nobody can know these ids, but the answer to an earlier attempt was lost
            else:
                return {}
        return await self.insert(lane, calls)

    def _is_more_than_an_insert(self, calls: Sequence[Call]) -> bool:
        return any(call.settles or (call.is_late and self._rollup) for call in calls)

    async def _forget_reservations(self, calls: Sequence[Call]) -> None:
        """Delete the reservations of calls, after their rows: a user who is being deleted is waited for there."""
        settled = [call.id for call in calls if call.settles]
        if settled:
            await self._engine.fetch(_QUOTAS["forget"], settled)

    def _may_be_pruned(self, calls: Sequence[Call]) -> bool:
        return self._rollup and any(call.is_late for call in calls)

    async def _refuse_pruned(self, calls: Sequence[Call]) -> None:
        """Keep a call out of a pruned day: the ids that would prove it a repetition are gone."""
        if not self._may_be_pruned(calls):
            return
        floor = await self._engine.fetchval(_ROLLUP["floor_held"])
        for call in calls:
            if floor is not None and call.is_late and to_db(call.at).date() < floor:
                raise InvalidInputError(
                    f"{call.prefix}at", "it lies in a day whose single calls were pruned", f"a time from {floor} on"
                )

    async def _insert_or_refuse(self, calls: Sequence[Call]) -> dict[str, asyncpg.Record]:
        there = await self.insert(self._engine, calls)
        for call in calls:
            if call.id in there and not call.is_recorded_as(there[call.id]):
                raise UsageConflictError(call.id)
        return there

    async def _copy(self, calls: Sequence[Call]) -> bool:
        """Insert all calls by COPY, and return whether that was possible: else nothing is written.

        A list whose ids are known is found out at its first row, since ids ascend.
        """
        if not _COPY_FROM <= len(calls) <= _BATCH or self._engine.pooler:
            return False
        try:
            await self._engine.copy("usage", COLUMNS, rows_of(calls))
        except (asyncpg.UniqueViolationError, asyncpg.FeatureNotSupportedError):
            return False
        return True

    async def insert(self, source: Source, calls: Sequence[Call]) -> dict[str, asyncpg.Record]:
        """Insert what is new, in one statement, and return by id the rows that were there already.

        They may be other calls with the same id. Outside of a transaction the insert is committed when this returns.
        """
        there: dict[str, asyncpg.Record] = {}
        for _ in range(_ROUNDS):
            rows = await _insert(source, calls, "insert_one", "insert")
            new = {row["id"] for row in rows}
            taken = [call for call in calls if call.id not in new]
            if not taken:
                return there
            there |= {row["id"]: row for row in await source.fetch(_SQL["recorded"], [call.id for call in taken])}
            # A row that was deleted between the two statements is free to be written again.
            calls = [call for call in taken if call.id not in there]
            if not calls:
                return there
        raise DatabaseError("usage rows can be neither inserted nor read; may this role see every row of the table?")


def _insert(source: Source, calls: Sequence[Call], one: str, many: str) -> Awaitable[list[asyncpg.Record]]:
    """Run the statement for one call or that for many."""
    if len(calls) == 1:
        return source.fetch(_SQL[one], *next(rows_of(calls)))
    return source.fetch(_SQL[many], *zip(*rows_of(calls), strict=True))
