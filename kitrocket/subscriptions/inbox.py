"""The inbox: every verified delivery is stored first, and what became of it is noted beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg

from kitrocket.clock import from_db, to_db
from kitrocket.dodo.events import (
    DisputeState,
    Event,
    PaymentState,
    RefundState,
    SubscriptionSnapshot,
    Unreadable,
    named_user,
)
from kitrocket.dodo.signature import Delivery
from kitrocket.engine import Engine
from kitrocket.errors import InvalidInputError, WebhookPayloadError
from kitrocket.inputs import ID_MAX
from kitrocket.models import StoredWebhook, WebhookOutcome
from kitrocket.sql import statements
from kitrocket.subscriptions.changes import Changes
from kitrocket.subscriptions.reading import Reading

_SQL = statements("webhooks")

#: The parameters of ``lock_for_snapshot``: subscription, customer, whether the event names a user, the user, the
#: customer's address.
Lock = tuple[str, str, bool, str | None, str | None]

FINISHED = frozenset({"applied", "stale", "ignored"})
STATES = (*sorted(FINISHED), "received", "parked", "dead")
HOOK_STATES = ("none", "pending", "done", "dead")
REASONS = ("no_user", "ambiguous_user", "unknown_product", "unknown_status", "unknown_payment", "unreadable")

#: How many payloads one statement takes out, at most.
_PURGED_AT_ONCE = 1000
#: An unfinished event is tried again after this, then after four times as long each time, at most the second.
_FIRST_PAUSE, _LONGEST_PAUSE = timedelta(seconds=60), timedelta(hours=6)


@dataclass(frozen=True)
class Verdict:
    """What applying an event came to: a state of the inbox, and for an unfinished one the reason."""

    state: str
    reason: str | None = None
    user_id: str | None = None
    customer_email: str | None = None
    last_error: str | None = None

    @property
    def outcome(self) -> WebhookOutcome:
        """Return the word for it in a receipt."""
        outcomes: dict[str, WebhookOutcome] = {"applied": "applied", "stale": "stale", "ignored": "ignored"}
        return outcomes.get(self.state, "parked")


class Stored:
    """A locked row of the inbox."""

    def __init__(self, row: asyncpg.Record) -> None:
        self.webhook_id: str = row["webhook_id"]
        self.type: str = row["type"]
        self.state: str = row["state"]
        self.attempts: int = row["attempts"]
        self.is_new: bool = row["deliveries"] == 1
        self.body_sha256: str = row["body_sha256"]
        self.subscription_id: str | None = row["subscription_id"]
        self.payload: str | None = row["payload"]
        self.hook_state: str = row["hook_state"]
        locked: str | None = row.get("locked")
        self.reading = None if locked is None else Reading.from_json(locked)


def digest_of(text: str) -> str:
    """Return the SHA-256 of a body, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


