"""What the driver's errors mean: kitrocket's own error for each, and whether to try again.

The driver's errors tell secrets: DETAIL quotes the key or the failing row, a ``DataError`` the argument. Neither
leaves this module.
"""

from __future__ import annotations

import enum
import re
import ssl
from collections.abc import Callable

import asyncpg

from kitrocket.errors import (
    AccountTakenError,
    ConfigurationError,
    DatabaseUnavailableError,
    EmailTakenError,
    InvalidInputError,
    KitRocketError,
    SubscriptionConflictError,
    UserNotFoundError,
)

_BY_CONSTRAINT: dict[str, Callable[[], KitRocketError]] = {
    "users_pkey": lambda: InvalidInputError("id", "another user has it", "an id that no user has"),
    "users_email_unique": EmailTakenError,
    "users_lower_email_idx": EmailTakenError,
    "accounts_provider_provider_account_id_idx": AccountTakenError,
    "subscriptions_one_live_per_user": SubscriptionConflictError,
}
_USER_KEYS = re.compile(r"_user_id_(users_id_)?(fk|fkey)$")
_MISSING_USER = re.compile(r"\(user_id\)=\((.*)\)", re.DOTALL)
#: Citus appends the shard to a constraint's name.
_SHARD = re.compile(r"_\d+$")

_NOT_CONNECTED = {"57P03", "53300", "08001", "08004", "25006"}
_ROLLED_BACK = {"40001", "40P01"}
_UNKNOWN = {"08000", "08003", "08006", "57P01", "57P02", "57P05", "25P03"}


class Fault(enum.Enum):
    """What is known about a unit of work that failed."""

    #: It was rolled back for certain: run it again.
    ROLLED_BACK = "rolled back"
    #: It never reached the server: reconnect, then run it again.
    NOT_CONNECTED = "not connected"
    #: The connection was lost in the middle: run again only what is idempotent by its own keys.
    UNKNOWN = "outcome unknown"
    #: It will fail again.
    NEVER = "never"


def fault_of(error: BaseException) -> Fault:
    """Classify a driver's error, or the one that an error of kitrocket's was raised from."""
    if isinstance(error, KitRocketError) and isinstance(error.__cause__, Exception):
        return fault_of(error.__cause__)
    if isinstance(error, asyncpg.InvalidCachedStatementError):
        return Fault.ROLLED_BACK
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        for states, fault in (
            (_ROLLED_BACK, Fault.ROLLED_BACK),
            (_NOT_CONNECTED, Fault.NOT_CONNECTED),
            (_UNKNOWN, Fault.UNKNOWN),
        ):
            if state in states:
                return fault
        return Fault.NEVER
    if isinstance(error, ConnectionRefusedError | FileNotFoundError):
        return Fault.NOT_CONNECTED
    if isinstance(error, OSError | TimeoutError | asyncpg.InterfaceError | asyncpg.InternalClientError):
        return Fault.UNKNOWN
    return Fault.NEVER


def raise_ours(error: Exception) -> None:
    """Raise kitrocket's error ``from`` the driver's. Without one, return: the caller raises what it caught."""
    ours = translated(error)
    if ours is not error:
        raise ours from error


def translated(error: Exception) -> Exception:
    """Return kitrocket's error for a driver's, which loses its DETAIL here; what has none comes back as it is."""
    if isinstance(error, asyncpg.DataError | asyncpg.CharacterNotInRepertoireError | asyncpg.ProgramLimitExceededError):
        return _unstorable(error)
    if isinstance(error, asyncpg.PostgresError):
        detail, error.detail = getattr(error, "detail", None), None
        error.args = error.args[:1]
        return _for_constraint(error, detail) or _for_connection(error) or error
    if isinstance(error, asyncpg.ClientConfigurationError):
        return ConfigurationError(f"the database's URL cannot be used: {error}")
    if isinstance(error, ssl.SSLError):
        return DatabaseUnavailableError(
            "PostgreSQL's certificate is not trusted here: name its authority with ?sslrootcert=... in the URL, "
            "or encrypt without verifying with ?sslmode=require"
        )
    if isinstance(error, ConnectionError) and "SSL upgrade" in str(error):
        return DatabaseUnavailableError(
            "PostgreSQL offers no TLS; if the network to it is trusted, say so with ?sslmode=disable in the URL"
        )
    if isinstance(error, asyncpg.InterfaceError | asyncpg.InternalClientError | OSError | TimeoutError):
        return DatabaseUnavailableError(f"PostgreSQL cannot be reached, or went away ({type(error).__name__})")
    return error


def _unstorable(error: Exception) -> InvalidInputError:
    # The driver's text quotes the argument, so it is taken out of the error that becomes the cause.
    error.args = ("a value that PostgreSQL cannot store",)
    if isinstance(error, asyncpg.PostgresError):
        error.detail = None
    return InvalidInputError(
        "value", "PostgreSQL cannot store it", "text without NUL bytes or lone surrogates, and numbers in range"
    )


def _for_constraint(error: asyncpg.PostgresError, detail: str | None) -> KitRocketError | None:
    name = getattr(error, "constraint_name", None)
    if not name:
        return None
    known = _BY_CONSTRAINT.get(name) or _BY_CONSTRAINT.get(_SHARD.sub("", name))
    if known is not None:
        return known()
    if isinstance(error, asyncpg.ForeignKeyViolationError) and _USER_KEYS.search(_SHARD.sub("", name)):
        found = _MISSING_USER.search(detail or "")
        return UserNotFoundError(found.group(1) if found else None)
    return None


def _for_connection(error: asyncpg.PostgresError) -> KitRocketError | None:
    if fault_of(error) in (Fault.NOT_CONNECTED, Fault.UNKNOWN) or isinstance(error, asyncpg.InvalidPasswordError):
        return DatabaseUnavailableError(f"PostgreSQL refused or lost the connection ({error.sqlstate})")
    return None
