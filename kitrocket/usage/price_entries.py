"""Prices as a caller or a file hands them over: checked before any of them is written."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from datetime import date, datetime
from decimal import Context, Decimal
from os import PathLike
from pathlib import Path

from pydantic import BaseModel

from kitrocket.errors import InvalidInputError
from kitrocket.inputs import label, text
from kitrocket.models import ModelPrice

#: The currency where none is given.
CURRENCY = "USD"

_CODE = re.compile("[A-Z]{3}")
_NAMES = frozenset(ModelPrice.model_fields)
_REQUIRED = ("model", "per_million", "valid_from")
#: The largest price and the finest, those of numeric(20, 10).
_LIMIT, _FINEST = Decimal(10) ** 10, Decimal("1E-10")
_WIDE = Context(prec=50)
#: The largest file of prices, in bytes.
_FILE_MAX = 10_000_000


def currency_code(field: str, value: object) -> str:
    """Return the code of a currency: three capital letters, as in ISO 4217."""
    return text(field, value, min=3, max=3, pattern=_CODE)


def day_of(field: str, value: object) -> date:
    """Return a date; a datetime, whose zone would decide which day it is, is refused."""
    if not isinstance(value, date) or isinstance(value, datetime):
        raise InvalidInputError(field, f"it is a {type(value).__name__}", "a date")
    return value


def price_of_a_million(field: str, value: object) -> Decimal:
    """Return a price with at most ten digits before the point and ten after it; a float has lost digits already."""
    expected = "a Decimal from 0 to below 10,000,000,000, of at most 10 decimal places"
    if isinstance(value, int) and not isinstance(value, bool):
        value = Decimal(value)
    if not isinstance(value, Decimal):
        raise InvalidInputError(field, f"it is a {type(value).__name__}", expected)
    if not value.is_finite() or value.is_signed() or value >= _LIMIT:
        raise InvalidInputError(field, "it is out of range", expected)
    fine = value.quantize(_FINEST, context=_WIDE)
    if value != fine:
        raise InvalidInputError(field, "it has too many decimal places", expected)
    return Decimal(f"{fine:f}".rstrip("0").rstrip("."))


def checked_price(
    prefix: str, *, model: object, per_million: object, valid_from: object, currency: object = CURRENCY
) -> ModelPrice:
    """Check a price's values; ``prefix`` stands before their names in an error."""
    return ModelPrice(
        model=label(f"{prefix}model", model),
        currency=currency_code(f"{prefix}currency", currency),
        valid_from=day_of(f"{prefix}valid_from", valid_from),
        per_million=price_of_a_million(f"{prefix}per_million", per_million),
    )


def read_prices(entries: object) -> list[ModelPrice]:
    """Read prices, in the order of their key. One that stands there twice is refused: which one would hold?"""
    if not isinstance(entries, Iterable):
        raise InvalidInputError("prices", f"it is a {type(entries).__name__}", "an iterable of prices")
    found: dict[tuple[str, str, date], tuple[str, ModelPrice]] = {}
    for number, entry in enumerate(entries):
        field = f"prices[{number}]"
        price = _read(field, entry)
        key = (price.model, price.currency, price.valid_from)
        if key in found:
            raise InvalidInputError(
                field, f"it has the model, currency and date of {found[key][0]}", "one price for each of them"
            )
        found[key] = (field, price)
    return [found[key][1] for key in sorted(found)]


def _read(field: str, entry: object) -> ModelPrice:
    values = dict(entry) if isinstance(entry, BaseModel | Mapping) else None
    if values is None:
        raise InvalidInputError(field, f"it is a {type(entry).__name__}", "a ModelPrice or a table with its names")
    if not values.keys() <= _NAMES:
        raise InvalidInputError(field, "it has a name that a price does not have", ", ".join(sorted(_NAMES)))
    for name in _REQUIRED:
        if name not in values:
            raise InvalidInputError(f"{field}.{name}", "it is missing", "a value")
    return checked_price(f"{field}.", **values)


def read_file(path: str | PathLike[str]) -> list[ModelPrice]:
    """Read a TOML file with a table ``[[prices]]`` for each price. Its numbers never pass through a float."""
    expected = "a TOML file with a table [[prices]] for each price"
    try:
        with Path(path).open("rb") as file:
            content = file.read(_FILE_MAX + 1)
    except (OSError, TypeError, ValueError) as error:
        reason = (error.strerror or "").lower() if isinstance(error, OSError) else "no such path can be"
        raise InvalidInputError("path", f"it cannot be read: {reason}", expected) from error
    if len(content) > _FILE_MAX:
        raise InvalidInputError("path", "it is too large", f"at most {_FILE_MAX:,} bytes")
    try:
        tables = tomllib.loads(content.decode(), parse_float=Decimal)
    except UnicodeDecodeError as error:
        raise InvalidInputError("path", "it is not UTF-8", expected) from error
    except (tomllib.TOMLDecodeError, ArithmeticError, RecursionError, ValueError) as error:
        raise InvalidInputError("path", f"it is not TOML: {error}", expected) from error
    if tables.keys() != {"prices"} or not isinstance(tables["prices"], list):
        raise InvalidInputError("path", "it has something else than tables [[prices]], or none", expected)
    return read_prices(tables["prices"])