class Inbox:
    """The inbox of one engine.

    ``user_keys`` are the metadata keys of the user id; ``pause`` answers how long to wait after so many attempts,
    ``is_heard`` whether a hook wants events of a type.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        user_keys: Sequence[str],
        pause: Callable[[int], timedelta],
        is_heard: Callable[[str], bool],
    ) -> None:
        self._engine = engine
        self._user_keys = user_keys
        self._pause = pause
        self._is_heard = is_heard

    async def store(self, delivery: Delivery, now: datetime, lock: Lock | None) -> Stored:
        """Store a delivery, or lock the event that was stored before under its id.

        For a new event ``lock`` is taken in the same message, after the inbox's row, and what it protects is read.
        """
        event = delivery.event
        try:
            row = await self._engine.fetchrow(
                _SQL["store_event"],
                delivery.webhook_id,
                event.type,
                *_ids(event),
                self.hint(event),
                to_db(event.at),
                to_db(now),
                digest_of(delivery.text),
                delivery.text,
                *(lock or (None,) * 5),
            )
        except InvalidInputError:
            # What our parser reads and PostgreSQL's does not. `from None`: the cause knows the body.
            raise WebhookPayloadError("unstorable") from None
        assert row is not None
        return Stored(row)

    def hint(self, event: Event) -> str | None:
        """Return the user id that the event's metadata names, in a form that can be stored."""
        content = event.content
        if not isinstance(content, SubscriptionSnapshot | PaymentState):
            return None
        name = named_user(self._user_keys, content.metadata, content.customer.metadata if content.customer else {})
        if name is None:
            return None
        # What cannot be an id stays the name of nobody.
        name = name.replace("\0", "\N{REPLACEMENT CHARACTER}")
        return name if len(name) <= ID_MAX else name[: ID_MAX - 1] + "…"

    async def take(self, webhook_id: str) -> Stored | None:
        """Lock a stored event, or return ``None`` when it is gone or another process has it."""
        row = await self._engine.fetchrow(_SQL["take_event"], webhook_id)
        return None if row is None else Stored(row)

    async def wait_for(self, webhook_id: str) -> Stored | None:
        """Lock a stored event, or return ``None`` when there is none."""
        row = await self._engine.fetchrow(_SQL["wait_for_event"], webhook_id)
        return None if row is None else Stored(row)

    async def settle(
        self,
        stored: Stored,
        verdict: Verdict,
        now: datetime,
        changes: Changes | None = None,
        *,
        hooks: bool = False,
        counted: bool = True,
    ) -> None:
        """Write what an event changes, what became of it, and when to try an unfinished one again.

        With ``counted`` that was an attempt. A finished one is for the hooks that want it, once, or with ``hooks`` once
        more, in whichever process has them.
        """
        unfinished = verdict.state not in FINISHED
        attempts = stored.attempts + (unfinished and counted)
        due = now + self._pause(max(attempts, 1)) if unfinished and verdict.state != "dead" else None
        is_told = not unfinished and (hooks or (stored.hook_state == "none" and self._is_heard(stored.type)))
        changes = changes or Changes()
        changes.event = {
            "webhook_id": stored.webhook_id,
            "state": verdict.state,
            "reason": verdict.reason,
            "user_id": verdict.user_id,
            "customer_email": verdict.customer_email,
            "attempts": attempts,
            "next_attempt_at": due,
            "last_error": verdict.last_error,
            "finished_at": None if unfinished else now,
            "hook_next_at": now if is_told else None,
        }
        await changes.write(self._engine)

    async def to_retry(self, now: datetime) -> list[str]:
        """Return the ids of events that are due, or whose missing user or payment has appeared."""
        rows = await self._engine.fetch(_SQL["events_to_retry"], to_db(now))
        return [row["webhook_id"] for row in rows]

    async def of_unknown_kind(self) -> list[tuple[str, str]]:
        """Return id and body of the events parked for an unknown product or status."""
        rows = await self._engine.fetch(_SQL["events_of_unknown_kind"])
        return [(row["webhook_id"], row["payload"]) for row in rows]

    async def purge(self, now: datetime, retention: timedelta) -> int:
        """Take out the payloads that were kept long enough, or whose user is gone; return how many that were."""
        purged = 0
        finished, unfinished = to_db(now - retention), to_db(now - 2 * retention)
        for statement, parameters in (("purge_events", (finished, unfinished)), ("purge_events_of_nobody", ())):
            while True:
                rows = await self._engine.fetch(_SQL[statement], *parameters)
                purged += len(rows)
                if len(rows) < _PURGED_AT_ONCE:
                    break
        return purged

    async def list(
        self,
        *,
        states: Sequence[str] | None = None,
        reasons: Sequence[str] | None = None,
        subscription_id: str | None = None,
        user_id: str | None = None,
        hook_states: Sequence[str] | None = None,
        limit: int,
    ) -> Sequence[StoredWebhook]:
        """Return stored events, newest first."""
        rows = await self._engine.fetch(
            _SQL["list_events"], states, reasons, subscription_id, user_id, hook_states, limit
        )
        return [_stored(row) for row in rows]

    async def show(self, webhook_id: str) -> StoredWebhook | None:
        """Return a stored event, or ``None`` when there is none."""
        row = await self._engine.fetchrow(_SQL["show_event"], webhook_id)
        return None if row is None else _stored(row)


def pause_after(attempts: int, jitter: float) -> timedelta:
    """Return how long to wait after so many attempts; ``jitter`` is 0.0 to 1.0."""
    times: int = 4 ** min(attempts - 1, 10)
    return min(_FIRST_PAUSE * times, _LONGEST_PAUSE) * (0.8 + 0.4 * jitter)


def _stored(row: asyncpg.Record) -> StoredWebhook:
    return StoredWebhook(**{k: from_db(v) if isinstance(v, datetime) else v for k, v in row.items()})


def _ids(event: Event) -> tuple[str | None, str | None, str | None]:
    """Return the ids of subscription, payment and customer that an event is about."""
    content = event.content
    if isinstance(content, SubscriptionSnapshot):
        return content.subscription_id, None, content.customer.customer_id
    if isinstance(content, PaymentState):
        customer = content.customer.customer_id if content.customer else None
        return content.subscription_id, content.payment_id, customer
    if isinstance(content, RefundState | DisputeState):
        return None, content.payment_id, None
    return content if isinstance(content, Unreadable) else (None, None, None)
