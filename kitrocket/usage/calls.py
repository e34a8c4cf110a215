"""AI calls as a caller hands them over: checked, and given an id and a time before the first attempt to write them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import NamedTuple

import asyncpg
from pydantic import BaseModel

from kitrocket.clock import to_db
from kitrocket.errors import InvalidInputError
from kitrocket.ids import new_usage_id
from kitrocket.inputs import instant, label, whole_number
from kitrocket.models import UsageEntry

#: How far ahead of the clock a call may be dated: clocks of several machines differ a little.
FUTURE_LIMIT = timedelta(minutes=5)
#: How old a call is that may lie in a day whose single rows were pruned. Pruning keeps at least a day.
LATE_AFTER = timedelta(hours=12)

_NAMES = frozenset(UsageEntry.model_fields)
_REQUIRED = ("user_id", "tokens", "model")


class Call(NamedTuple):
    """A call as it is to be written.

    ``is_given`` says that the id is the caller's, so that it may be known already; ``is_late`` that the call may lie in
    a pruned day. ``prefix`` stands before the names of its values in an error. ``settles`` says that it was reserved
    under its id: the reservation goes with the commit, and what was recorded of it before may be less or more.
    """

    id: str
    user_id: str
    tokens: int
    model: str
    at: datetime
    is_given: bool
    is_late: bool
    prefix: str = ""
    settles: bool = False

    def is_recorded_as(self, row: asyncpg.Record) -> bool:
        """Whether a row with this call's id is this call; its time need not be equal."""
        if self.settles:
            return (self.user_id, self.model) == (row["user_id"], row["model"])
        return (self.user_id, self.tokens, self.model) == (row["user_id"], row["tokens_used"], row["model"])

    def is_same_as(self, other: Call) -> bool:
        """Whether two calls with one id are one call."""
        return (self.user_id, self.tokens, self.model) == (other.user_id, other.tokens, other.model)


def checked(
    *, now: datetime, user_id: object, tokens: object, model: object, id: object = None, at: object = None
) -> Call:
    """Check a call's values."""
    when, is_late = now, False
    if at is not None:
        when = instant("at", at)
        if when > now + FUTURE_LIMIT:
            raise InvalidInputError("at", "it is in the future", "a time at most 5 minutes ahead of the clock")
        is_late = when < now - LATE_AFTER
    return Call(
        new_usage_id(now) if id is None else label("id", id),
        label("user_id", user_id),
        whole_number("tokens", tokens),
        label("model", model),
        when,
        id is not None,
        is_late,
    )


def read_all(entries: Iterable[object], now: datetime) -> Iterator[Call]:
    """Read the entries of ``record_many``: an error's field names the entry."""
    for number, entry in enumerate(entries):
        # Names are made only for an error: there may be 50,000 entries.
        try:
            call = _read(entry, now)
        except InvalidInputError as error:
            field = ".".join(filter(None, (f"entries[{number}]", error.field)))
            raise InvalidInputError(field, error.problem, error.expected) from None
        yield call._replace(prefix=f"entries[{number}].") if call.is_late else call


def _read(entry: object, now: datetime) -> Call:
    if isinstance(entry, dict):
        values = entry
    elif isinstance(entry, BaseModel | Mapping):
        values = dict(entry)
    else:
        raise InvalidInputError("", f"it is a {type(entry).__name__}", "a UsageEntry or a mapping with record's names")
    if not values.keys() <= _NAMES:
        raise InvalidInputError("", "it has a name that record does not know", ", ".join(sorted(_NAMES)))
    for name in _REQUIRED:
        if name not in values:
            raise InvalidInputError(name, "it is missing", "a value")
    return checked(now=now, **values)


#: The columns of the table, in the order of :func:`rows_of`.
COLUMNS = ("id", "user_id", "tokens_used", "model", "created_at")


def rows_of(calls: Iterable[Call]) -> Iterator[tuple[str, str, int, str, datetime]]:
    """Yield calls as rows of the table."""
    for call in calls:
        yield (call.id, call.user_id, call.tokens, call.model, to_db(call.at))
