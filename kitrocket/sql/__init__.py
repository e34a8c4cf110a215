"""The named statements of the ``.sql`` files in this folder.

A file is a list of statements. Each begins with ``-- name: the_name``, followed by a comment that says what it is
for and what its parameters are, in order. It can be pasted into psql.

The text comes from files of this package alone, never from a caller: values travel as ``$1`` parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from types import MappingProxyType

_HEADING = re.compile(r"^-- name: ([a-z][a-z0-9_]*)$", re.MULTILINE)


def statements(file: str) -> Mapping[str, str]:
    """Return the statements of ``<file>.sql`` by name."""
    _, *parts = _HEADING.split((files(__name__) / f"{file}.sql").read_text(encoding="utf-8"))
    names = parts[::2]
    if len(names) != len(set(names)):
        raise ValueError(f"{file}.sql names a statement twice")
    return MappingProxyType({name: text.strip().rstrip(";") for name, text in zip(names, parts[1::2], strict=True)})


def all_files() -> list[str]:
    """Return the name of every file of statements, without its ending."""
    return sorted(entry.name.removesuffix(".sql") for entry in files(__name__).iterdir() if entry.name.endswith(".sql"))
