"""The frozen values that services return. None of them carries a secret: no token, no password hash.

The exceptions are :class:`IssuedSession`, also inside :class:`CredentialChange`, which shows a new session's token
once, and :class:`RefreshedTokens`, which an application hands over; their ``repr`` leaves it out.

Every datetime is timezone-aware, in UTC.
"""

from __future__ import annotations

from datetime import date, timedelta
from decimal import Decimal
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue

#: What became of a webhook delivery.
WebhookOutcome = Literal["applied", "duplicate", "stale", "parked", "ignored"]


#: What a sign-in at a provider did: the identity was known; a user was made; the identity was given to the user who has
#: its e-mail address; the same, and the user's accounts and sessions were deleted, for the address was never proven.
SignInOutcome = Literal["signed_in", "created", "linked", "taken_over"]


class Value(BaseModel):
    """A frozen model."""

    model_config = ConfigDict(frozen=True)


class User(Value):
    """A user of the application."""

    id: str
    email: str
    name: str
    email_verified: AwareDatetime | None
    avatar: str | None
    created_at: AwareDatetime
    updated_at: AwareDatetime


class Account(Value):
    """A way in: an identity at a provider, or ``provider="credential"`` for e-mail and password."""

    id: str
    user_id: str
    provider: str
    provider_account_id: str
    expires_at: AwareDatetime | None
    has_password: bool
    created_at: AwareDatetime


class Session(Value):
    """A session, live when it was read. ``seen_at`` is a lower bound of the last time it was used."""

    id: str
    user_id: str
    expires_at: AwareDatetime
    created_at: AwareDatetime
    seen_at: AwareDatetime
    ip_address: str | None
    user_agent: str | None
    is_current: bool = False


class SessionWithUser(Value):
    """A live session and its user. ``refreshed`` says that the expiry moved: send the cookie again."""

    session: Session
    user: User
    refreshed: bool = False


class IssuedSession(Value):
    """A new session with its token, which is shown this once and cannot be read again."""

    session: Session
    token: str = Field(repr=False)


class CredentialChange(Value):
    """What a change of password or e-mail address did.

    ``issued`` is the session that was kept, under a new id and with a new token: send the cookie again. ``None`` when
    none was. ``revoked`` counts the sessions that ended, expired ones included.
    """

    user: User
    issued: IssuedSession | None
    revoked: int


class ProviderSignIn(Value):
    """Who signed in at a provider, with which account, and what that did."""

    user: User
    account: Account
    outcome: SignInOutcome


class RefreshedTokens(Value):
    """What a provider answers to a refresh token. Without a new refresh token the old one stays.

    ``expires_at`` is when the access token is over; ``None``: never, or unknown.
    """

    access_token: str = Field(repr=False)
    refresh_token: str | None = Field(default=None, repr=False)
    expires_at: AwareDatetime | None = None


class SweepResult(Value):
    """What a sweep deleted. ``more`` says that it stopped at its limit or budget with rows left."""

    deleted: int
    batches: int
    more: bool


class DigestResult(Value):
    """How many plain tokens were replaced. ``more`` says that it stopped at its budget with plain ones left."""

    digested: int
    batches: int
    more: bool


class Subscription(Value):
    """A user's subscription as the application sees it."""

    id: str
    user_id: str
    plan: str
    status: str
    dodo_customer_id: str | None
    dodo_subscription_id: str | None
    current_period_end: AwareDatetime | None
    created_at: AwareDatetime
    updated_at: AwareDatetime


class UserWithSubscription(Value):
    """A user with the subscription that ``subscriptions.get`` would choose."""

    user: User
    subscription: Subscription | None


class Access(Value):
    """Whether a user may use what a plan pays for, until when, and why."""

    allowed: bool
    plan: str | None
    status: str | None
    until: AwareDatetime | None
    reason: str


class WebhookReceipt(Value):
    """What became of a webhook delivery that was stored."""

    webhook_id: str
    type: str
    outcome: WebhookOutcome


class RetryResult(Value):
    """How many unfinished webhooks were tried again, how many of them are finished now, and how many were given up.

    ``reprojected`` counts the subscriptions whose meaning time alone had changed, ``told`` the events and incidents
    that hooks were told of, ``purged`` the payloads that were taken out.
    """

    tried: int
    finished: int
    dead: int
    reprojected: int
    told: int = 0
    purged: int = 0


class Difference(Value):
    """A field of a subscription that the provider states otherwise; ``ours`` is what was known here."""

    subscription_id: str
    field: str
    ours: str | None
    theirs: str | None


