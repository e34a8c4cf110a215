"""The service of AI token usage."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import partial
from itertools import pairwise
from os import PathLike
from typing import Literal, TypeVar

import anyio
import asyncpg
from pydantic import SecretStr

from kitrocket.clock import Clock, from_db, utc_now
from kitrocket.engine import Engine
from kitrocket.errors import ConfigurationError, InvalidInputError, TransactionError, UsageConflictError
from kitrocket.ids import new_usage_id
from kitrocket.inputs import duration, flag, instant, label, text, whole_number
from kitrocket.models import (
    CostReport,
    Decision,
    ExpiryResult,
    ExportBacklog,
    ExportResult,
    Limit,
    LimitWindow,
    ModelPrice,
    ParkedExport,
    Period,
    PricesSet,
    PruneResult,
    RebuildResult,
    RecordedUsage,
    SettledUsage,
    TopUser,
    UsageBucket,
    UsageEntry,
    UsageRecord,
    VerifyResult,
)
from kitrocket.usage.calls import Call, checked, read_all
from kitrocket.usage.exporting import Exporter
from kitrocket.usage.limits import checked_limits, checked_thresholds
from kitrocket.usage.metering import Meter, OpenMeters
from kitrocket.usage.price_entries import CURRENCY, checked_price, currency_code, day_of, read_file, read_prices
from kitrocket.usage.prices import Prices
from kitrocket.usage.quotas import Quotas, Reservation
from kitrocket.usage.recorder import Owner, Recorder
from kitrocket.usage.settling import LATE, Settler
from kitrocket.usage.sums import Sums
from kitrocket.usage.thresholds import OnThreshold, Thresholds
from kitrocket.usage.upkeep import count_before, midnight, prune, rebuild, verify
from kitrocket.usage.watching import Live, Watch
from kitrocket.usage.writing import Writer
from kitrocket.windows import (
    CostDimension,
    Dimension,
    Window,
    bucket_starts,
    cost_dimensions,
    dimension,
    month,
    time_zone,
    window,
)

#: The longest id of a reservation: that of what comes after its expiry is longer.
_RESERVATION_ID_MAX = 255 - len(LATE)
_TTL_MIN, _TTL_MAX = timedelta(seconds=1), timedelta(days=1)
_DAYS_30 = timedelta(days=30)

#: Makes the record, for less than its constructor costs.
_RECORD: Callable[[object], UsageRecord] = UsageRecord.__pydantic_validator__.validate_python

H = TypeVar("H", bound=OnThreshold)


class UsageService:
    """Records AI calls and sums them. A row is one call, its id the key that keeps it from being counted twice.

    Windows are ``since <= t < until``, timezone-aware, to the microsecond. Without ``until`` there is no upper bound;
    without ``since`` the window begins 30 times 24 hours before ``until`` or now. An unknown user has used nothing.
    Every method raises :class:`InvalidInputError` for bad input, before anything is written.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        clock: Clock = utc_now,
        queue_size: int = 10_000,
        linger: timedelta = timedelta(0),
        rollup: bool = True,
        live: bool = False,
        export_event: str | None = None,
        export_late: Literal["restamp", "park"] = "restamp",
        api_key: str | SecretStr | None = None,
        base_url: str | SecretStr | None = None,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._rollup = rollup
        self._sums = Sums(engine, rollup=rollup)
        self._prices = Prices(engine, rollup=rollup)
        self._writer = Writer(engine, rollup=rollup)
        self._live = Live(engine, is_on=live)
        self._recorder = Recorder(engine, self._writer, self._live, queue_size=queue_size, linger=linger)
        self._thresholds = Thresholds(engine)
        self._quotas = Quotas(engine, self._sums, self._thresholds, rollup=rollup)
        self._settler = Settler(
            engine,
            self._record,
            writer=self._writer,
            sums=self._sums,
            quotas=self._quotas,
            thresholds=self._thresholds,
        )
        self._meters = OpenMeters(engine)
        self._exporter = Exporter(
            engine, clock=clock, event=export_event, late=export_late, api_key=api_key, base_url=base_url
        )

    # -- recording ----------------------------------------------------------------------------------------------

    async def record(
        self, user_id: str, *, tokens: int, model: str, id: str | None = None, at: datetime | None = None
    ) -> UsageRecord:
        """Record one call and return it once it is committed; inside a transaction, the caller's commit counts.

        ``tokens`` is 0 to 2^31-1. ``id`` makes a repetition safe: the same id with the same user, tokens and model is a
        ``duplicate``, which answers the row as it was first recorded. Without one, the id is a new time-ordered UUID.
        ``at`` is the time of the call, at most 5 minutes ahead of the clock; now if left out.

        In a running kit, calls made at the same time share a commit, and one that is cancelled may still be recorded.

        Raises :class:`UsageConflictError` when the id is recorded with another user, model or number of tokens,
        :class:`UserNotFoundError`, and :class:`RecorderClosedError` after the kit was left.
        """
        call = checked(now=self._now(), user_id=user_id, tokens=tokens, model=model, id=id, at=at)
        there = await self._record(call)
        return _RECORD(
            {
                "id": call.id,
                "user_id": call.user_id,
                "tokens": call.tokens,
                "model": call.model,
                "at": call.at if there is None else from_db(there["created_at"]),
                "duplicate": there is not None and call.is_given,
            }
        )

    def _record(self, call: Call) -> Awaitable[asyncpg.Record | None]:
        """Write a call, with others where calls share commits, and return the row that was there already."""
        return self._recorder.record(call) if self._recorder.takes() else self._record_alone(call)

    async def _record_alone(self, call: Call) -> asyncpg.Record | None:
        there = await self._writer.write([call])
        await self._live.announce(self._engine, [call.user_id])
        return there.get(call.id)

    async def record_many(self, entries: Iterable[UsageEntry | Mapping[str, object]]) -> RecordedUsage:
        """Record many calls in one transaction, all of them or none, and return how many were new.

        An entry is a :class:`UsageEntry` or a mapping with the names of :meth:`record`. An id that comes twice counts
        once. Raises as :meth:`record`; an error's ``field`` names the entry, such as ``entries[3].tokens``.
        """
        now = self._now()
        if not isinstance(entries, Iterable):
            raise InvalidInputError("entries", f"it is a {type(entries).__name__}", "an iterable of entries")
        calls: dict[str, Call] = {}
        count = 0
        for call in read_all(entries, now):
            if not calls.setdefault(call.id, call).is_same_as(call):
                raise UsageConflictError(call.id)
            count += 1
        there = await self._writer.write([calls[id] for id in sorted(calls)]) if calls else {}
        if calls:
            await self._live.announce(self._engine, (call.user_id for call in calls.values()))
        inserted = sum(1 for call in calls.values() if call.id not in there or not call.is_given)
        return RecordedUsage(inserted=inserted, duplicates=count - inserted)

    def recording(self, owned: Owner) -> AbstractAsyncContextManager[None]:
        """Let calls of :meth:`record` made at the same time share a commit inside the block.

        ``owned`` runs the task that does it. Leaving the block refuses new calls and writes those that wait, for at
        most 5 seconds.
        """
        return self._recorder.open(owned)

    # -- quotas -------------------------------------------------------------------------------------------------

    async def reserve(
        self,
        user_id: str,
        *,
        tokens: int,
        model: str,
        limit: int | None = None,
        window: LimitWindow = _DAYS_30,
        limits: Iterable[Limit] = (),
        ttl: timedelta = timedelta(seconds=600),
        thresholds: Iterable[int] = (),
        id: str | None = None,
    ) -> Decision:
        """Set tokens aside for a call, if they fit into every limit beside what is used and reserved.

        ``limit`` is how many tokens calls may use in any ``window`` (1 s to 3,660 days), in the calendar ``"month"`` in
        UTC or in the ``"billing"`` period; ``limits`` are more of them. Racing calls of any number of processes never
        pass a limit together. After ``ttl`` (1 s to 1 day) the tokens are free again. The same ``id`` with the same
        values is admitted again and counts once. A call that is refused is a :class:`Decision` that says so.

        ``thresholds`` are percentages of what is used, looked at here and when the call is settled: see
        :meth:`on_threshold`.

        Raises :class:`TransactionError` inside a transaction, :class:`UserNotFoundError`, :class:`UsageConflictError`
        for an id of another call, :class:`NoBillingPeriodError`, and :class:`WindowNotExactError` for a window that
        begins in a pruned day.
        """
        now = self._now()
        checked = checked_limits(limit, window, limits)
        if not checked:
            raise InvalidInputError("limit", "there is none", "limit or limits")
        wanted = Reservation(
            new_usage_id(now) if id is None else _reservation_id(id),
            label("user_id", user_id),
            label("model", model),
            whole_number("tokens", tokens),
            duration("ttl", ttl, min=_TTL_MIN, max=_TTL_MAX),
            is_given=id is not None,
        )
        return await self._quotas.reserve(wanted, checked, checked_thresholds(thresholds), now=now)

    async def settle(self, id: str, *, used: int) -> SettledUsage:
        """Record what a reserved call used, as a call of the reservation's id made now, and give the rest back.

        What exceeds the reservation is recorded too and is the ``overrun``. Doing it twice counts once. Where the
        reservation expired and what it had used so far was recorded, the rest is added under the id + ``".late"``.

        Raises :class:`ReservationNotFoundError`, :class:`UsageConflictError` when the rest was another one before, and
        :class:`RecorderClosedError` after the kit was left.
        """
        return await self._settler.settle(_reservation_id(id), whole_number("used", used), now=self._now())

    async def release(self, id: str) -> bool:
        """Give back what was reserved for a call that used nothing, and return whether there was such a reservation."""
        return await self._settler.release(_reservation_id(id))

    def meter(
        self,
        user_id: str,
        *,
        model: str,
        reserve: int | None = None,
        limit: int | None = None,
        window: LimitWindow = _DAYS_30,
        limits: Iterable[Limit] = (),
        ttl: timedelta = timedelta(seconds=600),
        thresholds: Iterable[int] = (),
        id: str | None = None,
    ) -> Meter:
        """``async with kit.usage.meter(...) as meter:`` count a call's tokens, and record them however the block ends.

        With a limit ``reserve`` tokens are reserved on entry, as by :meth:`reserve` and with its arguments; a running
        kit keeps the reservation alive. Without one nothing is reserved. An exception, and cancellation too, pass on
        once the count is recorded, which takes at most 5 s.

        Entering raises :class:`QuotaExceededError` when the tokens don't fit, and what :meth:`reserve` raises; leaving
        raises :class:`DatabaseUnavailableError` when the count could not be recorded.
        """
        checked = checked_limits(limit, window, limits)
        if checked and reserve is None:
            raise InvalidInputError("reserve", "it is missing", "how many tokens the call may use")
        return Meter(
            label("user_id", user_id),
            label("model", model),
            id=None if id is None else _reservation_id(id),
            tokens=0 if reserve is None else whole_number("reserve", reserve),
            limits=checked,
            percents=checked_thresholds(thresholds),
            ttl=duration("ttl", ttl, min=_TTL_MIN, max=_TTL_MAX),
            clock=self._now,
            quotas=self._quotas,
            settler=self._settler,
            meters=self._meters,
            engine=self._engine,
        )

    def on_threshold(self, hook: H) -> H:
        """Call ``hook`` with a :class:`UsageAlert` after the commit of the call that crosses a threshold; a decorator.

        Of racing calls one does. In a period each threshold fires once; in a sliding window it fires again after use
        has fallen 10 points below it. A hook that fails is logged, and not called again.
        """
        self._thresholds.add(hook)
        return hook

    async def expire_reservations(self) -> ExpiryResult:
        """Renew the reservations of the meters that run in this process, and record what expired ones had used.

        Safe beside others that do the same; not inside a transaction.
        """
        if self._engine.in_transaction():
            raise TransactionError("reservations expire as they go, so not inside a transaction")
        now = self._now()
        renewed = await self._meters.renew(now=now)
        recorded, deleted = await self._settler.expire(now=now)
        return ExpiryResult(renewed=renewed, recorded=recorded, deleted=deleted)

    async def renewal_due(self, seconds: float) -> None:
        """Wait until :meth:`expire_reservations` is to renew a meter of this process, at most so many seconds."""
        await self._meters.until_due(seconds)

    # -- reading ------------------------------------------------------------------------------------------------

    async def total(
        self,
        user_id: str,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        model: str | None = None,
        period: Literal["month", "billing"] | None = None,
        tz: str = "UTC",
    ) -> int:
        """Return a user's tokens in a window, of one model or of all.

        ``period`` takes the place of ``since`` and ``until``: ``"month"`` is the calendar month that it is now by the
        clocks of ``tz``, an IANA name; ``"billing"`` is :meth:`billing_period`, and raises as it does.
        """
        label("user_id", user_id)
        zone, now = time_zone("tz", tz), self._now()
        if model is not None:
            label("model", model)
        if period is None:
            chosen = window(since=since, until=until, now=now)
        elif since is not None or until is not None:
            raise InvalidInputError("period", "it stands beside since or until", "one or the other")
        elif period == "month":
            chosen = month(now, zone)
        elif period == "billing":
            billed = await self.billing_period(user_id)
            chosen = Window(billed.since, billed.until)
        else:
            raise InvalidInputError("period", "it is none of the possible ones", "month or billing")
        return await self._sums.total(user_id, chosen, model)

    def watch(
        self,
        user_id: str,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        model: str | None = None,
        period: Literal["month", "billing"] | None = None,
        tz: str = "UTC",
    ) -> Watch:
        """Follow a user's :meth:`total`: ``async for total in usage.watch(user_id)``.

        The newest total comes at once, and then whenever it has become another one, by calls or as a sliding window
        moves on. With ``live`` on, here and where calls are recorded, it is at most a second behind the commit, and so
        it is with ``live`` off here, by reading every second. Behind a listening connection, what other writers commit
        is seen within 10 s. It ends when the kit is left, and raises as :meth:`total` does, and
        :class:`TransactionError` inside a transaction.
        """
        label("user_id", user_id)
        read = partial(self.total, user_id, since=since, until=until, model=model, period=period, tz=tz)
        return Watch(self._live, self._engine, user_id, read)

    def watching(self) -> AbstractAsyncContextManager[None]:
        """End every :meth:`watch` when the block is left."""
        return self._live.open()

    async def billing_period(self, user_id: str) -> Period:
        """Return the period for which the user is billed now.

        From the previous to the next billing date of the live subscription at the provider; without one, the calendar
        month before ``current_period_end`` of the live row. Raises :class:`NoBillingPeriodError` without either.
        """
        label("user_id", user_id)
        return await self._sums.billing_period(user_id)

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
            rows = await self._sums.by_model(user_id, chosen)
            return [_bucket(chosen.since, chosen.until, row["model"], row) for row in rows]
        starts = bucket_starts(chosen, by=grain, zone=zone, now=now)
        if not starts:
            return []
        rows = await self._sums.by_time(user_id, chosen, starts, in_utc_days=zone is UTC and grain != "hour")
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
        rows = await self._sums.top_users(chosen, limit)
        return [TopUser(user_id=row["user_id"], tokens=row["tokens"], calls=row["calls"]) for row in rows]

    # -- prices -------------------------------------------------------------------------------------------------

    async def set_price(
        self, model: str, *, per_million: Decimal, valid_from: date, currency: str = CURRENCY
    ) -> ModelPrice:
        """Set what a million tokens of a model cost from the UTC midnight of ``valid_from`` on, until its next price.

        ``per_million`` is a ``Decimal`` or an ``int`` of at most 10 decimal places; 0 is free. ``currency`` is three
        capital letters. The price of a model, currency and date that is there already is replaced: no cost is stored,
        so that re-prices the past.
        """
        price = checked_price("", model=model, per_million=per_million, valid_from=valid_from, currency=currency)
        await self._prices.set([price])
        return price

    async def set_prices(self, prices: Iterable[ModelPrice | Mapping[str, object]]) -> PricesSet:
        """Set many prices as :meth:`set_price` does, all of them or none; others stay as they are.

        An error's ``field`` names the entry, such as ``prices[3].per_million``.
        """
        return await self._prices.set(read_prices(prices))

    async def load_prices(self, path: str | PathLike[str]) -> PricesSet:
        """Set the prices of a TOML file: a table ``[[prices]]`` with the names of :meth:`set_price` for each.

        Raises :class:`InvalidInputError` with the field ``path``, or the entry as :meth:`set_prices` does; then no
        price is changed.
        """
        return await self._prices.set(await anyio.to_thread.run_sync(read_file, path))

    async def prices(self, model: str | None = None, *, currency: str | None = None) -> list[ModelPrice]:
        """Return the prices of a model or of all, in the order of model, currency and date."""
        if model is not None:
            label("model", model)
        if currency is not None:
            currency_code("currency", currency)
        return await self._prices.kept(model, currency)

    async def remove_price(self, model: str, *, valid_from: date, currency: str = CURRENCY) -> bool:
        """Remove the price of a model, currency and date, and return whether there was one; an older one then holds."""
        return await self._prices.remove(
            label("model", model), currency_code("currency", currency), day_of("valid_from", valid_from)
        )

    async def cost(
        self,
        user_id: str | None = None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        currency: str = CURRENCY,
        by: CostDimension | Sequence[CostDimension] = "model",
        tz: str = "UTC",
        places: int = 2,
        allow_unpriced: bool = False,
    ) -> CostReport:
        """Return what the calls of a window cost, of a user or of all, each by the price of its UTC day.

        ``by`` divides it into lines: ``"user"``, ``"model"``, ``"hour"``, ``"day"``, ``"month"``, or a tuple of those
        with at most one of time, which is cut as :meth:`breakdown` cuts it. Lines come in the order of time, then the
        dearest first; more than 100,000 are refused. ``places`` are the decimal places of ``total``, 0 to 10.

        Raises :class:`UnpricedModelError` when a model was used on a day on which it has no price in ``currency``;
        ``allow_unpriced=True`` reports it instead.
        """
        if user_id is not None:
            label("user_id", user_id)
        now = self._now()
        return await self._prices.cost(
            user_id,
            window(since=since, until=until, now=now),
            now=now,
            currency=currency_code("currency", currency),
            by=cost_dimensions("by", by),
            zone=time_zone("tz", tz),
            places=whole_number("places", places, max=10),
            allow_unpriced=flag("allow_unpriced", allow_unpriced),
        )

    # -- upkeep -------------------------------------------------------------------------------------------------

    async def verify(self) -> VerifyResult:
        """Compare the daily sums with the single rows they were made of, and return how many keys differ.

        In one snapshot, from the first day on that is summed and whose single rows are kept; it reads all of these.
        """
        self._want_rollup()
        return await verify(self._engine)

    async def rebuild(self, *, since: datetime, report: Callable[[int, int], None] | None = None) -> RebuildResult:
        """Make the daily sums what the single rows say, from the UTC day of ``since`` on, and return what was wrong.

        Beside any number of writers, a few keys at a time; not inside a transaction. Days whose single rows were
        pruned are refused. ``report`` is told how many days are done, and of how many.
        """
        day = instant("since", since).date()
        self._want_rollup()
        return await rebuild(self._engine, day, report)

    async def count_prunable(self, before: datetime) -> int:
        """Return how many single rows :meth:`prune` would delete; it reads them."""
        return await count_before(self._engine, instant("before", before).date())

    async def prune(
        self,
        before: datetime,
        *,
        batch_size: int = 5_000,
        budget: timedelta | None = None,
        report: Callable[[int], None] | None = None,
    ) -> PruneResult:
        """Delete the single rows of the UTC days before the one of ``before``; their sums stay.

        ``before`` is at least a day past. From then on calls of those days are refused, and so are windows that cut
        into them. In batches, a transaction each; not inside a transaction. ``budget`` is when to stop, ``more`` says
        that rows are left. ``report`` is told after each batch how many are deleted so far.
        """
        day = instant("before", before).date()
        whole_number("batch_size", batch_size, min=1, max=100_000)
        if budget is not None:
            duration("budget", budget)
        if midnight(day) > self._now() - timedelta(days=1):
            raise InvalidInputError("before", "it is too recent", "a time at least a day before now")
        self._want_rollup()
        return await prune(self._engine, day, batch_size=batch_size, budget=budget, report=report)

    # -- export -------------------------------------------------------------------------------------------------

    async def export(
        self, *, budget: timedelta | None = None, on_progress: Callable[[int], object] | None = None
    ) -> ExportResult:
        """Send to DodoPayments the calls that it does not have yet, each as a usage event whose id is the call's.

        Calls are waiting for it that were recorded while the outbox was switched on. Each is billed once, whatever
        fails and however many processes export: they lease the calls they send for 60 s, and the provider ignores an id
        that it knows. When it asks for a pause, or does not answer, nothing is sent for a while, by this service: until
        ``retry_at``. ``budget`` is when to stop; ``on_progress`` is told how many calls are settled.

        Raises :class:`ConfigurationError` without ``export_event`` or ``api_key``, :class:`MissingExtraError` without
        the extra ``dodo``, :class:`TransactionError` inside a transaction, and :class:`ProviderError` when the provider
        refuses every call, such as for a wrong key.
        """
        if budget is not None:
            duration("budget", budget)
        return await self._exporter.export(budget=budget, on_progress=on_progress)

    async def export_backlog(self) -> ExportBacklog:
        """Count the calls that are not at the provider yet, and say how old they are. It reads all of these."""
        return await self._exporter.backlog()

    async def parked_exports(self, *, limit: int = 100) -> list[ParkedExport]:
        """Return the calls that the provider refused, the oldest first; ``limit`` is 1 to 10,000."""
        return await self._exporter.parked(whole_number("limit", limit, min=1, max=10_000))

    async def retry_parked_exports(self) -> int:
        """Let the calls that the provider refused be sent again, and return how many they are."""
        return await self._exporter.unpark()

    def _want_rollup(self) -> None:
        if not self._rollup:
            raise ConfigurationError("usage_rollup is off, so there are no daily sums")

    def _now(self) -> datetime:
        now = self._clock()
        return now if now.tzinfo is UTC else now.astimezone(UTC)


def _reservation_id(id: object) -> str:
    return text("id", label("id", id), max=_RESERVATION_ID_MAX)


def _bucket(start: datetime, end: datetime | None, model: str | None, row: asyncpg.Record | None) -> UsageBucket:
    tokens, calls = (0, 0) if row is None else (row["tokens"], row["calls"])
    return UsageBucket(start=start, end=end, model=model, tokens=tokens, calls=calls)
