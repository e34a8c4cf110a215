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
            raise refusal("a", f"it cannot be stored; expected {error.expected}") from None
        except KitRocketError as error:
            raise refusal("a", str(error)) from None
        except asyncpg.PostgresError as error:
            if (error.sqlstate or "")[:2] not in ("22", "23"):
                raise
            raise _explained(error) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def refusal(field: str, problem: str) -> HTTPException:
    """Return a 422 in the form that the Studio shows in words: "<field> field - <problem>"."""
    return HTTPException(422, [{"loc": ["body", field], "msg": problem, "type": "value_error"}])  # type: ignore[arg-type]  # FastAPI's form


def _explained(error: asyncpg.PostgresError) -> HTTPException:
    """Say what is wrong without the driver's text, which may quote a value."""
    constraint = getattr(error, "constraint_name", None)
    field = getattr(error, "column_name", None) or constraint or "a"
    if isinstance(error, asyncpg.NotNullViolationError):
        return refusal(field, "it may not be empty")
    if isinstance(error, asyncpg.UniqueViolationError):
        return refusal(field, "another row already has this value")
    if isinstance(error, asyncpg.ForeignKeyViolationError):
        return refusal(field, "the row it refers to does not exist, or is still in use")
    return refusal(field, "not a value that this column or query can take")
