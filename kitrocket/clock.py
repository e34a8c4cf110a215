"""The only place that reads the time, and the one boundary between Python's datetimes and the columns.

In Python every datetime is timezone-aware; in the columns (``timestamp`` without time zone, as the seed has
them) it is naive UTC. Services receive a :data:`Clock`, read it once per public method and pass the instant on.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

#: The Unix epoch in Python and in a column. To add what lies between takes a tenth of the time of datetime.replace.
_EPOCH, _STORED_EPOCH = datetime(1970, 1, 1, tzinfo=UTC), datetime(1970, 1, 1)  # noqa: DTZ001 - as a column holds it
_MILLISECOND = timedelta(milliseconds=1)

#: A function that answers the present instant as a timezone-aware datetime.
Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """Return the present instant, timezone-aware, in UTC."""
    return datetime.now(UTC)  # noqa: TID251 - the one place that may read the clock


def to_db(instant: datetime) -> datetime:
    """Return ``instant`` as the naive UTC datetime that a column holds.

    Raises ``ValueError`` for a naive datetime: nobody can know which zone it means.
    """
    if instant.tzinfo is None:
        raise ValueError("a naive datetime has no instant; pass a timezone-aware one")
    return _STORED_EPOCH + (instant - _EPOCH)


def from_db(stored: datetime) -> datetime:
    """Return the naive UTC datetime of a column as a timezone-aware one."""
    return stored.replace(tzinfo=UTC)


def to_milliseconds(instant: datetime) -> datetime:
    """Cut an instant to whole milliseconds, the grain of JavaScript's clock, so that both languages store alike."""
    return instant.replace(microsecond=instant.microsecond // 1000 * 1000)


def db_now(clock: Clock) -> datetime:
    """Return what a clock answers, cut to milliseconds, as a column holds it."""
    return _STORED_EPOCH + (clock() - _EPOCH) // _MILLISECOND * _MILLISECOND
