"""Every error kitrocket raises on purpose.

An error carries its data as attributes. No token, secret, e-mail address or payload stands in a message, a
repr or a log: where the data is secret, the attribute is left out too.

* KitRocketError
  + InvalidInputError (also a ValueError)
  + ConfigurationError
    - MissingExtraError (also an ImportError)
  + UserNotFoundError
  + EmailTakenError
  + AccountTakenError
  + AccountNotFoundError
  + LastAccountError
  + LinkRefusedError
  + TokenRefreshError
  + WrongPasswordError
  + InvalidTokenError
  + SessionNotFreshError
  + SubscriptionConflictError
  + UsageConflictError
  + QuotaExceededError
  + ReservationNotFoundError
  + RecorderClosedError
  + WindowNotExactError
  + NoBillingPeriodError
  + UnpricedModelError
  + WebhookNotFoundError
  + ProviderError
  + WebhookError
    - WebhookVerificationError
    - WebhookPayloadError
      * WebhookPayloadPurgedError
    - WebhookTooLargeError
    - WebhookNotConfiguredError
  + DatabaseError
    - DatabaseUnavailableError
    - TransactionError
    - SchemaNotMigratedError
    - SchemaMismatchError
    - MigrationError
    - EmbeddedServerError
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol


class KitRocketError(Exception):
    """The root of every error that kitrocket raises on purpose."""


class InvalidInputError(KitRocketError, ValueError):
    """A value handed to a public method or an endpoint cannot be used; nothing was changed.

    ``field`` names the argument, ``problem`` says what is wrong and ``expected`` what would be right. The value
    itself is left out: it may be a secret.
    """

    def __init__(self, field: str, problem: str, expected: str) -> None:
        super().__init__(field, problem, expected)
        self.field = field
        self.problem = problem
        self.expected = expected

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}; expected {self.expected}"


class ConfigurationError(KitRocketError):
    """A setting is missing or contradicts another; the message names the setting and the cure."""


class MissingExtraError(ConfigurationError, ImportError):
    """Something needs a package that an extra brings; the message is the line to type."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(what, extra)
        self.what = what
        self.extra = extra

    def __str__(self) -> str:
        return f'{self.what} needs more packages: pip install "kitrocket[{self.extra}]"'


class UserNotFoundError(KitRocketError):
    """A write, an export or a deletion names a user that does not exist."""

    def __init__(self, user_id: str | None = None) -> None:
        super().__init__(user_id)
        self.user_id = user_id

    def __str__(self) -> str:
        return "no such user" if self.user_id is None else f"no user with the id {self.user_id!r}"


class EmailTakenError(KitRocketError):
    """Another user already has this e-mail address (letter case does not count)."""

    def __str__(self) -> str:
        return "another user already has this e-mail address"


class AccountTakenError(KitRocketError):
    """This identity at the provider already belongs to a user: another one, or this one under another account."""

    def __str__(self) -> str:
        return "this provider account already belongs to a user"


class AccountNotFoundError(KitRocketError):
    """The user has no account at this provider that holds an access token."""

    def __init__(self, user_id: str, provider: str) -> None:
        super().__init__(user_id, provider)
        self.user_id = user_id
        self.provider = provider

    def __str__(self) -> str:
        return f"user {self.user_id!r} has no access token of {self.provider}"


class LastAccountError(KitRocketError):
    """Unlinking this account would leave the user without a way to sign in."""

    def __init__(self, user_id: str, account_id: str) -> None:
        super().__init__(user_id, account_id)
        self.user_id = user_id
        self.account_id = account_id

    def __str__(self) -> str:
        return f"account {self.account_id!r} is the last way in of user {self.user_id!r}"


class LinkRefusedError(KitRocketError):
    """A sign-in at a provider cannot be tied to a user; nothing was changed.

    ``reason``: ``"no_email"``, the provider told none; ``"provider_unverified"``, the address is a user's and the
    provider neither verified it nor is trusted; ``"local_unverified"``, the user who has the address never proved it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"this identity is not linked to a user: {self.reason}"


class TokenRefreshError(KitRocketError):
    """An access token is over and no new one could be had; the stored tokens are unchanged. Its cause is the error."""

    def __init__(self, provider: str) -> None:
        super().__init__(provider)
        self.provider = provider

    def __str__(self) -> str:
        return f"the access token of {self.provider} could not be refreshed"


class WrongPasswordError(KitRocketError):
    """The current password is another one, or the user has none; nothing was changed."""

    def __str__(self) -> str:
        return "the current password is wrong"


class InvalidTokenError(KitRocketError):
    """A token that was sent by e-mail is forged, used, over or out of date; it doesn't say which."""

    def __str__(self) -> str:
        return "the token is not valid"


