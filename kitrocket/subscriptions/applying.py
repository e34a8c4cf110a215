"""Apply an event: locks, reads, then the changes to mirror, index and row. Runs inside the inbox's transaction.

Locks are taken in classes (payment, subscription, user), each in a statement of its own before the reads that it
protects: a statement that waits for a lock keeps the snapshot from before the wait. For a snapshot the statements stand
in the function ``kitrocket.lock_for_snapshot``, for a payment here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from kitrocket.clock import to_db
from kitrocket.dodo.events import (
    STATUS_RANKS,
    Content,
    DisputeState,
    Event,
    PaymentState,
    RefundState,
    SubscriptionSnapshot,
    Unreadable,
    named_user,
)
from kitrocket.dodo.payments import Facts, Payment, facts_of
from kitrocket.dodo.projection import Policy, Snapshot, view
from kitrocket.engine import Engine
from kitrocket.inputs import EMAIL_MAX, ID_MAX, normalised_email
from kitrocket.models import Difference
from kitrocket.sql import statements
from kitrocket.subscriptions.changes import Changes
from kitrocket.subscriptions.inbox import Lock, Verdict
from kitrocket.subscriptions.incidents import open_incident
from kitrocket.subscriptions.mirror import Mirrored, differences, payment_from_row, payment_parameters
from kitrocket.subscriptions.reading import Reading, holdings_from_json
from kitrocket.subscriptions.rows import project_users

_SQL = statements("subscriptions")

#: An event that claims to come from later than this is worth asking the provider about.
_AHEAD = timedelta(hours=24)


class Applier:
    """Applies events on one engine, under the application's products, user keys and policy.

    ``is_heard`` says whether a hook wants incidents of a type.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        products: Mapping[str, str],
        user_keys: Sequence[str],
        policy: Policy,
        is_heard: Callable[[str], bool],
    ) -> None:
        self._engine = engine
        self._products = products
        self._user_keys = user_keys
        self._policy = policy
        self._is_heard = is_heard

    async def apply(
        self,
        event: Event,
        webhook_id: str,
        now: datetime,
        changes: Changes,
        *,
        again: bool = False,
        reading: Reading | None = None,
    ) -> Verdict:
        """Apply an event: add to ``changes`` what it changes, and return what it came to.

        ``again`` writes the row anew even if nothing is new. ``reading`` is what was read under the locks that
        :meth:`lock_of` names; without it they are taken here.
        """
        content = event.content
        problem = self.problem_with(content)
        if problem is not None:
            return Verdict("parked", problem)
        if isinstance(content, SubscriptionSnapshot):
            reading = reading or await self._read(content)
            return self._apply_snapshot(content, event, webhook_id, now, reading, changes, again)
        if isinstance(content, PaymentState | RefundState | DisputeState):
            return await self._apply_payment(content, event, now, changes, again)
        return Verdict("ignored")

    def lock_of(self, content: Content) -> Lock | None:
        """Return the parameters of ``lock_for_snapshot`` if ``content`` is a snapshot that can be applied."""
        if not isinstance(content, SubscriptionSnapshot) or self.problem_with(content) is not None:
            return None
        return self._lock_of(content)

    def problem_with(self, content: Content) -> str | None:
        """Return why the content of an event cannot be understood, whatever the database says, or ``None``."""
        if isinstance(content, Unreadable):
            return "unreadable"
        if isinstance(content, SubscriptionSnapshot):
            if content.status not in STATUS_RANKS:
                return "unknown_status"
            if content.product_id not in self._products:
                return "unknown_product"
        return None

    async def flag(self, subscription_id: str) -> None:
        """Note that the provider should be asked about a subscription."""
        for known in await self._lock([subscription_id]):
            if not known.needs_check:
                await self._keep_users({known.user_id})
                await Changes({subscription_id: replace(known, needs_check=True)}).write(self._engine)

    async def due(self, now: datetime) -> list[str]:
        """Return the subscriptions whose meaning time alone has changed, a thousand at most."""
        return [row["subscription_id"] for row in await self._engine.fetch(_SQL["snapshots_due"], to_db(now))]

    async def reproject(self, subscription_id: str, now: datetime) -> bool:
        """Bring a subscription and its user's row to what they mean at ``now``; return whether that was due."""
        known = next(iter(await self._lock([subscription_id])), None)
        if known is None or known.reproject_at is None or known.reproject_at > now:
            return False
        existing = await self._keep_users({known.user_id})
        new = replace(known, user_id=known.user_id if known.user_id in existing else None)
        changes = Changes()
        changes.mirror(self._dated(new, now))
        await self._project(existing, changes, now)
        await changes.write(self._engine)
        return True

    # -- what was fetched from the provider ---------------------------------------------------------------------------

    async def adopt(
        self, state: SubscriptionSnapshot, told: Iterable[str], version: int, now: datetime
    ) -> list[Difference] | None:
        """Take over a fetched state and return what it changed; ``None`` if ``version`` is outdated.

        ``told`` names the fields that the provider answered. A fetch has no event's time and key: every event that is
        newer than what was known stays newer.
        """
        reading = await self._read(state)
        known = reading.known
        if (known.version if known else 0) != version:
            return None
        linked, target, _ = _users_in(reading)
        fact = Event("", known.snapshot.event_at if known else state.created_at or now, {})
        webhook_id = known.webhook_id if known else None
        new = self._new_snapshot(state, fact, webhook_id, reading, known.event_key if known else "")
        if known is not None and state.status == "past_due" and state.past_due_ends_at is None:
            new = replace(new, snapshot=replace(new.snapshot, past_due_ends_at=known.snapshot.past_due_ends_at))
        new = replace(
            new,
            user_id=(target or linked) if self._names_somebody(state) else (linked or target),
            named_key=known.named_key if known else None,
            fetched_at=now,
            needs_check=False,
        )
        found = await self.compare(known, state, told)
        changes = Changes()
        changes.mirror(self._dated(new, now))
        self._project_read(reading, {linked, new.user_id}, changes, now)
        await changes.write(self._engine)
        return found

    async def compare(
        self, known: Mirrored | None, state: SubscriptionSnapshot, told: Iterable[str]
    ) -> list[Difference]:
        """Return where the mirror and a fetched state differ, in the fields that the provider ``told``."""
        found = differences(known, state, told, self._products)
        named = named_user(self._user_keys, state.metadata, state.customer.metadata)
        linked = known.user_id if known else None
        if known is not None and named not in (None, linked):
            id, _, _, target, _ = self._lock_of(state)
            if target is not None and await self._engine.fetchval(_SQL["user_exists"], target):
                found.append(Difference(subscription_id=id, field="user_id", ours=linked, theirs=target))
        return found

    async def note_agreed(self, subscription_id: str, version: int, now: datetime) -> bool:
        """Note that the provider says what is known of a subscription; ``False`` if ``version`` is outdated."""
        for known in await self._lock([subscription_id]):
            if known.version == version:
                existing = await self._keep_users({known.user_id})
                user_id = known.user_id if known.user_id in existing else None
                new = self._dated(replace(known, user_id=user_id, fetched_at=now, needs_check=False), now)
                await Changes({subscription_id: new}).write(self._engine)
                return True
        return False

    async def note_gone(self, subscription_id: str, version: int, now: datetime) -> bool:
        """Note that the provider does not know a subscription; ``False`` if ``version`` is outdated.

        Its user's row stays as it is.
        """
        for known in await self._lock([subscription_id]):
            if known.version != version:
                return False
            existing = await self._keep_users({known.user_id})
            user_id = known.user_id if known.user_id in existing else None
            new = replace(known, user_id=user_id, fetched_at=now, needs_check=False)
            changes = Changes()
            changes.mirror(new)
            detail = {"subscriptions": [subscription_id]}
            open_incident(changes, "drift", subscription_id, user_id, detail, now, self._is_heard)
            await changes.write(self._engine)
        return True

    async def adopt_payment(self, state: PaymentState, now: datetime) -> None:
        """Take over a fetched payment; every event about it is newer."""
        changes = Changes()
        await self._apply_payment(state, Event("", state.created_at or now, {}), now, changes, False)
        await changes.write(self._engine)

    # -- subscriptions --------------------------------------------------------------------------------------------

    def _apply_snapshot(
        self,
        state: SubscriptionSnapshot,
        event: Event,
        webhook_id: str,
        now: datetime,
        reading: Reading,
        changes: Changes,
        again: bool,
    ) -> Verdict:
        known = reading.known
        linked, target, problem = _users_in(reading)
        key = state.order_key(event.at)
        loses = known is not None and key < known.event_key
        if known is None or key > known.event_key:
            new = self._new_snapshot(state, event, webhook_id, reading, key)
        else:
            started = known.snapshot.started or _is_started(state)
            new = replace(known, snapshot=replace(known.snapshot, started=started))
        named_key = known.named_key if known else None
        is_outdone = named_key is not None and key < named_key
        if self._names_somebody(state) and target is not None and not is_outdone:
            # The newest event that names an existing user decides, whether or not its snapshot does.
            new = replace(new, user_id=target, named_key=key)
        else:
            new = replace(new, user_id=linked or target, named_key=named_key)
        new = self._checked(new, event, known, key, now)

        if new != known:
            changes.mirror(new)
        if new != known or again:
            self._project_read(reading, {linked, new.user_id}, changes, now)
        if problem is not None and not is_outdone:
            return Verdict("parked", problem, user_id=linked, customer_email=_email_of(state))
        is_stale = loses and known is not None and (new.snapshot, new.user_id) == (known.snapshot, known.user_id)
        return Verdict("stale" if is_stale else "applied", user_id=new.user_id)

    def _new_snapshot(
        self, state: SubscriptionSnapshot, event: Event, webhook_id: str | None, reading: Reading, key: str
    ) -> Mirrored:
        known = reading.known
        change = state.scheduled_change
        snapshot = Snapshot(
            subscription_id=state.subscription_id,
            customer_id=state.customer.customer_id,
            plan=self._products[state.product_id],
            status=state.status,
            event_at=event.at,
            created_at=state.created_at,
            previous_billing_date=state.previous_billing_date,
            next_billing_date=state.next_billing_date,
            cancel_at_next_billing_date=state.cancel_at_next_billing_date,
            cancelled_at=state.cancelled_at,
            expires_at=state.expires_at,
            paused_at=state.paused_at,
            past_due_ends_at=state.past_due_ends_at,
            trial_period_days=state.trial_period_days,
            started=_is_started(state) or (known is not None and known.snapshot.started),
            facts=facts_of(state.subscription_id, state.previous_billing_date, reading.payments),
        )
        return Mirrored(
            snapshot=snapshot,
            product_id=state.product_id,
            event_key=key,
            pending_plan=self._products.get(change.product_id or "") if change else None,
            pending_plan_at=change.effective_at if change else None,
            webhook_id=webhook_id,
            fetched_at=known.fetched_at if known else None,
            needs_check=known.needs_check if known else False,
        )

    def _checked(self, new: Mirrored, event: Event, known: Mirrored | None, key: str, now: datetime) -> Mirrored:
        """Return ``new`` with its next instant of change, and flagged if the provider should be asked about it."""
        doubtful = event.at > now and event.at - now > _AHEAD
        if known is not None:
            doubtful = doubtful or (event.at == known.snapshot.event_at and key != known.event_key)
            doubtful = doubtful or (
                known.fetched_at is not None and key > known.event_key and event.at < known.fetched_at
            )
            if (new.snapshot, new.user_id) == (known.snapshot, known.user_id):
                return replace(new, needs_check=new.needs_check or doubtful)
        return self._dated(replace(new, needs_check=new.needs_check or doubtful), now)

    def _dated(self, item: Mirrored, now: datetime) -> Mirrored:
        """Return a snapshot with the instant at which time changes it next, flagged while a renewal is unconfirmed."""
        seen = view(item.snapshot, now, self._policy)
        return replace(
            item,
            needs_check=item.needs_check or (seen is not None and seen.reason == "renewal_unconfirmed"),
            reproject_at=None if seen is None else seen.turns_at,
        )

    def _names_somebody(self, state: SubscriptionSnapshot) -> bool:
        return named_user(self._user_keys, state.metadata, state.customer.metadata) is not None

    def _lock_of(self, state: SubscriptionSnapshot) -> Lock:
        named = named_user(self._user_keys, state.metadata, state.customer.metadata)
        # What cannot be an id names nobody.
        id = named if named is not None and len(named) <= ID_MAX and "\0" not in named else None
        return state.subscription_id, state.customer.customer_id, named is not None, id, _email_of(state)

    async def _read(self, state: SubscriptionSnapshot) -> Reading:
        """Lock a subscription, then the users it may belong to, and read what is known of them."""
        return Reading.from_json(await self._engine.fetchval(_SQL["lock_for_snapshot"], *self._lock_of(state)))

    def _project_read(self, reading: Reading, user_ids: set[str | None], changes: Changes, now: datetime) -> None:
        holdings = [holding for holding in reading.holdings if holding.user_id in user_ids]
        project_users(holdings, changes, now, self._policy, self._is_heard)

    # -- payments, refunds, disputes ------------------------------------------------------------------------------

    async def _apply_payment(
        self,
        state: PaymentState | RefundState | DisputeState,
        event: Event,
        now: datetime,
        changes: Changes,
        again: bool,
    ) -> Verdict:
        row = await self._engine.fetchrow(_SQL["lock_payment"], state.payment_id)
        known = Payment(state.payment_id) if row is None else payment_from_row(row)
        merged, newest_at = _merge(known, state, event.at)
        mirrored = await self._lock(sorted(merged.subscription_ids))
        existing = await self._keep_users(item.user_id for item in mirrored)
        changed: set[str] = set()
        if merged != known:
            await self._engine.fetch(_SQL["write_payment"], *payment_parameters(merged))
            changed = {user_id for item in mirrored if (user_id := await self._refresh(item, existing, changes, now))}
        await self._project(existing if again else changed, changes, now)
        user_id = min(existing, default=None)
        if merged.status is None:
            return Verdict("parked", "unknown_payment", user_id=user_id)
        is_stale = merged == known and newest_at is not None and event.at < newest_at
        return Verdict("stale" if is_stale else "applied", user_id=user_id)

    async def _refresh(self, known: Mirrored, existing: set[str], changes: Changes, now: datetime) -> str | None:
        """Bring a snapshot's facts to what its payments say, and return its user if that changed something."""
        facts = await self._facts(known.snapshot.subscription_id, known.snapshot.previous_billing_date)
        if facts == known.snapshot.facts:
            return None
        user_id = known.user_id if known.user_id in existing else None
        new = replace(known, snapshot=replace(known.snapshot, facts=facts), user_id=user_id)
        changes.mirror(self._dated(new, now))
        return user_id

    async def _facts(self, subscription_id: str, previous: datetime | None) -> Facts:
        rows = await self._engine.fetch(_SQL["payments_of_subscription"], subscription_id)
        return facts_of(subscription_id, previous, [payment_from_row(row) for row in rows])

    # -- both -----------------------------------------------------------------------------------------------------

    async def _lock(self, subscription_ids: Sequence[str]) -> list[Mirrored]:
        """Lock subscriptions; return those the mirror knows."""
        if not subscription_ids:
            return []
        rows = await self._engine.fetch(_SQL["lock_subscriptions"], subscription_ids)
        return [Mirrored.from_row(row) for row in rows]

    async def _keep_users(self, user_ids: Iterable[str | None]) -> set[str]:
        """Lock users and keep them from being deleted; return those that exist."""
        wanted = sorted({user_id for user_id in user_ids if user_id is not None})
        if not wanted:
            return set()
        return {row["id"] for row in await self._engine.fetch(_SQL["keep_users"], wanted)}

    async def _project(self, user_ids: Iterable[str], changes: Changes, now: datetime) -> None:
        wanted = sorted(user_ids)
        if wanted:
            holdings = holdings_from_json(await self._engine.fetchval(_SQL["holdings"], wanted))
            project_users(holdings, changes, now, self._policy, self._is_heard)