class ReconcileResult(Value):
    """How many subscriptions the provider listed (``checked``), how many were asked for one by one (``fetched``), and
    what came of it: ``changed`` here, ``raced`` by a webhook that was faster, ``gone`` at the provider, ``failed``.

    ``requests`` counts every request; ``differences`` says what was, or with ``dry_run`` would be, taken over.
    """

    checked: int
    fetched: int
    changed: int
    raced: int
    gone: int
    failed: int
    requests: int
    differences: list[Difference]


class BillingEvent(Value):
    """What a hook is told: an event of the provider, or an incident, whose type begins with ``incident.``.

    ``webhook_id`` is the incident's id then. ``at`` is the event's own time; ``outcome`` is ``"applied"``,
    ``"stale"``, ``"ignored"``, or ``"opened"`` of an incident. ``data`` is as the provider sent it, empty once it was
    purged; it holds personal data and stays out of the repr.
    """

    webhook_id: str
    type: str
    at: AwareDatetime
    user_id: str | None
    subscription_id: str | None
    payment_id: str | None
    outcome: str
    data: dict[str, JsonValue] = Field(repr=False)


class StoredWebhook(Value):
    """A stored delivery, without its payload. ``deliveries`` counts how often it came."""

    webhook_id: str
    type: str
    subscription_id: str | None
    payment_id: str | None
    user_id: str | None
    event_at: AwareDatetime | None
    received_at: AwareDatetime
    state: str
    reason: str | None
    attempts: int
    next_attempt_at: AwareDatetime | None
    last_error: str | None
    deliveries: int
    finished_at: AwareDatetime | None
    hook_state: str
    hook_attempts: int
    has_payload: bool


class UsageRecord(Value):
    """One AI call, committed. ``duplicate`` says that its id had been recorded before."""

    id: str
    user_id: str
    tokens: int
    model: str
    at: AwareDatetime
    duplicate: bool


class UsageEntry(Value):
    """One AI call to record with ``record_many``; the names are those of ``record``."""

    model_config = ConfigDict(strict=True)

    user_id: str
    tokens: int
    model: str
    id: str | None = None
    at: AwareDatetime | None = None


class RecordedUsage(Value):
    """How many rows of a ``record_many`` call were new and how many had been recorded before."""

    inserted: int
    duplicates: int


class UsageBucket(Value):
    """Tokens and calls of one hour, day or month (``start <= t < end``), or of one model in the whole window.

    Without ``end`` the bucket is open, as its window is.
    """

    start: AwareDatetime
    end: AwareDatetime | None
    model: str | None
    tokens: int
    calls: int


class TopUser(Value):
    """A user with the tokens and calls of a window."""

    user_id: str
    tokens: int
    calls: int


class Period(Value):
    """A billing period, ``since <= t < until``; ``source`` says whether the provider or only the row told its end."""

    since: AwareDatetime
    until: AwareDatetime
    source: Literal["provider", "row"]


class ModelPrice(Value):
    """What a million tokens of a model cost from the UTC midnight of ``valid_from`` on, until the next price."""

    model: str
    currency: str = "USD"
    valid_from: date
    per_million: Decimal


class PricesSet(Value):
    """How many prices were new, had another value before, or were so already."""

    added: int
    changed: int
    unchanged: int


class CostLine(Value):
    """What some of the calls of a window cost: those of a user, of a model, of ``start <= t < end``, or of several.

    What the cost was not divided by is ``None``; ``start`` and ``end`` are the window's then, in UTC, and ``day`` is a
    date on the clocks of the zone that was asked for. ``cost`` is exact, not rounded. ``unpriced`` of the ``tokens``
    have no price, and ``cost`` has nothing for them.
    """

    start: AwareDatetime
    end: AwareDatetime | None
    day: date | None
    user_id: str | None
    model: str | None
    tokens: int
    calls: int
    unpriced: int
    cost: Decimal


class UnpricedUsage(Value):
    """The tokens and calls of a model on days on which it had no price."""

    model: str
    tokens: int
    calls: int


class CostReport(Value):
    """What the calls of a window cost.

    The lines' costs add up to ``exact``; ``total`` is that, rounded once, half to even. ``tokens`` and ``calls`` count
    those without a price too; with any, ``complete`` is false and ``unpriced`` names the models.
    """

    since: AwareDatetime
    until: AwareDatetime | None
    currency: str
    total: Decimal
    exact: Decimal
    tokens: int
    calls: int
    lines: list[CostLine]
    unpriced: list[UnpricedUsage]
    complete: bool


#: What a limit is for: any stretch of time of this length, the calendar month in UTC, or the user's billing period.
LimitWindow = timedelta | Literal["month", "billing"]


class Limit(Value):
    """So many tokens in any window of this length, or in each ``"month"`` (UTC) or ``"billing"`` period."""

    model_config = ConfigDict(strict=True)

    tokens: int
    window: LimitWindow = timedelta(days=30)


