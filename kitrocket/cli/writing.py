"""What names of others may look like on a terminal, in a file and in a picture.

A model's name and a user's id are text that an application, or its customer, chose: they may hold escape sequences,
marks that turn the direction of writing, or what a spreadsheet takes for a formula.
"""

from __future__ import annotations


def printable(name: str) -> str:
    """Return a name with every character that does not print spelled out, such as ``\\x1b`` or ``\\u202e``."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in name)


def shortened(name: str, width: int) -> str:
    """Return a printable name of at most ``width`` characters; what is left out of its middle is an ellipsis."""
    name = printable(name)
    if len(name) <= width:
        return name
    head = width // 2
    return f"{name[:head]}…{name[len(name) - (width - head - 1) :]}"


def cell(name: str) -> str:
    """Return a printable name that no spreadsheet takes for a formula: what begins like one gets an apostrophe."""
    name = printable(name)
    return f"'{name}" if name.lstrip().startswith(("=", "+", "-", "@")) else name
