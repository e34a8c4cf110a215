"""What an application does with the ways in that users have."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import get_args

from kitrocket import inputs
from kitrocket.accounts.arrivals import Arrival, Arrivals, OnUnverifiedLocal
from kitrocket.accounts.refreshing import Refresh, Refresher
from kitrocket.accounts.tokens import checked_provider, sealed
from kitrocket.clock import Clock, to_db, to_milliseconds, utc_now
from kitrocket.encryption import TokenCipher
from kitrocket.engine import Engine
from kitrocket.errors import (
    AccountNotFoundError,
    AccountTakenError,
    InvalidInputError,
    LastAccountError,
    UserNotFoundError,
)
from kitrocket.ids import new_id
from kitrocket.models import Account, ProviderSignIn
from kitrocket.rotation import Revoke, Rotation, checked_keep, checked_revoke
from kitrocket.rows import account_from_row
from kitrocket.sql import statements

_SQL = statements("accounts")


class AccountService:
    """Identities at OAuth providers, and the credential account beside them.

    ``clock`` answers the present instant, timezone-aware; what is stored is cut to whole milliseconds. ``token_keys``
    are Fernet keys that encrypt OAuth tokens at rest: the first writes, all of them read; without any, tokens are
    stored plain. What a provider in ``trusted_providers`` says of an e-mail address counts, verified or not.
    ``on_unverified_local`` is what :meth:`sign_in` does about a user who never proved the address that a provider
    verified for somebody: ``"refuse"`` or ``"take_over"``. ``refresh_limit`` is how long a provider may take to refresh
    a token. ``rotation`` is ``SessionService.rotation`` of a service whose arguments are not the defaults.

    Raises :class:`ConfigurationError` for a key that is none, :class:`InvalidInputError` for the others.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        clock: Clock = utc_now,
        token_keys: Sequence[str] = (),
        trusted_providers: Collection[str] = (),
        on_unverified_local: OnUnverifiedLocal = "refuse",
        refresh_limit: timedelta = timedelta(seconds=10),
        rotation: Rotation | None = None,
    ) -> None:
        if on_unverified_local not in get_args(OnUnverifiedLocal):
            raise InvalidInputError("on_unverified_local", "it is unknown", '"refuse" or "take_over"')
        self._engine = engine
        self._clock = clock
        self._cipher = TokenCipher(token_keys)
        self._trusted = frozenset(checked_provider(provider) for provider in trusted_providers)
        self._rotation = rotation or Rotation(engine)
        self._arrivals = Arrivals(engine, take_over=on_unverified_local == "take_over")
        self._refresher = Refresher(
            engine, self._cipher, limit=inputs.duration("refresh_limit", refresh_limit, min=timedelta(milliseconds=1))
        )

    async def link(
        self,
        user_id: str,
        *,
        provider: str,
        provider_account_id: str,
        access_token: str | None = None,
        refresh_token: str | None = None,
        expires_at: datetime | None = None,
        keep: str | None = None,
        revoke: Revoke = "none",
    ) -> Account:
        """Give a user who is signed in an identity at a provider, such as ``"github"``, as another way in.

        An identity that the user already has gets the new tokens; a token left out stays as it was, and ``expires_at``
        (timezone-aware) belongs to the access token. ``revoke="others"`` ends, in the same transaction, the user's
        sessions but the one whose token is ``keep``, which stays as it is; ``"all"`` ends all of them. Raises
        :class:`AccountTakenError` when it is another user's, :class:`UserNotFoundError` and :class:`InvalidInputError`.
        """
        now = to_milliseconds(self._clock())
        inputs.identifier("user_id", user_id)
        identity = (checked_provider(provider), inputs.identifier("provider_account_id", provider_account_id))
        tokens = sealed(self._cipher, access_token, refresh_token, expires_at, now)
        kept, ending = checked_keep(keep), checked_revoke(revoke)

        async def insert_or_refresh() -> Account:
            async with self._engine.transaction():
                await self._engine.fetch(_SQL["lock_identity"], " ".join(identity))
                await self._lock_user(user_id)
                row = await self._engine.fetchrow(
                    _SQL["insert_account"], new_id(), user_id, *identity, *tokens, to_db(now)
                ) or await self._engine.fetchrow(_SQL["refresh_tokens"], user_id, *identity, *tokens)
                if row is None:
                    raise AccountTakenError
                await self._rotation.revoke(user_id, keep=kept, revoke=ending)
            return account_from_row(row)

        return await self._engine.retry(insert_or_refresh)

    async def list(self, user_id: str) -> Sequence[Account]:
        """Return a user's accounts, oldest first; an empty list for an unknown user."""
        rows = await self._engine.fetch(_SQL["accounts_of_user"], inputs.identifier("user_id", user_id))
        return [account_from_row(row) for row in rows]

    async def unlink(self, user_id: str, account_id: str, *, keep: str | None = None, revoke: Revoke = "none") -> bool:
        """Take an account away, and return whether the user had it.

        The last way in stays, with :class:`LastAccountError`: the last account at a provider, or with a password.
        ``keep`` and ``revoke`` are as in :meth:`link`; nothing ends when there was no such account. Raises
        :class:`UserNotFoundError`.
        """
        inputs.identifier("user_id", user_id)
        inputs.identifier("account_id", account_id)
        kept, ending = checked_keep(keep), checked_revoke(revoke)

        async def remove() -> bool:
            async with self._engine.transaction():
                await self._lock_user(user_id)
                rows = await self._engine.fetch(_SQL["lock_accounts"], user_id)
                ways_in = [row["id"] for row in rows if row["is_way_in"]]
                if ways_in == [account_id]:
                    raise LastAccountError(user_id, account_id)
                if not await self._engine.fetch(_SQL["delete_account"], account_id, user_id):
                    return False
                await self._rotation.revoke(user_id, keep=kept, revoke=ending)
            return True

        return await self._engine.retry(remove)

    async def sign_in(
        self,
        *,
        provider: str,
        provider_account_id: str,
        email: str | None = None,
        email_verified: bool = False,
        name: str | None = None,
        avatar: str | None = None,
        access_token: str | None = None,
        refresh_token: str | None = None,
        expires_at: datetime | None = None,
    ) -> ProviderSignIn:
        """Find the user who comes back from a provider, or make one, in one transaction.

        A known identity is that user's, and gets the new tokens as by :meth:`link`. An address that no user has makes a
        user (named ``name``, else as the address begins), verified if the provider says so. For an address that a user
        has, the provider must have verified it, or be trusted, and the user must have proven it: then the identity is
        linked. Otherwise nothing changes and :class:`LinkRefusedError` says why; but see ``on_unverified_local``.
        ``email_verified`` is what the provider says: pass on no more than that. Raises :class:`InvalidInputError`.
        """
        now = to_milliseconds(self._clock())
        arrival = Arrival(
            provider=checked_provider(provider),
            provider_account_id=inputs.identifier("provider_account_id", provider_account_id),
            email=None if email is None else inputs.email("email", email),
            is_verified=inputs.flag("email_verified", email_verified),
            is_trusted=provider in self._trusted,
            name=None if name is None else inputs.text("name", name, max=inputs.NAME_MAX),
            avatar=None if avatar is None else inputs.text("avatar", avatar, max=inputs.AVATAR_MAX),
            tokens=sealed(self._cipher, access_token, refresh_token, expires_at, now),
            now=to_db(now),
        )
        return await self._arrivals.welcome(arrival)

    async def access_token(
        self, user_id: str, provider: str, *, refresh: Refresh, leeway: timedelta = timedelta(seconds=60)
    ) -> str:
        """Return a user's access token at a provider, refreshed when it is over within ``leeway``.

        ``refresh`` is awaited with the refresh token and answers :class:`RefreshedTokens`; it has ten seconds. Of many
        callers, in any number of processes, one asks the provider. A token without ``expires_at`` is never due; one
        without a refresh token is returned as long as it lives.

        Raises :class:`AccountNotFoundError`, :class:`UserNotFoundError`; :class:`TokenRefreshError`, in each caller who
        waited for the same refresh, and nothing is changed then; :class:`TransactionError` when it is due inside a
        transaction, whose end could take the new tokens away; :class:`ConfigurationError` when no key reads a token.
        """
        inputs.identifier("user_id", user_id)
        checked_provider(provider)
        inputs.duration("leeway", leeway)
        if not callable(refresh):
            raise InvalidInputError("refresh", f"it is a {type(refresh).__name__}", "an async function")
        due_at = to_db(self._clock())
        row = await self._engine.fetchrow(_SQL["tokens_of_provider"], user_id, provider)
        if row is None:
            raise UserNotFoundError(user_id)
        if row["access_token"] is None and row["refresh_token"] is None:
            raise AccountNotFoundError(user_id, provider)
        return await self._refresher.token(row, provider, refresh, now=due_at, leeway=leeway)

    async def _lock_user(self, user_id: str) -> None:
        if await self._engine.fetchrow(_SQL["lock_user"], user_id) is None:
            raise UserNotFoundError(user_id)
