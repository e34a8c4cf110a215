"""The only place that reads the time, and the one boundary between Python's datetimes and the columns.

In Python every datetime is timezone-aware; in the columns (``timestamp`` without time zone, as the seed has
them) it is naive UTC. Services receive a :data:`Clock`, read it once per public method and pass the instant on.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

#: A function that answers the present instant as a timezone-aware datetime.
Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """Return the present instant, timezone-aware, in UTC."""
    return datetime.now(UTC)  # noqa: TID251 - the one place that may read the clock


def to_db(instant: datetime) -> datetime:
    """Return ``instant`` as the naive UTC datetime that a column holds.

    Raises ``ValueError`` for a naive datetime: nobody can know which zone it means.
    """
    if instant.tzinfo is UTC:
        return instant.replace(tzinfo=None)
    if instant.tzinfo is None:
        raise ValueError("a naive datetime has no instant; pass a timezone-aware one")
    return instant.astimezone(UTC).replace(tzinfo=None)


def from_db(stored: datetime) -> datetime:
    """Return the naive UTC datetime of a column as a timezone-aware one."""
    return stored.replace(tzinfo=UTC)


def to_milliseconds(instant: datetime) -> datetime:
    """Cut an instant to whole milliseconds, the grain of JavaScript's clock, so that both languages store alike."""
    return instant.replace(microsecond=instant.microsecond // 1000 * 1000)


def db_now(clock: Clock) -> datetime:
    """Return what a clock answers, cut to milliseconds, as a column holds it.

    In one step for a clock in UTC, since this is part of every request.
    """
    instant = clock()
    if instant.tzinfo is not UTC:
        return to_db(to_milliseconds(instant))
    return instant.replace(tzinfo=None, microsecond=instant.microsecond // 1000 * 1000)