class SessionNotFreshError(KitRocketError):
    """The session is live, but its sign-in is too long ago for what is asked: the user must sign in again."""

    def __init__(self, session_id: str) -> None:
        super().__init__(session_id)
        self.session_id = session_id

    def __str__(self) -> str:
        return f"session {self.session_id!r} is too old for this; sign in again"


class SubscriptionConflictError(KitRocketError):
    """Another writer holds a live subscription row for this user."""

    def __str__(self) -> str:
        return "the user already has a live subscription row"


class UsageConflictError(KitRocketError):
    """A usage id was used before for another user, model or number of tokens; nothing was recorded."""

    def __init__(self, usage_id: str) -> None:
        super().__init__(usage_id)
        self.usage_id = usage_id

    def __str__(self) -> str:
        return f"usage id {self.usage_id!r} is already recorded with another user, model or token count"


class Refusal(Protocol):
    """What is said of a limit that was reached: a :class:`~kitrocket.models.Decision`, to which this floor is blind."""

    @property
    def limit(self) -> int:
        """The limit, in tokens."""
        ...

    @property
    def used(self) -> int:
        """What calls have used of it."""
        ...

    @property
    def reserved(self) -> int:
        """What calls that run now have set aside."""
        ...

    @property
    def remaining(self) -> int:
        """What is left."""
        ...

    @property
    def reset_at(self) -> datetime | None:
        """When the calls that count have all left the window."""
        ...

    @property
    def retry_after(self) -> int | None:
        """In how many seconds the tokens fit; ``None`` when they never will."""
        ...


class QuotaExceededError(KitRocketError):
    """The tokens that a call wants to reserve don't fit into a limit; nothing was reserved.

    ``decision`` is the :class:`~kitrocket.models.Decision`. An endpoint answers 429, with ``Retry-After``.
    """

    def __init__(self, decision: Refusal) -> None:
        super().__init__(decision)
        self.decision = decision

    def __str__(self) -> str:
        decision = self.decision
        wait = "never" if decision.retry_after is None else f"in {decision.retry_after} s"
        return (
            f"of {decision.limit:,} tokens {decision.used:,} are used and {decision.reserved:,} reserved; "
            f"the call would fit {wait}"
        )


class ReservationNotFoundError(KitRocketError):
    """No reservation has this id: it was never made, released, or it expired a day ago with nothing used."""

    def __init__(self, reservation_id: str) -> None:
        super().__init__(reservation_id)
        self.reservation_id = reservation_id

    def __str__(self) -> str:
        return f"no reservation with the id {self.reservation_id!r}"


class RecorderClosedError(KitRocketError):
    """A call came after the kit was left, or waited when it was; it was not recorded."""

    def __str__(self) -> str:
        return "the kit was left, so the call was not recorded"


class WindowNotExactError(KitRocketError):
    """The window begins or ends inside days whose single rows were pruned."""

    def __init__(self, nearest_since: datetime | None, nearest_until: datetime | None) -> None:
        super().__init__(nearest_since, nearest_until)
        self.nearest_since = nearest_since
        self.nearest_until = nearest_until

    def __str__(self) -> str:
        return f"the exact window nearest to this one is {self.nearest_since} to {self.nearest_until}"


class NoBillingPeriodError(KitRocketError):
    """The user has no live subscription that says when it is billed."""

    def __init__(self, user_id: str) -> None:
        super().__init__(user_id)
        self.user_id = user_id

    def __str__(self) -> str:
        return f"user {self.user_id!r} has no billing period"


class UnpricedModelError(KitRocketError):
    """Models were used on days on which they have no price, so what the calls cost is not known."""

    def __init__(self, models: Sequence[str], tokens: int) -> None:
        super().__init__(tuple(models), tokens)
        self.models = tuple(models)
        self.tokens = tokens

    def __str__(self) -> str:
        named = ", ".join(repr(model) for model in self.models[:5]) + (", …" if len(self.models) > 5 else "")
        return f"{self.tokens:,} token(s) were used on days without a price, of {len(self.models)} model(s): {named}"


