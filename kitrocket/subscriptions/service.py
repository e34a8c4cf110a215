"""The service: receive webhooks, say what a user's subscription is and what it allows, try again what waits."""

from __future__ import annotations

import logging
import random
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar

import anyio
import asyncpg
from pydantic import SecretStr

from kitrocket import inputs
from kitrocket.clock import Clock, from_db, to_db, utc_now
from kitrocket.dodo.events import Event, read_event
from kitrocket.dodo.projection import Policy, access, row_access
from kitrocket.dodo.signature import Delivery, Verifier
from kitrocket.engine import Engine, Fault, Transaction, fault_of
from kitrocket.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    InvalidInputError,
    MissingExtraError,
    ProviderError,
    SubscriptionConflictError,
    WebhookNotFoundError,
    WebhookPayloadError,
    WebhookPayloadPurgedError,
)
from kitrocket.models import (
    Access,
    ReconcileResult,
    RetryResult,
    StoredWebhook,
    Subscription,
    WebhookOutcome,
    WebhookReceipt,
)
from kitrocket.sql import statements
from kitrocket.subscriptions.applying import Applier
from kitrocket.subscriptions.changes import Changes
from kitrocket.subscriptions.hooks import H, Hooks
from kitrocket.subscriptions.inbox import (
    FINISHED,
    HOOK_STATES,
    REASONS,
    STATES,
    Inbox,
    Stored,
    Verdict,
    digest_of,
    pause_after,
)
from kitrocket.subscriptions.mirror import Mirrored
from kitrocket.subscriptions.reconciling import Reconciliation
from kitrocket.subscriptions.rows import subscription_from_row

if TYPE_CHECKING:
    from kitrocket.subscriptions.provider import Provider

T = TypeVar("T")

_SQL = statements("subscriptions")
_log = logging.getLogger("kitrocket.subscriptions")

#: A delivery is tried three times before the provider is asked to come again, with these pauses in seconds.
_PAUSES = (0.02, 0.1, 0.0)
#: All attempts together; the provider gives up after 15 s.
_TOTAL = timedelta(seconds=9)
#: How often the background work looks for payloads that were kept long enough.
_PURGE_EVERY = timedelta(hours=1)
#: How often the background work asks the provider about one and the same subscription, at most.
_CHECK_EVERY = timedelta(hours=1)
_LOCK, _STATEMENT = timedelta(seconds=2), timedelta(seconds=3)
#: What others who hold the rows of an event cause; it says nothing about the event.
_BUSY = (SubscriptionConflictError, asyncpg.LockNotAvailableError, asyncpg.QueryCanceledError)


