"""Every named statement is understood by the migrated schema."""

from __future__ import annotations

import pytest

from kitrocket.engine import Engine
from kitrocket.sql import all_files, statements

pytestmark = pytest.mark.asyncio(loop_scope="session")

NAMES = [(file, name) for file in all_files() for name in statements(file)]


@pytest.mark.parametrize(("file", "name"), NAMES, ids=lambda value: str(value))
async def test_postgresql_prepares_it(engine: Engine, file: str, name: str) -> None:
    async with engine.transaction() as transaction:
        await transaction.connection.prepare(statements(file)[name])
