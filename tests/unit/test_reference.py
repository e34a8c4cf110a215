"""The reference says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from kitrocket import errors
from kitrocket.ddl import SEED_INDEXES
from kitrocket.settings import Settings
from kitrocket.tables import OWN_TABLES, SEED_TABLES

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def rows(page: str) -> dict[str, list[str]]:
    """Return the cells of a page's tables, by the code in the first cell."""
    text = (REFERENCE / page).read_text(encoding="utf-8")
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {cells[0].strip(" `"): [cell.strip(" `") for cell in cells[1:]] for cells in lines}


@pytest.mark.parametrize("name", Settings.model_fields)
def test_a_setting_has_its_variable_and_its_default(name: str) -> None:
    variable, default, *_ = rows("settings.md")[name]
    own = name.startswith(("database_", "dodo_payments_"))
    assert variable == name.upper() if own else variable == f"KITROCKET_{name.upper()}"
    field = Settings.model_fields[name]
    shown = TypeAdapter(field.rebuild_annotation()).dump_python(field.default, mode="json")
    assert default.replace('"', "'") == ("none" if shown is None else str(shown))


@pytest.mark.parametrize("table", [*SEED_TABLES, *OWN_TABLES])
def test_a_table_is_described(table: type) -> None:
    name = table._meta.tablename  # type: ignore[attr-defined]
    cells = rows("tables.md")[name]
    if table in SEED_TABLES:
        described = re.findall(r"`(\w+)`", cells[0] if cells[0].startswith("`") else f"`{cells[0]}`")
        assert described == [column._meta.name for column in table._meta.columns]  # type: ignore[attr-defined]


@pytest.mark.parametrize("index", SEED_INDEXES, ids=lambda index: index.name)
def test_an_index_is_described(index: object) -> None:
    described = rows("tables.md")[index.name][0]  # type: ignore[attr-defined]
    unique = index.duplicates is not None  # type: ignore[attr-defined]
    assert described.replace("`", "").removesuffix(", unique") == f"{index.table} {index.definition}"  # type: ignore[attr-defined]
    assert described.endswith(", unique") == unique


@pytest.mark.parametrize(
    "error",
    [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.WebhookError)],
)
def test_an_error_of_a_webhook_has_its_status(error: type[errors.WebhookError]) -> None:
    status = rows("errors.md")[error.__name__][0]
    assert status == ("none" if error is errors.WebhookError else str(error.status_code))
