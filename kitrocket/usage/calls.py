"""AI calls as a caller hands them over: checked, and given an id and a time before the first attempt to write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

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


@dataclass(frozen=True, slots=True)
class Call:
    """A call as it is to be written.

    ``is_given`` says that the id is the caller's, so that it may be known already; ``is_late`` that the call may lie in
    a pruned day. ``prefix`` stands before the names of its values in an error.
    """

    id: str
    user_id: str
    tokens: int
    model: str
    at: datetime
    is_given: bool
    is_late: bool
    prefix: str

    def is_recorded_as(self, row: asyncpg.Record) -> bool:
        """Whether a row with this call's id is this call; its time need not be equal."""
        return (self.user_id, self.tokens, self.model) == (row["user_id"], row["tokens_used"], row["model"])

    def is_same_as(self, other: Call) -> bool:
        """Whether two calls with one id are one call."""
        return (self.user_id, self.tokens, self.model) == (other.user_id, other.tokens, other.model)


def checked(
    prefix: str, *, now: datetime, user_id: object, tokens: object, model: object, id: object = None, at: object = None
) -> Call:
    """Check a call's values; ``prefix`` stands before their names in an error."""
    when = now if at is None else instant(f"{prefix}at", at)
    if when > now + FUTURE_LIMIT:
        raise InvalidInputError(f"{prefix}at", "it is in the future", "a time at most 5 minutes ahead of the clock")
    return Call(
        user_id=label(f"{prefix}user_id", user_id),
        tokens=whole_number(f"{prefix}tokens", tokens),
        model=label(f"{prefix}model", model),
        id=new_usage_id(now) if id is None else label(f"{prefix}id", id),
        at=when,
        is_given=id is not None,
        is_late=when < now - LATE_AFTER,
        prefix=prefix,
    )


def read(field: str, entry: object, now: datetime) -> Call:
    """Read an entry of ``record_many``."""
    values = dict(entry) if isinstance(entry, BaseModel | Mapping) else None
    if values is None:
        raise InvalidInputError(
            field, f"it is a {type(entry).__name__}", "a UsageEntry or a mapping with record's names"
        )
    if not values.keys() <= _NAMES:
        raise InvalidInputError(field, "it has a name that record does not know", ", ".join(sorted(_NAMES)))
    for name in _REQUIRED:
        if name not in values:
            raise InvalidInputError(f"{field}.{name}", "it is missing", "a value")
    return checked(f"{field}.", now=now, **values)


def columns(calls: Sequence[Call]) -> tuple[list[str], list[str], list[int], list[str], list[datetime]]:
    """Return the arguments of the statement that inserts them."""
    return (
        [call.id for call in calls],
        [call.user_id for call in calls],
        [call.tokens for call in calls],
        [call.model for call in calls],
        [to_db(call.at) for call in calls],
    )