class SubscriptionService:
    """Subscriptions that follow the provider's webhooks.

    ``webhook_keys`` verify deliveries, any of them; without one :meth:`receive` refuses. ``products`` maps the
    provider's product ids to plans, ``plans`` names the plans, lowest first. ``user_keys`` are the metadata keys that
    name the user. ``honour_paid_period`` says whether an immediate cancellation keeps the time that was paid for;
    ``past_due_days`` is the grace when the provider gives no deadline, ``renewal_leeway_hours`` the wait for a renewal
    to be confirmed; ``dispute_policy="suspend"`` denies access while a dispute is open. ``max_bytes`` is the largest
    body; an event that could not be applied ``max_attempts`` times is left alone. A payload is kept ``retention_days``
    after its event finished, twice as long where it never did. ``api_key`` and ``base_url`` are the provider's, for
    :meth:`reconcile`, which asks at most ``requests_per_second`` times a second.

    A key that cannot be one and a product with an unknown plan raise :class:`ConfigurationError`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        clock: Clock = utc_now,
        webhook_keys: Sequence[str | SecretStr] = (),
        products: Mapping[str, str] | None = None,
        plans: Sequence[str] = ("starter", "pro"),
        user_keys: Sequence[str] = ("kitrocket_user_id", "user_id", "userId"),
        honour_paid_period: bool = True,
        past_due_days: int = 3,
        renewal_leeway_hours: int = 72,
        dispute_policy: Literal["flag", "suspend"] = "flag",
        max_bytes: int = 2_097_152,
        max_attempts: int = 8,
        retention_days: int = 90,
        api_key: str | SecretStr | None = None,
        base_url: str | SecretStr | None = None,
        requests_per_second: float = 10.0,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        unknown = sorted(set((products or {}).values()) - set(plans))
        if unknown:
            raise ConfigurationError(f"dodo_products: these plans are not in `plans`: {', '.join(unknown)}")
        if dispute_policy not in ("flag", "suspend"):
            raise ConfigurationError('dispute_policy: it is "flag" or "suspend"')
        self._engine = engine
        self._clock = clock
        self._max_attempts = max_attempts
        self._policy = Policy(
            plans=tuple(plans),
            honour_paid_period=honour_paid_period,
            past_due=timedelta(days=past_due_days),
            renewal_leeway=timedelta(hours=renewal_leeway_hours),
            dispute_policy=dispute_policy,
        )
        self._verifier = Verifier(webhook_keys, max_bytes=max_bytes)
        self._retention = timedelta(days=retention_days)
        self._purged_at: datetime | None = None
        self._api_key = api_key
        self._base_url = base_url
        self._requests_per_second = requests_per_second

        def pause(attempts: int) -> timedelta:
            return pause_after(attempts, jitter())

        self._hooks = Hooks(engine, max_attempts=max_attempts, pause=pause)
        is_heard = self._hooks.listen_to
        self._inbox = Inbox(engine, user_keys=user_keys, pause=pause, is_heard=is_heard)
        self._applier = Applier(
            engine,
            products=dict(products or {}),
            user_keys=tuple(user_keys),
            policy=self._policy,
            is_heard=is_heard,
        )

    async def receive(self, body: bytes, headers: Mapping[str, str]) -> WebhookReceipt:
        """Verify a delivery, store it, apply it, commit; then say what became of it.

        ``body`` is the request's body as it came, ``headers`` its headers. Only a receipt may be answered with 2xx.
        Raises a :class:`WebhookError`, with nothing stored, for what cannot be verified or is no event, and
        :class:`DatabaseUnavailableError`, with nothing stored, when the database is away or too busy.
        """
        now = self._clock()
        delivery = self._verifier.verify(body, headers, now=now)
        outcome = await self._persist(partial(self._receive, delivery, now))
        if outcome in FINISHED:
            self._hooks.wake()
        return WebhookReceipt(webhook_id=delivery.webhook_id, type=delivery.event.type, outcome=outcome)

    async def get(self, user_id: str) -> Subscription | None:
        """Return the user's subscription: the live one, else the one the provider told of last, or ``None``."""
        row = await self._engine.fetchrow(_SQL["row_of_user"], inputs.identifier("user_id", user_id))
        return None if row is None else subscription_from_row(row)

    async def access(self, user_id: str) -> Access:
        """Return whether the user has access at this instant, to which plan, until when, and why.

        Decided on what the provider told, by the clock; on the row alone (``row_only``) where another writer made it.
        """
        now = self._clock()
        rows = await self._engine.fetch(_SQL["access"], inputs.identifier("user_id", user_id))
        snapshots = [Mirrored.from_row(row).snapshot for row in rows if row["subscription_id"] is not None]
        granted = access(snapshots, now, self._policy)
        row = rows[0]
        if granted.allowed or row["row_plan"] is None or row["row_known"]:
            return granted
        end = row["row_period_end"]
        return row_access(row["row_plan"], row["row_status"], None if end is None else from_db(end), now, self._policy)

    async def access_many(self, user_ids: Iterable[str]) -> dict[str, Access]:
        """Return what :meth:`access` says of each user, from one statement."""
        now, policy = self._clock(), self._policy
        rows = await self._engine.fetch(
            _SQL["access_of_users"],
            [inputs.identifier("user_ids", user_id) for user_id in user_ids],
            to_db(now),
            list(policy.plans),
            policy.honour_paid_period,
            policy.past_due,
            policy.renewal_leeway,
            policy.dispute_policy == "suspend",
        )
        return {
            row["user_id"]: Access(
                allowed=row["allowed"],
                plan=row["plan"],
                status=row["status"],
                until=None if row["until"] is None else from_db(row["until"]),
                reason=row["reason"],
            )
            for row in rows
        }

    async def had_trial(self, user_id: str) -> bool:
        """Return whether a subscription of the user ever started that had a trial."""
        found: bool = await self._engine.fetchval(_SQL["had_trial"], inputs.identifier("user_id", user_id))
        return found

    def on(self, *types: str) -> Callable[[H], H]:
        """Register an async function that is told of events: ``@kit.subscriptions.on("payment.failed")``.

        A type is one of the provider's, ``"subscription.*"``, ``"incident.double_billing"``, or ``"*"``. The function
        gets a :class:`~kitrocket.models.BillingEvent`, at least once for each event that was applied, stale or
        ignored, after the commit and outside of transactions; what raises is told again, after pauses,
        ``max_attempts`` times. Register in the process that receives: an event that no function wants when it is
        stored is not kept for one.

        Raises :class:`InvalidInputError` for what is no type and for a function that is not async.
        """
        return self._hooks.on(*types)

    async def run_hooks(self) -> int:
        """Tell the registered functions what waits for them; return how many events and incidents they were told.

        An open kit does this in the background, soon after each commit; :meth:`retry_parked` does it too.
        """
        return (await self._hooks.run_due(self._clock)).done

    async def hooks_due(self, seconds: float) -> None:
        """Wait until this process has committed something for :meth:`run_hooks`, at most so many seconds."""
        await self._hooks.until_woken(seconds)

    async def retry_parked(self, *, on_progress: Callable[[int, int], object] | None = None) -> RetryResult:
        """Try again what could not be applied: what is due, and what waited for a user, payment, product or status
        that is known by now, dead or not.

        Then bring the rows up to date that time alone has changed, such as a scheduled cancellation that came, ask the
        provider where there is doubt (with ``api_key``), tell the hooks, and once an hour take out the payloads that
        were kept long enough. Each event is a transaction of its own; several processes share the work.
        ``on_progress`` is called with how many events were tried, and of how many.
        """
        now = self._clock()
        due = await self._inbox.to_retry(now)
        known = [
            webhook_id
            for webhook_id, payload in await self._inbox.of_unknown_kind()
            if self._applier.problem_with(read_event(payload).content) is None
        ]
        wanted = list(dict.fromkeys([*due, *known]))
        tried: list[str] = []
        for number, webhook_id in enumerate(wanted, 1):
            state = await self._unless_busy(webhook_id, partial(self._retry, webhook_id, now))
            tried += [state] if state is not None else []
            if on_progress is not None:
                on_progress(number, len(wanted))
        reprojected = [
            await self._unless_busy(subscription_id, partial(self._reproject, subscription_id, now))
            for subscription_id in await self._applier.due(now)
        ]
        told, purged = await self.run_hooks(), await self._purge_hourly(now)
        # Last, as a provider that is away is waited for.
        await self._check_flagged_if_possible()
        return RetryResult(
            tried=len(tried),
            finished=sum(state in FINISHED for state in tried),
            dead=tried.count("dead"),
            reprojected=reprojected.count(True),
            told=told,
            purged=purged,
        )

    async def replay(self, webhook_id: str, *, hooks: bool = False) -> WebhookReceipt:
        """Send a stored event down the same path again, and write its user's row anew.

        With ``hooks`` the functions that want it are told once more, in a process that has registered them. It does not
        count as an attempt: an event that was given up and still cannot be applied stays given up.

        Raises :class:`WebhookNotFoundError` for an unknown id and :class:`WebhookPayloadPurgedError` when the payload
        is no longer kept.
        """
        now = self._clock()
        receipt = await self._persist(partial(self._replay, inputs.identifier("webhook_id", webhook_id), now, hooks))
        self._hooks.wake()
        return receipt

    async def reconcile(
        self, *, dry_run: bool = False, on_progress: Callable[[int], object] | None = None
    ) -> ReconcileResult:
        """Compare every subscription with what the provider says now, and take over what differs.

        A webhook that is applied meanwhile is never overwritten: its subscription is counted as ``raced`` and left for
        the next pass. What the provider does not know becomes an incident of kind ``drift``. ``dry_run`` writes
        nothing. ``on_progress`` is called with how many subscriptions were compared.

        A failure with one subscription is counted and logged. Raises :class:`ConfigurationError` without ``api_key``,
        :class:`MissingExtraError` without the extra ``dodo``, and :class:`ProviderError` when the provider's list
        cannot be read, the key is refused, or the provider is away five times in a row; what was taken over until then
        stays.
        """
        async with self._provider() as provider:
            pass_ = Reconciliation(
                self._engine, self._applier, provider, clock=self._clock, write=self._write, dry_run=dry_run
            )
            return await pass_.run(on_progress)

    async def check_flagged(self, *, limit: int = 50) -> ReconcileResult | None:
        """Ask the provider about subscriptions that are in doubt, such as one whose renewal nobody confirmed.

        Each at most once an hour. Returns ``None`` when there are none. Raises as :meth:`reconcile`.
        """
        since = to_db(self._clock() - _CHECK_EVERY)
        flagged = await self._engine.fetch(_SQL["snapshots_to_check"], since, limit)
        if not flagged:
            return None
        async with self._provider() as provider:
            pass_ = Reconciliation(self._engine, self._applier, provider, clock=self._clock, write=self._write)
            for row in flagged:
                await pass_.check(row["subscription_id"], row["version"])
            return pass_.result()

    async def _check_flagged_if_possible(self) -> None:
        if self._api_key is None:
            return
        try:
            await self.check_flagged()
        except (MissingExtraError, ProviderError) as error:
            _log.warning("subscriptions in doubt are not checked: %s", error)

    def _provider(self) -> Provider:
        if self._api_key is None:
            raise ConfigurationError("asking DodoPayments needs its API key: DODO_PAYMENTS_API_KEY")
        from kitrocket.subscriptions.provider import Provider  # only here: it needs the extra

        return Provider(api_key=self._api_key, base_url=self._base_url, requests_per_second=self._requests_per_second)

    async def _write(self, unit: Callable[[], Awaitable[T]]) -> T:
        """Run a unit of work in a transaction of its own, again after a transient error."""

        async def inside() -> T:
            async with self._transaction():
                return await unit()

        return await self._persist(inside)

    async def purge(self) -> int:
        """Take out the payloads that were kept long enough, or whose user was deleted; return how many that were.

        Ids, types, hashes, states and times stay, so that a late delivery is still a duplicate.
        """
        return await self._inbox.purge(self._clock(), self._retention)

    async def list_webhooks(
        self,
        *,
        states: Sequence[str] | None = None,
        reasons: Sequence[str] | None = None,
        subscription_id: str | None = None,
        user_id: str | None = None,
        hook_states: Sequence[str] | None = None,
        limit: int = 100,
    ) -> Sequence[StoredWebhook]:
        """Return stored events, newest first, without their payloads.

        Raises :class:`InvalidInputError`.
        """
        for field, names, known in (
            ("states", states, STATES),
            ("reasons", reasons, REASONS),
            ("hook_states", hook_states, HOOK_STATES),
        ):
            for name in names or ():
                if name not in known:
                    raise InvalidInputError(field, "there is no such one", f"some of {', '.join(known)}")
        for field, id in (("subscription_id", subscription_id), ("user_id", user_id)):
            if id is not None:
                inputs.identifier(field, id)
        return await self._inbox.list(
            states=states,
            reasons=reasons,
            subscription_id=subscription_id,
            user_id=user_id,
            hook_states=hook_states,
            limit=inputs.whole_number("limit", limit, min=1, max=10_000),
        )

    async def get_webhook(self, webhook_id: str) -> StoredWebhook | None:
        """Return a stored event without its payload, or ``None``."""
        return await self._inbox.show(inputs.identifier("webhook_id", webhook_id))

    async def _purge_hourly(self, now: datetime) -> int:
        if self._purged_at is not None and now - self._purged_at < _PURGE_EVERY:
            return 0
        self._purged_at = now
        return await self._inbox.purge(now, self._retention)

    # -- one transaction each -------------------------------------------------------------------------------------

    async def _receive(self, delivery: Delivery, now: datetime) -> WebhookOutcome:
        """Store and apply a delivery. One that fails for a reason of its own costs a second transaction, with a
        savepoint around what fails; the others are spared the savepoint.
        """
        if self._engine.in_transaction():
            return await self._store_and_apply(delivery, now, guarded=True)
        try:
            return await self._store_and_apply(delivery, now, guarded=False)
        except Exception as error:
            if _is_transient(error) or isinstance(error, WebhookPayloadError):
                raise
        return await self._store_and_apply(delivery, now, guarded=True)

    async def _store_and_apply(self, delivery: Delivery, now: datetime, *, guarded: bool) -> WebhookOutcome:
        async with self._transaction():
            # Under a guard locks and reads belong into the savepoint too.
            lock = None if guarded else self._applier.lock_of(delivery.event.content)
            stored = await self._inbox.store(delivery, now, lock)
            verdict = None
            if stored.state not in FINISHED:
                event = delivery.event if stored.payload is None else read_event(stored.payload)
                changes = Changes()
                if guarded:
                    verdict = await self._apply(event, stored, now)
                else:
                    id, reading = stored.webhook_id, stored.reading
                    verdict = await self._applier.apply(event, id, now, changes, reading=reading)
                await self._inbox.settle(stored, verdict, now, changes)
            if stored.body_sha256 != digest_of(delivery.text) and stored.subscription_id is not None:
                await self._applier.flag(stored.subscription_id)
        if verdict is None or (not stored.is_new and verdict.state not in FINISHED):
            return "duplicate"
        return verdict.outcome

    def _transaction(self) -> Transaction:
        return self._engine.transaction(lock_timeout=_LOCK, statement_timeout=_STATEMENT)

    async def _retry(self, webhook_id: str, now: datetime) -> str | None:
        async with self._transaction():
            stored = await self._inbox.take(webhook_id)
            if stored is None or stored.payload is None or stored.state in FINISHED:
                return None
            verdict = await self._apply(read_event(stored.payload), stored, now)
            if stored.attempts + 1 >= self._max_attempts:
                verdict = _dead_unless_finished(verdict)
            await self._inbox.settle(stored, verdict, now)
        return verdict.state

    async def _reproject(self, subscription_id: str, now: datetime) -> bool:
        async with self._transaction():
            return await self._applier.reproject(subscription_id, now)

    async def _replay(self, webhook_id: str, now: datetime, hooks: bool) -> WebhookReceipt:
        async with self._transaction():
            stored = await self._inbox.wait_for(webhook_id)
            if stored is None:
                raise WebhookNotFoundError(webhook_id)
            if stored.payload is None:
                raise WebhookPayloadPurgedError(webhook_id)
            verdict = await self._apply(read_event(stored.payload), stored, now, again=True)
            if stored.state == "dead":
                verdict = _dead_unless_finished(verdict)
            await self._inbox.settle(stored, verdict, now, hooks=hooks, counted=False)
        return WebhookReceipt(webhook_id=webhook_id, type=stored.type, outcome=verdict.outcome)

    async def _apply(self, event: Event, stored: Stored, now: datetime, *, again: bool = False) -> Verdict:
        """Apply an event in a savepoint, so that one that fails for a reason of its own is still stored."""
        try:
            async with self._engine.transaction():
                changes = Changes()
                verdict = await self._applier.apply(event, stored.webhook_id, now, changes, again=again)
                await changes.write(self._engine)
                return verdict
        except Exception as error:
            if _is_transient(error):
                raise
            name = type(error).__name__
            state = getattr(error if isinstance(error, asyncpg.PostgresError) else error.__cause__, "sqlstate", None)
            last_error = f"{name} {state}" if state else name
            # The lines of code alone: an error's own text may quote what was delivered.
            where = "".join(traceback.format_tb(error.__traceback__))
            _log.error("webhook %s is stored but could not be applied: %s\n%s", stored.webhook_id, last_error, where)
            return Verdict("received", last_error=last_error)

    async def _persist(self, unit: Callable[[], Awaitable[T]]) -> T:
        """Run a transaction that is idempotent by the event's id, again after a transient error.

        Inside a caller's transaction it runs once: only the whole can be repeated.
        """
        if self._engine.in_transaction():
            return await unit()
        failure: Exception | None = None
        with anyio.move_on_after(_TOTAL.total_seconds()):
            for pause in _PAUSES:
                try:
                    return await unit()
                except Exception as error:
                    if not _is_transient(error):
                        raise
                    failure = error
                await anyio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - jitter is no secret
        raise DatabaseUnavailableError(
            "the event could not be stored and applied in time; deliver it again"
        ) from failure

    async def _unless_busy(self, id: str, unit: Callable[[], Awaitable[T]]) -> T | None:
        """Run one transaction of many; ``None`` when others hold its rows for too long, which is for the next time."""
        try:
            return await self._persist(unit)
        except DatabaseUnavailableError as error:
            if not isinstance(error.__cause__, _BUSY):
                raise
            _log.warning("%s is held elsewhere and left for the next time: %s", id, type(error.__cause__).__name__)
            return None


def _dead_unless_finished(verdict: Verdict) -> Verdict:
    return verdict if verdict.state in FINISHED else replace(verdict, state="dead")


def _is_transient(error: Exception) -> bool:
    # A lock or a statement that took too long, or another writer's live row, says nothing about the event.
    if isinstance(error, _BUSY):
        return True
    return fault_of(error) is not Fault.NEVER