def _users_in(reading: Reading) -> tuple[str | None, str | None, str | None]:
    """Return the user that a subscription is linked to, the one it is to belong to, and why there is none."""
    linked = reading.known.user_id if reading.known and reading.known.user_id in reading.kept else None
    if len(reading.candidates) > 1:
        return linked, None, "ambiguous_user"
    target = next((id for id in reading.candidates if id in reading.kept), None)
    return linked, target, None if target else "no_user"


def _is_started(state: SubscriptionSnapshot) -> bool:
    return state.status not in ("pending", "failed")


def _email_of(state: SubscriptionSnapshot) -> str | None:
    address = state.customer.email
    if address is None or len(address) > EMAIL_MAX or "\0" in address:
        return None
    return normalised_email(address) or None


def _merge(
    known: Payment, state: PaymentState | RefundState | DisputeState, at: datetime
) -> tuple[Payment, datetime | None]:
    """Return a payment after an event, and the time of what was known of the event's subject before."""
    if isinstance(state, PaymentState):
        return known.with_state(state, at), known.event_at
    if isinstance(state, RefundState):
        refund = known.refunds.get(state.refund_id)
        return known.with_refund(state, at), refund.at if refund else None
    dispute = known.disputes.get(state.dispute_id)
    return known.with_dispute(state, at), dispute.at if dispute else None
