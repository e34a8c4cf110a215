"""Compare what is known here with what the provider says, and take over what differs, without losing to a webhook."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import asyncpg
from pydantic import ValidationError

from kitrocket.clock import Clock, to_db
from kitrocket.dodo.events import PaymentState, SubscriptionSnapshot
from kitrocket.engine import Engine
from kitrocket.errors import DatabaseUnavailableError, KitRocketError, ProviderError
from kitrocket.models import Difference, ReconcileResult
from kitrocket.sql import statements
from kitrocket.subscriptions.applying import Applier
from kitrocket.subscriptions.mirror import Mirrored

if TYPE_CHECKING:
    from kitrocket.subscriptions.provider import Provider

_SQL = statements("subscriptions")
_log = logging.getLogger("kitrocket.subscriptions")

#: A pass ends when the provider or the database was away so many times in a row.
_AWAY_MOST = 5


@dataclass
class _Counts:
    checked: int = 0
    fetched: int = 0
    changed: int = 0
    raced: int = 0
    gone: int = 0
    failed: int = 0
    differences: list[Difference] = field(default_factory=list)


class Reconciliation:
    """One pass over the provider's subscriptions. With ``dry_run`` nothing is written.

    ``write`` runs a unit of work in a transaction of its own, again after a transient error.
    """

    def __init__(
        self,
        engine: Engine,
        applier: Applier,
        provider: Provider,
        *,
        clock: Clock,
        write: Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]],
        dry_run: bool = False,
    ) -> None:
        self._engine = engine
        self._applier = applier
        self._provider = provider
        self._clock = clock
        self._write = write
        self._dry_run = dry_run
        self._counts = _Counts()
        self._away = 0

    async def run(self, on_progress: Callable[[int], object] | None) -> ReconcileResult:
        """Compare every subscription, then ask for what is known here alone, and for payments known by refunds."""
        from kitrocket.subscriptions.provider import PAGE_SIZE

        start = self._clock()
        seen: set[str] = set()
        number = 0
        while True:
            items = await self._provider.page(number, start)
            known = await self._versions([str(item.get("subscription_id")) for item in items])
            for item in items:
                await self._compare(item, known, seen)
            await self._close_drift(list(known))
            self._counts.checked += len(items)
            if on_progress is not None:
                on_progress(self._counts.checked)
            if len(items) < PAGE_SIZE:
                break
            number += 1
        for row in await self._engine.fetch(_SQL["snapshots_before"], to_db(start)):
            if row["subscription_id"] not in seen:
                await self.check(row["subscription_id"], row["version"])
        for row in await self._engine.fetch(_SQL["payments_unknown"]):
            await self._guarded(self._check_payment, row["payment_id"])
        return self.result()

    async def check(self, subscription_id: str, version: int) -> None:
        """Fetch a subscription and take over what differs, if nobody wrote its snapshot since ``version`` was read."""
        await self._guarded(self._check, subscription_id, version)

    def result(self) -> ReconcileResult:
        """Return what was done so far."""
        return ReconcileResult(**vars(self._counts), requests=self._provider.requests)

    async def _versions(self, ids: Sequence[str]) -> dict[str, asyncpg.Record]:
        rows = await self._engine.fetch(_SQL["snapshots"], ids)
        return {row["subscription_id"]: row for row in rows}

    async def _close_drift(self, ids: Sequence[str]) -> None:
        """Close the incidents of subscriptions that the provider knows after all."""
        if not self._dry_run:
            await self._engine.fetch(_SQL["close_drift"], ids, to_db(self._clock()))

    async def _compare(self, item: Mapping[str, Any], rows: Mapping[str, asyncpg.Record], seen: set[str]) -> None:
        try:
            state = SubscriptionSnapshot.model_validate(item)
        except ValidationError:
            self._fail(str(item.get("subscription_id"))[:255], "unreadable")
            return
        seen.add(state.subscription_id)
        row = rows.get(state.subscription_id)
        known = None if row is None else Mirrored.from_row(row)
        if known is None or await self._applier.compare(known, state, item):
            await self.check(state.subscription_id, known.version if known else 0)
        elif known.needs_check and not self._dry_run:
            await self._guarded(self._agree, state.subscription_id, known.version)

    async def _agree(self, subscription_id: str, version: int) -> None:
        agreed = await self._write(partial(self._applier.note_agreed, subscription_id, version, self._clock()))
        self._counts.raced += not agreed

    async def _check(self, subscription_id: str, version: int) -> None:
        found = await self._provider.subscription(subscription_id)
        self._counts.fetched += 1
        now = self._clock()
        if found is None:
            if not self._dry_run and not await self._write(
                partial(self._applier.note_gone, subscription_id, version, now)
            ):
                self._counts.raced += 1
                return
            self._counts.gone += 1
            self._counts.differences.append(
                Difference(subscription_id=subscription_id, field="subscription_id", ours=subscription_id, theirs=None)
            )
            return
        await self._close_drift([subscription_id])
        state = SubscriptionSnapshot.model_validate(found)
        problem = self._applier.problem_with(state)
        if problem is not None:
            # The unknown never downgrades.
            self._fail(subscription_id, problem)
            return
        if self._dry_run:
            row = (await self._versions([subscription_id])).get(subscription_id)
            known = None if row is None else Mirrored.from_row(row)
            self._counts.differences += await self._applier.compare(known, state, found)
            return
        changes = await self._write(partial(self._applier.adopt, state, found, version, now))
        if changes is None:
            self._counts.raced += 1
            return
        self._counts.differences += changes
        self._counts.changed += bool(changes)

    async def _check_payment(self, payment_id: str) -> None:
        found = await self._provider.payment(payment_id)
        self._counts.fetched += 1
        if found is None or self._dry_run:
            return
        state = PaymentState.model_validate(found)
        await self._write(partial(self._applier.adopt_payment, state, self._clock()))
        self._counts.changed += 1

    async def _guarded(self, step: Callable[..., Any], *arguments: object) -> None:
        """Take a step of the pass; one that fails is logged and counted, and the pass goes on.

        Not when nobody answers any more, or the key was withdrawn meanwhile.
        """
        try:
            await step(*arguments)
        except (KitRocketError, ValidationError, asyncpg.PostgresError) as error:
            # Only the text of our own errors: the others' may quote what the provider answered.
            self._fail(str(arguments[0]), str(error) if isinstance(error, KitRocketError) else type(error).__name__)
            self._away = self._away + 1 if _is_away(error) else 0
            if self._away == _AWAY_MOST or (isinstance(error, ProviderError) and error.status_code in (401, 403)):
                raise
        else:
            self._away = 0

    def _fail(self, id: str, problem: str) -> None:
        self._counts.failed += 1
        _log.warning("%s could not be checked: %s", id, problem)


def _is_away(error: Exception) -> bool:
    if isinstance(error, ProviderError):
        return error.status_code is None or error.status_code >= 500
    return isinstance(error, DatabaseUnavailableError)
