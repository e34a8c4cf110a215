"""Supabase's roles, which serve schema ``public`` over HTTP to holders of a public key."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from kitrocket.engine import Engine

ROLES = ("anon", "authenticated")


@asynccontextmanager
async def roles(engine: Engine) -> AsyncIterator[None]:
    """Make the roles, which are the server's, until the block is left; it needs the fixture ``turn_with_roles``."""
    async with engine.direct() as connection:
        for role in ROLES:
            await connection.execute(f"CREATE ROLE {role} NOLOGIN")
    try:
        yield
    finally:
        async with engine.direct() as connection:
            for role in ROLES:
                await connection.execute(f"DROP OWNED BY {role}")
                await connection.execute(f"DROP ROLE {role}")


async def grant_everything(engine: Engine) -> None:
    """Grant what Supabase grants the roles on every table of ``public``."""
    async with engine.direct() as connection:
        for role in ROLES:
            await connection.execute(f"GRANT USAGE ON SCHEMA public TO {role}")
            await connection.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")


@asynccontextmanager
async def acting_as(engine: Engine, role: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection that has the rights of a role and no more."""
    async with engine.direct() as connection:
        await connection.execute(f"SET ROLE {role}")
        yield connection
