"""What a public method checks before it touches the database.

Each function takes the argument's name and value, and returns the value as it is stored or raises
:class:`~kitrocket.errors.InvalidInputError`, which never quotes the value: it may be a secret.
"""

from __future__ import annotations

import re
import unicodedata
from datetime import UTC, datetime, timedelta
from typing import cast

from kitrocket.errors import InvalidInputError

#: The longest id, in characters.
ID_MAX = 255
#: The longest e-mail address, in characters.
EMAIL_MAX = 254
#: The longest name of a user, and the longest avatar, in characters.
NAME_MAX, AVATAR_MAX = 200, 2048
#: The largest value of a column of type ``integer``.
INTEGER_MAX = 2_147_483_647

_SURROGATE = re.compile("[\ud800-\udfff]")


def text(field: str, value: object, *, max: int, min: int = 1, pattern: re.Pattern[str] | None = None) -> str:
    """Return ``value`` if PostgreSQL can store it as text of ``min`` to ``max`` characters.

    ``pattern`` must match the whole of it. NUL and lone surrogates are refused.
    """
    # What is expected is put into words only for an error: this is part of every request.
    problem = _text_problem(value, max, min, pattern)
    if problem is not None:
        expected = f"text of {min} to {max} characters" if min else f"text of at most {max} characters"
        if pattern is not None:
            expected += f" that matches {pattern.pattern}"
        raise InvalidInputError(field, problem, expected)
    return cast("str", value)


def _text_problem(value: object, max: int, min: int, pattern: re.Pattern[str] | None) -> str | None:
    if not isinstance(value, str):
        return f"it is a {type(value).__name__}"
    if len(value) < min:
        return "it is too short" if value else "it is empty"
    if len(value) > max:
        return "it is too long"
    if "\0" in value:
        return "it has a NUL character"
    if not value.isascii() and _SURROGATE.search(value):
        return "it has a lone surrogate"
    if pattern is not None and pattern.fullmatch(value) is None:
        return "it has a character that is not allowed"
    return None


def identifier(field: str, value: object) -> str:
    """Return ``value`` if it can be an id: text of 1 to 255 characters."""
    return text(field, value, max=ID_MAX)


def normalised_email(address: str) -> str:
    """Return an e-mail address in the form that is stored and looked up: stripped, NFC, lower case.

    NFC comes once more at the end, since lower case can leave a letter apart from its accent.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", address.strip()).lower())


def email(field: str, value: object) -> str:
    """Return a valid e-mail address, normalised: one ``@``, text on both sides, no space or control character."""
    expected = f"an e-mail address such as name@example.com, of at most {EMAIL_MAX} characters"
    # Normalising costs time in proportion, so what is hopelessly long never gets there.
    address = normalised_email(text(field, value, max=4 * EMAIL_MAX))
    before, at, after = address.partition("@")
    if not (before and at and after) or "@" in after:
        raise InvalidInputError(field, "it is not name@domain", expected)
    if any(character.isspace() or unicodedata.category(character) == "Cc" for character in address):
        raise InvalidInputError(field, "it has a space or a control character", expected)
    if len(address) > EMAIL_MAX:
        raise InvalidInputError(field, "it is too long", expected)
    return address


def instant(field: str, value: object) -> datetime:
    """Return a timezone-aware datetime, in UTC."""
    expected = "a timezone-aware datetime"
    if not isinstance(value, datetime):
        raise InvalidInputError(field, f"it is a {type(value).__name__}", expected)
    if value.utcoffset() is None:
        raise InvalidInputError(field, "it has no time zone", expected)
    try:
        return value.astimezone(UTC)
    except OverflowError as error:
        raise InvalidInputError(
            field, "it is out of range", "a datetime between the years 1 and 9999 in UTC"
        ) from error


def duration(
    field: str, value: object, *, min: timedelta = timedelta(0), max: timedelta = timedelta(days=36_500)
) -> timedelta:
    """Return a ``timedelta`` from ``min`` to ``max``."""
    expected = f"a timedelta from {min} to {max}"
    if not isinstance(value, timedelta):
        raise InvalidInputError(field, f"it is a {type(value).__name__}", expected)
    if not min <= value <= max:
        raise InvalidInputError(field, "it is out of range", expected)
    return value


def whole_number(field: str, value: object, *, min: int = 0, max: int = INTEGER_MAX) -> int:
    """Return an ``int`` from ``min`` to ``max``; neither a ``bool`` nor a ``float`` is one."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidInputError(field, f"it is a {type(value).__name__}", f"an int from {min} to {max}")
    if not min <= value <= max:
        raise InvalidInputError(field, "it is out of range", f"an int from {min} to {max}")
    return value


def flag(field: str, value: object) -> bool:
    """Return a ``bool``."""
    if not isinstance(value, bool):
        raise InvalidInputError(field, f"it is a {type(value).__name__}", "True or False")
    return value


def secret(field: str, value: object) -> str:
    """Return a presented secret: any text. Junk in it is ordinary absence, only another type is an error."""
    if not isinstance(value, str):
        raise InvalidInputError(field, f"it is a {type(value).__name__}", "text")
    return value


def label(field: str, value: object) -> str:
    """Return text of 1 to 255 characters that is more than white space."""
    # What nearly every label is first, at a third of the time: they are part of every call that is recorded.
    if (
        isinstance(value, str)
        and 0 < len(value) <= ID_MAX
        and value.isascii()
        and value.isprintable()
        and value.strip()
    ):
        return value
    found = identifier(field, value)
    if not found.strip():
        raise InvalidInputError(field, "it is blank", f"text of 1 to {ID_MAX} characters, not only white space")
    return found
