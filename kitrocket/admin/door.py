"""How the Studio reaches PostgreSQL: the kit's own engine, and answers instead of tracebacks."""

from __future__ import annotations

import logging
from typing import Any

import asyncpg
from piccolo.querystring import QueryString
from starlette.exceptions import HTTPException

from kitrocket.engine import Engine
from kitrocket.errors import DatabaseError, InvalidInputError, KitRocketError

logger = logging.getLogger("kitrocket")


class Door:
    """What the Studio's tables have in ``_meta.db``: Piccolo's queries, run on the kit's engine.

    Piccolo Admin answers a database error with a 500 and writes the row that failed to the log. Here what the
    sender got wrong is a 422 that names the column, what PostgreSQL got wrong a 503, and no value is quoted.
    """

    engine_type = "postgres"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def run_querystring(self, querystring: QueryString, in_pool: bool = True) -> list[asyncpg.Record]:
        """Run one query. Raises ``HTTPException``."""
        template, arguments = querystring.compile_string(engine_type=self.engine_type)
        try:
            return await self._engine.fetch(template, *arguments)
        except DatabaseError as error:
            logger.error("the Studio cannot reach the database: %s", error)
            raise HTTPException(503, "The database is away; try again.", {"retry-after": "5"}) from None
        except InvalidInputError as error:
            raise HTTPException(422, f"A value cannot be stored: expected {error.expected}.") from None
        except KitRocketError as error:
            raise HTTPException(422, str(error)) from None
        except asyncpg.PostgresError as error:
            if (error.sqlstate or "")[:2] not in ("22", "23"):
                raise
            raise HTTPException(422, _explained(error)) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def _explained(error: asyncpg.PostgresError) -> str:
    """Say what is wrong without the driver's text, which may quote a value."""
    column = getattr(error, "column_name", None)
    constraint = getattr(error, "constraint_name", None)
    if isinstance(error, asyncpg.NotNullViolationError):
        return f"{column} may not be empty."
    if isinstance(error, asyncpg.UniqueViolationError):
        return f"Another row already has this value ({constraint})."
    if isinstance(error, asyncpg.ForeignKeyViolationError):
        return f"The row it refers to does not exist, or is still in use ({constraint})."
    if constraint:
        return f"The value is not allowed ({constraint})."
    return "A value is not one that this column or query can take."