class WebhookNotFoundError(KitRocketError):
    """No stored webhook has this id."""

    def __init__(self, webhook_id: str) -> None:
        super().__init__(webhook_id)
        self.webhook_id = webhook_id

    def __str__(self) -> str:
        return f"no stored webhook with the id {self.webhook_id!r}"


class ProviderError(KitRocketError):
    """DodoPayments refused a request or could not be reached, several times. Its cause is the SDK's error.

    ``status_code`` is what it answered, ``None`` without an answer.
    """

    def __init__(self, status_code: int | None) -> None:
        super().__init__(status_code)
        self.status_code = status_code

    def __str__(self) -> str:
        if self.status_code is None:
            return "DodoPayments cannot be reached: check DODO_PAYMENTS_BASE_URL and the way out to the internet"
        if self.status_code in (401, 403):
            return (
                f"DodoPayments answered {self.status_code}: check DODO_PAYMENTS_API_KEY; with a key of test mode, set"
                " DODO_PAYMENTS_BASE_URL=https://test.dodopayments.com"
            )
        hints = {404: ": check DODO_PAYMENTS_BASE_URL", 429: ": it asks for more patience; try again later"}
        return f"DodoPayments answered {self.status_code}" + hints.get(self.status_code, "")


class WebhookError(KitRocketError):
    """A webhook delivery was refused and nothing was stored.

    ``reason`` is a short code such as ``"bad_signature"``. No header, key or body text is kept.
    """

    #: What an HTTP endpoint answers.
    status_code = 400

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"webhook refused: {self.reason}"


class WebhookVerificationError(WebhookError):
    """A header is missing or malformed, the time is out of tolerance, or no signature matches."""

    status_code = 401


class WebhookPayloadError(WebhookError):
    """The body is not UTF-8, not JSON, or not an event."""

    status_code = 400


class WebhookPayloadPurgedError(WebhookPayloadError):
    """The payload of a stored webhook was taken out, by its age or with its user, so it cannot be replayed."""

    def __init__(self, webhook_id: str) -> None:
        super().__init__("payload_purged")
        self.args = (webhook_id,)
        self.webhook_id = webhook_id

    def __str__(self) -> str:
        return (
            f"the payload of webhook {self.webhook_id!r} is no longer kept, so it cannot be replayed;"
            " `kitrocket webhooks reconcile` asks DodoPayments how its subscription stands now"
        )


class WebhookTooLargeError(WebhookError):
    """The body is larger than ``webhook_max_bytes``."""

    status_code = 413


class WebhookNotConfiguredError(WebhookError):
    """No webhook key is configured, so nothing can be verified; the provider retries."""

    status_code = 503


class DatabaseError(KitRocketError):
    """The root of what is wrong with the database rather than with the call."""


class DatabaseUnavailableError(DatabaseError):
    """PostgreSQL could not be reached, or did not answer in time. Its cause is the driver's error."""


class TransactionError(DatabaseError):
    """A transaction was used in a way that cannot work, such as from a child task or after its end."""


class SchemaNotMigratedError(DatabaseError):
    """The database lacks migrations of this version; the message names the command to run."""

    def __init__(self, pending: Sequence[str]) -> None:
        super().__init__(tuple(pending))
        self.pending = tuple(pending)

    def __str__(self) -> str:
        return (
            f"the database lacks {len(self.pending)} migration(s) of kitrocket; "
            "run `kitrocket db migrate` (or `piccolo migrations forwards kitrocket`)"
        )


class SchemaMismatchError(DatabaseError):
    """The database's tables are not what they should be; ``differences`` says where, a line each."""

    def __init__(self, differences: Sequence[str]) -> None:
        super().__init__(tuple(differences))
        self.differences = tuple(differences)

    def __str__(self) -> str:
        return "the database differs from the schema:\n" + "\n".join(f"  - {line}" for line in self.differences)


class MigrationError(DatabaseError):
    """A migration failed; the message names it and its cause is the error."""


class EmbeddedServerError(DatabaseError):
    """The embedded PostgreSQL cannot be started, shared or stopped; the message says how to cure it."""
