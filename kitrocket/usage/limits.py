"""Limits as a caller hands them over: checked, and given the instant from which on calls count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from kitrocket.clock import to_db
from kitrocket.errors import InvalidInputError
from kitrocket.inputs import duration, whole_number
from kitrocket.models import Limit, LimitWindow
from kitrocket.usage.sums import Sums
from kitrocket.windows import month

#: The largest limit, in tokens.
LIMIT_MAX = 10**15
#: The most limits, and the most thresholds, of one reservation.
COUNT_MAX = 16
#: The largest threshold, in percent: a call may use more than it reserved.
PERCENT_MAX = 1000

_MICROSECOND = timedelta(microseconds=1)
_WINDOW_MIN, _WINDOW_MAX = timedelta(seconds=1), timedelta(days=3_660)


@dataclass(frozen=True, slots=True)
class Quota:
    """A limit at an instant: calls from ``since`` on count. A period ends at ``until``; a sliding window never does."""

    tokens: int
    window: LimitWindow
    since: datetime
    until: datetime | None

    @property
    def key(self) -> str:
        """What names the limit among a user's alerts."""
        return f"{self.tokens} in {self.window}"

    @property
    def period_start(self) -> datetime:
        """Where the period began, as a column holds it; a sliding window has always been."""
        return datetime.min if self.until is None else to_db(self.since)  # noqa: DTZ901 - the driver's -infinity

    @property
    def reach(self) -> timedelta | None:
        """How long after a call it no longer counts, at first; ``None`` for a period."""
        return self.window + _MICROSECOND if isinstance(self.window, timedelta) else None


def checked_limits(limit: object, window: object, limits: object) -> list[Limit]:
    """Return all limits of a call; ``limit`` with its ``window`` is one of them."""
    if isinstance(limits, str | bytes) or not isinstance(limits, Iterable):
        raise InvalidInputError("limits", f"it is a {type(limits).__name__}", "an iterable of Limit")
    found = [] if limit is None else [_checked("", "limit", limit, window)]
    for number, one in enumerate(limits):
        if not isinstance(one, Limit):
            raise InvalidInputError(f"limits[{number}]", f"it is a {type(one).__name__}", "a Limit")
        found.append(_checked(f"limits[{number}].", f"limits[{number}].tokens", one.tokens, one.window))
    if len(found) > COUNT_MAX:
        raise InvalidInputError("limits", "they are too many", f"at most {COUNT_MAX}")
    return found


def _checked(prefix: str, field: str, tokens: object, window: object) -> Limit:
    tokens = whole_number(field, tokens, max=LIMIT_MAX)
    if window == "month" or window == "billing":
        return Limit(tokens=tokens, window="month" if window == "month" else "billing")
    if isinstance(window, str):
        raise InvalidInputError(f"{prefix}window", "there is no such period", "a timedelta, month or billing")
    return Limit(tokens=tokens, window=duration(f"{prefix}window", window, min=_WINDOW_MIN, max=_WINDOW_MAX))


def checked_thresholds(thresholds: object) -> list[int]:
    """Return percentages, ascending."""
    if isinstance(thresholds, str | bytes) or not isinstance(thresholds, Iterable):
        raise InvalidInputError("thresholds", f"it is a {type(thresholds).__name__}", "an iterable of percentages")
    found = {
        whole_number(f"thresholds[{number}]", one, min=1, max=PERCENT_MAX) for number, one in enumerate(thresholds)
    }
    if len(found) > COUNT_MAX:
        raise InvalidInputError("thresholds", "they are too many", f"at most {COUNT_MAX}")
    return sorted(found)


async def quotas(sums: Sums, user_id: str, limits: Sequence[Limit], now: datetime) -> list[Quota]:
    """Return the limits as they stand at ``now``. Raises :class:`NoBillingPeriodError`."""
    found: list[Quota] = []
    for limit in limits:
        if isinstance(limit.window, timedelta):
            found.append(Quota(limit.tokens, limit.window, now - limit.window, None))
        elif limit.window == "month":
            this = month(now, UTC)
            found.append(Quota(limit.tokens, limit.window, this.since, this.until))
        else:
            billed = await sums.billing_period(user_id)
            found.append(Quota(limit.tokens, limit.window, billed.since, billed.until))
    return found
