"""Windows of time, and the hours, days and months of a time zone that they are cut into. Pure: no clock, no database.

A window is ``since <= t < until``. Every datetime that leaves this module is in UTC.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from itertools import islice
from typing import Literal, get_args
from zoneinfo import ZoneInfo

from kitrocket.errors import InvalidInputError
from kitrocket.inputs import instant

#: What the time in a window can be cut into.
Grain = Literal["hour", "day", "month"]
#: What a window can be broken down by.
Dimension = Literal["hour", "day", "month", "model"]
#: What a cost can be divided by.
CostDimension = Literal["user", "model", "hour", "day", "month"]

#: How far back a window without a beginning reaches: always 30 times 24 hours, whatever a zone's clocks did meanwhile.
DEFAULT_REACH = timedelta(days=30)
#: The largest number of buckets in one answer.
MAX_BUCKETS = 10_000

_HOUR = timedelta(hours=1)
_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Window:
    """``since <= t < until``; without ``until`` there is no upper bound."""

    since: datetime
    until: datetime | None


def window(*, since: datetime | None, until: datetime | None, now: datetime) -> Window:
    """Return the window that a caller asked for; without ``since``, 30 times 24 hours before ``until`` or ``now``.

    Raises :class:`InvalidInputError` for a naive datetime and when ``since`` is after ``until``.
    """
    end = None if until is None else instant("until", until)
    if since is not None:
        start = instant("since", since)
    else:
        try:
            start = (now.astimezone(UTC) if end is None else end) - DEFAULT_REACH
        except OverflowError as error:
            raise InvalidInputError("until", "it is out of range", "a datetime 30 days into the calendar") from error
    if end is not None and start > end:
        raise InvalidInputError("since", "it is after until", "a datetime that is not after until")
    return Window(start, end)


def month(now: datetime, zone: tzinfo) -> Window:
    """Return the calendar month that the clocks of ``zone`` show at ``now``."""
    first, following = islice(_midnights("month", now, zone), 2)
    return Window(first, following)


def whole_days(window: Window, *, complete_from: date) -> tuple[datetime | None, datetime | None]:
    """Return the UTC midnights between which a window is read as whole days; ``None`` is without end.

    Each is the one nearest to an end of the window, so no more than half a day is left to single calls there: they are
    added where the window reaches further than the days, and subtracted where the days do. No day before
    ``complete_from`` is read whole. Both are ``window.until`` where whole days would save no reading.
    """
    nothing = window.until, window.until
    if complete_from == date.max:
        return nothing
    complete = _midnight(complete_from)
    first = _midnight(window.since)
    if first < window.since and (first < complete or window.since - first >= _DAY / 2):
        if first.date() == date.max:
            return nothing
        first += _DAY
    first = max(first, complete)
    if window.until is None:
        return first, None
    last = _midnight(window.until)
    if window.until - last > _DAY / 2 and last.date() < date.max:
        last += _DAY
    singly = abs(window.since - first) + abs(window.until - last)
    return (first, last) if first < last and singly < window.until - window.since else nothing


def _midnight(day: date) -> datetime:
    """Return the instant at which a day begins in UTC, or that of an instant in UTC."""
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


def time_zone(field: str, name: object) -> tzinfo:
    """Return the time zone with this IANA name, such as ``Europe/Berlin``."""
    expected = "the IANA name of a time zone, such as Europe/Berlin"
    if not isinstance(name, str):
        raise InvalidInputError(field, f"it is a {type(name).__name__}", expected)
    if name == "UTC":  # also where no zone database is installed
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:  # unknown, malformed, the name of a folder
        raise InvalidInputError(field, "there is no such time zone", expected) from error


def dimension(field: str, value: object) -> Dimension:
    """Return what to break down by, or raise :class:`InvalidInputError`."""
    for known in get_args(Dimension):
        if isinstance(value, str) and value == known:
            return known  # type: ignore[no-any-return]  # one of the literal's own values
    raise InvalidInputError(field, "it is none of the possible ones", "one of " + ", ".join(get_args(Dimension)))


def cost_dimensions(field: str, value: object) -> tuple[CostDimension, ...]:
    """Return what to divide a cost by: one dimension or several, of those of time at most one.

    Raises :class:`InvalidInputError` for anything else.
    """
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else (None,)
    known = tuple(one for one in get_args(CostDimension) if one in names)
    if len(known) != len(names) or not known or sum(one in get_args(Grain) for one in known) > 1:
        possible = ", ".join(get_args(CostDimension))
        raise InvalidInputError(
            field, "it is none of the possible ones", f"{possible}; or a tuple of them, with one of time"
        )
    return known


def bucket_starts(window: Window, *, by: Grain, zone: tzinfo, now: datetime) -> list[datetime]:
    """Return where each bucket of the window begins, ascending; the next one's beginning is its end.

    The first begins at ``window.since``, the others where an hour, day or month begins on the clocks of ``zone``. A
    window without ``until`` is cut up to ``now``; its last bucket is open. An empty window has no bucket.

    Where the clocks skip a beginning, the first instant after the gap counts; a day that they skip whole has no bucket.
    Where they show a midnight twice, the first counts; an hour that they show twice is two hours.

    Raises :class:`InvalidInputError` for more than 10,000 buckets.
    """
    if window.since == window.until:
        return []
    starts = [window.since]
    try:
        beginnings = _hours(window.since, zone) if by == "hour" else _midnights(by, window.since, zone)
        for start in beginnings:
            if start >= window.until if window.until is not None else start > now:
                break
            if start > starts[-1]:
                starts.append(start)
            if len(starts) > MAX_BUCKETS:
                raise InvalidInputError(
                    "since", "the window has too many buckets", f"at most {MAX_BUCKETS} of them: a shorter window"
                )
    except OverflowError as error:
        raise InvalidInputError("since", "the window is out of range", "years that the calendar has") from error
    return starts


def _midnights(by: Literal["day", "month"], since: datetime, zone: tzinfo) -> Iterator[datetime]:
    """Yield, without end, the instants at which the days or months of ``zone`` begin, from that of ``since`` on."""
    local = since.astimezone(zone).replace(tzinfo=None, fold=0, hour=0, minute=0, second=0, microsecond=0)
    if by == "month":
        local = local.replace(day=1)
    while True:
        yield _first_instant(local, zone)
        local = (local + 32 * _DAY).replace(day=1) if by == "month" else local + _DAY


def _first_instant(midnight: datetime, zone: tzinfo) -> datetime:
    """Return when the clocks of ``zone`` first show ``midnight``, or in a gap the instant that ends the gap."""
    first = midnight.replace(tzinfo=zone).astimezone(UTC)
    second = midnight.replace(tzinfo=zone, fold=1).astimezone(UTC)
    return _change(second, first, zone) if second < first else first


def _hours(since: datetime, zone: tzinfo) -> Iterator[datetime]:
    """Yield the instants after ``since`` at which the clocks of ``zone`` come to another hour."""
    here = since
    while True:
        local = here.astimezone(zone)
        full = here + _HOUR - timedelta(minutes=local.minute, seconds=local.second, microseconds=local.microsecond)
        if full.astimezone(zone).utcoffset() == local.utcoffset():
            here = full
            yield here
            continue
        here = _change(here, full, zone)
        shown = here.astimezone(zone)
        if shown.hour != local.hour or (shown.minute, shown.second) == (0, 0):
            yield here


def _change(before: datetime, after: datetime, zone: tzinfo) -> datetime:
    """Return the first instant after ``before`` with the offset of ``after``; in between ``zone`` changes it once."""
    offset = after.astimezone(zone).utcoffset()
    low, high = math.floor(before.timestamp()), math.ceil(after.timestamp())
    while high - low > 1:
        middle = (low + high) // 2
        if datetime.fromtimestamp(middle, zone).utcoffset() == offset:
            high = middle
        else:
            low = middle
    return datetime.fromtimestamp(high, UTC)
