"""One refresh for all who wait for it.

A refresh token often works once, so two refreshes at a time can cost the user the link. Inside a process callers join
the flight that is under way; between processes the account's row is the lock, and whoever waited for it finds the
tokens that the other brought.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

import anyio
import asyncpg

from kitrocket.accounts.tokens import sealed
from kitrocket.clock import from_db
from kitrocket.encryption import TokenCipher
from kitrocket.engine import Engine
from kitrocket.errors import InvalidInputError, TokenRefreshError, TransactionError
from kitrocket.models import RefreshedTokens
from kitrocket.sql import statements

#: Asks a provider for new tokens; it is given the refresh token.
Refresh = Callable[[str], Awaitable[RefreshedTokens]]

_SQL = statements("accounts")


class _Flight:
    """A refresh under way. Without an answer its pilot was cancelled, and one of those who wait takes over."""

    def __init__(self) -> None:
        self.landed = anyio.Event()
        self.answer: str | Exception | None = None


class Refresher:
    """Reads access tokens, and refreshes those that are due. A provider has ``limit`` to answer."""

    def __init__(self, engine: Engine, cipher: TokenCipher, *, limit: timedelta) -> None:
        self._engine = engine
        self._cipher = cipher
        self._limit = limit.total_seconds()
        self._flights: dict[str, _Flight] = {}

    async def token(
        self, row: asyncpg.Record, provider: str, refresh: Refresh, *, now: datetime, leeway: timedelta
    ) -> str:
        """Return the access token of an account's row; ``now`` is naive UTC."""
        account_id: str = row["id"]
        while True:
            usable = self._usable(row, now, leeway)
            if usable is not None:
                return usable
            if self._engine.in_transaction():
                raise TransactionError(
                    "an access token is due, and is not refreshed inside a transaction: when that is rolled back, the "
                    "new tokens are lost"
                )
            flight = self._flights.get(account_id)
            if flight is None:
                return await self._pilot(account_id, provider, refresh, now=now, leeway=leeway)
            await flight.landed.wait()
            if isinstance(flight.answer, str):
                return flight.answer
            if isinstance(flight.answer, TokenRefreshError):
                raise TokenRefreshError(provider) from flight.answer.__cause__
            if flight.answer is not None:
                raise flight.answer

    async def _pilot(
        self, account_id: str, provider: str, refresh: Refresh, *, now: datetime, leeway: timedelta
    ) -> str:
        flight = self._flights[account_id] = _Flight()
        try:
            token = await self._refreshed(account_id, provider, refresh, now=now, leeway=leeway)
            flight.answer = token
            return token
        except Exception as error:
            flight.answer = error
            raise
        finally:
            del self._flights[account_id]
            flight.landed.set()

    async def _refreshed(
        self, account_id: str, provider: str, refresh: Refresh, *, now: datetime, leeway: timedelta
    ) -> str:
        async with self._engine.transaction():
            row = await self._engine.fetchrow(_SQL["lock_tokens"], account_id)
            if row is None:
                raise TokenRefreshError(provider)
            usable = self._usable(row, now, leeway)
            if usable is not None:
                return usable
            refresh_token = self._cipher.decrypt(row["refresh_token"])
            if refresh_token is None:
                raise TokenRefreshError(provider)
            try:
                with anyio.fail_after(self._limit):
                    answer = await refresh(refresh_token)
                if not isinstance(answer, RefreshedTokens):
                    raise InvalidInputError("refresh", f"it answered a {type(answer).__name__}", "RefreshedTokens")
                tokens = sealed(
                    self._cipher, answer.access_token, answer.refresh_token, answer.expires_at, from_db(now)
                )
            except Exception as error:
                raise TokenRefreshError(provider) from error
            await self._engine.fetch(_SQL["store_tokens"], account_id, *tokens)
        return answer.access_token

    def _usable(self, row: asyncpg.Record, now: datetime, leeway: timedelta) -> str | None:
        """The access token of a row, unless it must be refreshed first."""
        ends: datetime | None = row["expires_at"]
        can_wait = ends is None or ends - leeway > now or (row["refresh_token"] is None and ends > now)
        return self._cipher.decrypt(row["access_token"]) if can_wait else None
