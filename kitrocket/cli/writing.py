"""What names of others may look like on a terminal, in a file and in a picture.

A model's name and a user's id are text that an application, or its customer, chose: they may hold escape sequences,
marks that turn the direction of writing, or what a spreadsheet takes for a formula.
"""

from __future__ import annotations

from decimal import Decimal
from math import ceil
from unicodedata import combining, east_asian_width

from rich.bar import Bar
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text


def printable(name: str) -> str:
    """Return a name with every character that does not print spelled out, such as ``\\x1b`` or ``\\u202e``."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in name)


def letters(name: str) -> int:
    """Return how many columns of a terminal a printable name takes: wide letters take two, combining marks none."""
    return sum(0 if combining(one) else 2 if east_asian_width(one) in "WF" else 1 for one in name)


def shortened(name: str, width: int) -> str:
    """Return a printable name of at most ``width`` columns; what is left out of its middle is an ellipsis."""
    name = printable(name)
    if letters(name) <= width:
        return name
    head = _within(name, width // 2)
    tail = _within(name[::-1], width - width // 2 - 1)[::-1]
    return f"{head}…{tail}"


def _within(name: str, width: int) -> str:
    """Return as much of a name's beginning as fits."""
    end = taken = 0
    while end < len(name) and taken + letters(name[end]) <= width:
        taken += letters(name[end])
        end += 1
    return name[:end]


def cell(name: str) -> str:
    """Return a printable name that no spreadsheet takes for a formula: what begins like one gets an apostrophe."""
    name = printable(name)
    return f"'{name}" if name.lstrip().startswith(("=", "+", "-", "@")) else name


class ValueBar:
    """A bar from zero, as long as ``value`` is beside ``largest``; what is not zero shows at least a sliver."""

    def __init__(self, value: int | Decimal, largest: int | Decimal, width: int) -> None:
        self._share = max(float(value) / float(largest), 1 / (8 * width)) if value else 0.0
        self._width = width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it in eighths of a letter, or in whole ones where the encoding has no others."""
        if options.ascii_only:
            yield Text("#" * ceil(self._share * self._width))
        else:
            yield Bar(1.0, 0.0, self._share, width=self._width)