class Decision(Value):
    """Whether tokens were reserved, and how a limit stands. Of several limits it is the one that decides: the one with
    the longest wait where the call was refused, else the one with the least left.

    ``used`` is what calls have used of it, ``reserved`` what calls that run now have set aside, this one among them
    when it is ``allowed``; ``remaining`` is the rest. ``id`` is the reservation's, ``None`` without one. ``reset_at``
    is the first instant at which none of the calls that count now does, which is the end of a period; ``None`` when
    none counts. ``retry_after`` is in how many seconds, rounded up, the tokens fit if nobody else calls: 0 when they do
    now, ``None`` when they never will or nobody can tell. ``crossed`` are the thresholds, in percent, that this call
    was the first to see.
    """

    allowed: bool
    id: str | None
    limit: int
    window: LimitWindow
    used: int
    reserved: int
    remaining: int
    reset_at: AwareDatetime | None
    retry_after: int | None
    crossed: list[int]


class SettledUsage(UsageRecord):
    """What a reserved call used in the end, committed. ``overrun`` is what exceeds its reservation.

    ``duplicate`` says that it had been recorded before. ``crossed`` as in a :class:`Decision`.
    """

    overrun: int
    crossed: list[int]


class UsageAlert(Value):
    """A threshold of a limit that a user's calls have crossed, told once."""

    user_id: str
    limit: int
    window: LimitWindow
    percent: int
    used: int
    at: AwareDatetime


class ExpiryResult(Value):
    """How many reservations of running calls were renewed, how many expired ones became calls, and how many were
    deleted because nothing had been used.
    """

    renewed: int
    recorded: int
    deleted: int


class UsageDrift(Value):
    """A user's day and model whose daily sum is not what the single rows say: ``kept`` is what it is."""

    user_id: str
    day: date
    model: str
    tokens: int
    calls: int
    kept_tokens: int
    kept_calls: int


class VerifyResult(Value):
    """How many days were compared and how many keys (user, day and model) differ, with up to 20 of them."""

    days: int
    drift: int
    examples: list[UsageDrift]


class RebuildResult(Value):
    """How many days were recomputed, and how many keys (user, day and model) were wrong."""

    days: int
    corrected: int


class PruneResult(Value):
    """How many single rows were deleted. ``kept_from`` is from when on they are kept; ``more`` as in a sweep."""

    deleted: int
    batches: int
    more: bool
    kept_from: AwareDatetime


class ExportResult(Value):
    """What became of the calls that were due for the provider: ``sent``, ``parked`` because they were refused,
    ``dropped`` because they were deleted here, ``waiting`` for their user's customer, ``postponed`` by a failure.

    ``retry_at`` is until when nothing is sent after that; ``more`` says that the budget ended with rows left.
    """

    sent: int
    parked: int
    dropped: int
    waiting: int
    postponed: int
    requests: int
    more: bool
    retry_at: AwareDatetime | None


class ExportBacklog(Value):
    """How many calls the provider does not have yet, ``waiting`` of the ``pending`` ones for their user's customer.

    ``oldest_at`` is the time of the first pending call that waits for something else.
    """

    pending: int
    waiting: int
    parked: int
    oldest_at: AwareDatetime | None


class ParkedExport(Value):
    """A call that is not sent to the provider again by itself, and why."""

    usage_id: str
    user_id: str
    at: AwareDatetime
    attempts: int
    error: str


class UserExport(Value):
    """Everything of a user: each row of the five tables as JSON, as of one instant, without tokens and passwords.

    Times are ISO 8601 in UTC.
    """

    user: dict[str, JsonValue]
    sessions: list[dict[str, JsonValue]] = []
    accounts: list[dict[str, JsonValue]] = []
    subscriptions: list[dict[str, JsonValue]] = []
    usage: list[dict[str, JsonValue]] = []


class DeletedUser(Value):
    """How many rows went with a deleted user."""

    user_id: str
    sessions: int
    accounts: int
    subscriptions: int
    usage: int


__all__ = [
    "Access",
    "Account",
    "BillingEvent",
    "CredentialChange",
    "Decision",
    "DeletedUser",
    "Difference",
    "DigestResult",
    "ExpiryResult",
    "IssuedSession",
    "Limit",
    "Period",
    "ProviderSignIn",
    "PruneResult",
    "RebuildResult",
    "ReconcileResult",
    "RecordedUsage",
    "RefreshedTokens",
    "RetryResult",
    "Session",
    "SessionWithUser",
    "SettledUsage",
    "SignInOutcome",
    "StoredWebhook",
    "Subscription",
    "SweepResult",
    "TopUser",
    "UsageAlert",
    "UsageBucket",
    "UsageDrift",
    "UsageEntry",
    "UsageRecord",
    "User",
    "UserExport",
    "UserWithSubscription",
    "VerifyResult",
    "WebhookOutcome",
    "WebhookReceipt",
]
