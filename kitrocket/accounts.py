"""Accounts: the ways in that a user has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import asyncpg

from kitrocket import inputs
from kitrocket.clock import Clock, from_db, to_db, to_milliseconds, utc_now
from kitrocket.encryption import TokenCipher
from kitrocket.engine import Engine
from kitrocket.errors import AccountTakenError, InvalidInputError, LastAccountError, UserNotFoundError
from kitrocket.ids import new_id
from kitrocket.models import Account
from kitrocket.sql import statements

#: The longest OAuth token, in bytes.
TOKEN_MAX = 16 * 1024

_PROVIDER = re.compile("[a-z0-9_-]{1,64}")
_SQL = statements("accounts")


class AccountService:
    """Identities at OAuth providers, and the credential account beside them.

    ``clock`` answers the present instant, timezone-aware; what is stored is cut to whole milliseconds. ``token_keys``
    are Fernet keys that encrypt OAuth tokens at rest: the first writes, all of them read; without any, tokens are
    stored plain. Raises :class:`ConfigurationError` for a key that is none.
    """

    def __init__(self, engine: Engine, *, clock: Clock = utc_now, token_keys: Sequence[str] = ()) -> None:
        self._engine = engine
        self._clock = clock
        self._cipher = TokenCipher(token_keys)

    async def link(
        self,
        user_id: str,
        *,
        provider: str,
        provider_account_id: str,
        access_token: str | None = None,
        refresh_token: str | None = None,
        expires_at: datetime | None = None,
    ) -> Account:
        """Give a user who is signed in an identity at a provider, such as ``"github"``, as another way in.

        An identity that the user already has gets the new tokens; a token left out stays as it was, and ``expires_at``
        (timezone-aware) belongs to the access token. Raises :class:`AccountTakenError` when it is another user's,
        :class:`UserNotFoundError` and :class:`InvalidInputError`.
        """
        now = to_milliseconds(self._clock())
        inputs.identifier("user_id", user_id)
        identity = (_provider(provider), inputs.identifier("provider_account_id", provider_account_id))
        tokens = (
            self._cipher.encrypt(_token("access_token", access_token), now),
            self._cipher.encrypt(_token("refresh_token", refresh_token), now),
            None if expires_at is None else to_db(inputs.instant("expires_at", expires_at)),
        )

        async def insert_or_refresh() -> Account:
            async with self._engine.transaction():
                await self._engine.fetch(_SQL["lock_identity"], " ".join(identity))
                await self._lock_user(user_id)
                row = await self._engine.fetchrow(
                    _SQL["insert_account"], new_id(), user_id, *identity, *tokens, to_db(now)
                ) or await self._engine.fetchrow(_SQL["refresh_tokens"], user_id, *identity, *tokens)
                if row is None:
                    raise AccountTakenError
            return _account(row)

        return await self._engine.retry(insert_or_refresh)

    async def list(self, user_id: str) -> Sequence[Account]:
        """Return a user's accounts, oldest first; an empty list for an unknown user."""
        rows = await self._engine.fetch(_SQL["accounts_of_user"], inputs.identifier("user_id", user_id))
        return [_account(row) for row in rows]

    async def unlink(self, user_id: str, account_id: str) -> bool:
        """Take an account away, and return whether the user had it.

        The last way in stays, with :class:`LastAccountError`: the last account at a provider, or with a password.
        Raises :class:`UserNotFoundError`.
        """
        inputs.identifier("user_id", user_id)
        inputs.identifier("account_id", account_id)

        async def remove() -> bool:
            async with self._engine.transaction():
                await self._lock_user(user_id)
                rows = await self._engine.fetch(_SQL["lock_accounts"], user_id)
                ways_in = [row["id"] for row in rows if row["is_way_in"]]
                if ways_in == [account_id]:
                    raise LastAccountError(user_id, account_id)
                return bool(await self._engine.fetch(_SQL["delete_account"], account_id, user_id))

        return await self._engine.retry(remove)

    async def _lock_user(self, user_id: str) -> None:
        if await self._engine.fetchrow(_SQL["lock_user"], user_id) is None:
            raise UserNotFoundError(user_id)


def _provider(value: object) -> str:
    provider = inputs.text("provider", value, max=64, pattern=_PROVIDER)
    if provider == "credential":
        raise InvalidInputError(
            "provider", "a credential account comes with a password", "the name of an OAuth provider"
        )
    return provider


def _token(field: str, value: object) -> str | None:
    if value is None:
        return None
    token = inputs.text(field, value, max=TOKEN_MAX)
    if len(token.encode()) > TOKEN_MAX:
        raise InvalidInputError(field, "it is too long", f"text of at most {TOKEN_MAX} bytes")
    return token


def _account(row: asyncpg.Record | dict[str, Any]) -> Account:
    expires_at = row["expires_at"]
    return Account(
        id=row["id"],
        user_id=row["user_id"],
        provider=row["provider"],
        provider_account_id=row["provider_account_id"],
        expires_at=None if expires_at is None else from_db(expires_at),
        has_password=row["has_password"],
        created_at=from_db(row["created_at"]),
    )
