"""Who comes back from a provider: whose identity it is, and what to do when it is nobody's yet."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import asyncpg

from kitrocket import inputs
from kitrocket.accounts.tokens import SealedTokens
from kitrocket.engine import Engine
from kitrocket.errors import DatabaseError, LinkRefusedError
from kitrocket.ids import new_id
from kitrocket.models import ProviderSignIn, SignInOutcome
from kitrocket.rows import account_from_row, user_from_row
from kitrocket.sql import statements

#: What becomes of a user who never proved an address that a provider has verified for somebody.
OnUnverifiedLocal = Literal["refuse", "take_over"]

#: How often another writer may take the identity between our look and our insert.
_ATTEMPTS = 5

_SQL = statements("accounts")
_USERS = statements("users")
_REVOKE = statements("sessions")["revoke_many"]


@dataclass(frozen=True)
class Arrival:
    """What a provider says of someone, checked; ``now`` is naive UTC."""

    provider: str
    provider_account_id: str
    email: str | None
    is_verified: bool
    is_trusted: bool
    name: str | None
    avatar: str | None
    tokens: SealedTokens
    now: datetime

    @property
    def identity(self) -> tuple[str, str]:
        """What the provider knows the account by."""
        return self.provider, self.provider_account_id

    @property
    def user_name(self) -> str:
        """How a new user is called, where the provider tells no name."""
        return self.name or (self.email or "").partition("@")[0][: inputs.NAME_MAX]


class _OvertakenError(Exception):
    """Another writer was faster. What was done here is rolled back, and all of it looked at again."""


def decide(*, verified: bool, trusted: bool, local_verified: bool, take_over: bool) -> Literal["linked", "taken_over"]:
    """Say what becomes of a new identity whose e-mail address a user has.

    ``verified``: the provider verified the address. ``trusted``: its word counts anyway. ``local_verified``: the user
    has proven the address here. Raises :class:`LinkRefusedError`.
    """
    if not (verified or trusted):
        raise LinkRefusedError("provider_unverified")
    if local_verified:
        return "linked"
    if verified and take_over:
        return "taken_over"
    raise LinkRefusedError("local_unverified")


class Arrivals:
    """Turns arrivals into users and accounts."""

    def __init__(self, engine: Engine, *, take_over: bool) -> None:
        self._engine = engine
        self._take_over = take_over

    async def welcome(self, arrival: Arrival) -> ProviderSignIn:
        """Find or make the user, in one transaction."""
        for _ in range(_ATTEMPTS):
            try:
                return await self._engine.retry(lambda: self._attempt(arrival))
            except _OvertakenError:
                continue
        raise DatabaseError("the same identity kept being linked and unlinked by others")

    async def _attempt(self, arrival: Arrival) -> ProviderSignIn:
        async with self._engine.transaction():
            await self._engine.fetch(_SQL["lock_identity"], " ".join(arrival.identity))
            known = await self._engine.fetchrow(_SQL["account_of_identity"], *arrival.identity)
            if known is not None:
                return await self._known(arrival, await self._locked(known["user_id"]))
            if arrival.email is None:
                raise LinkRefusedError("no_email")
            found = await self._engine.fetchrow(_USERS["user_by_email"], arrival.email)
            return await (self._created(arrival) if found is None else self._joined(arrival, found))

    async def _created(self, arrival: Arrival) -> ProviderSignIn:
        """Make a user, whose address nobody has."""
        user = await self._engine.fetchrow(
            _USERS["insert_user_if_new"],
            new_id(),
            arrival.email,
            arrival.user_name,
            arrival.now if arrival.is_verified else None,
            arrival.avatar,
            arrival.now,
        )
        if user is None:
            raise _OvertakenError
        return await self._linked(arrival, user, "created")

    async def _joined(self, arrival: Arrival, found: asyncpg.Record) -> ProviderSignIn:
        """Give the identity to the user who has the address, if the table of decisions says so."""
        user = await self._locked(found["id"])
        if user["email"] != found["email"]:
            raise _OvertakenError
        outcome = decide(
            verified=arrival.is_verified,
            trusted=arrival.is_trusted,
            local_verified=user["email_verified"] is not None,
            take_over=self._take_over,
        )
        if outcome == "taken_over":
            await self._engine.fetch(_SQL["delete_accounts"], user["id"])
            await self._engine.fetch(_REVOKE, [user["id"]])
            verified = await self._engine.fetchrow(_USERS["mark_email_verified"], user["id"], arrival.now, None)
            assert verified is not None
            user = verified
        return await self._linked(arrival, user, outcome)

    async def _locked(self, user_id: str) -> asyncpg.Record:
        """Lock a user and read it in the next statement, whose snapshot is younger than the wait."""
        await self._engine.fetch(_SQL["lock_user"], user_id)
        user = await self._engine.fetchrow(_USERS["credential_of_user"], user_id)
        if user is None:
            raise _OvertakenError
        return user

    async def _linked(self, arrival: Arrival, user: asyncpg.Record, outcome: SignInOutcome) -> ProviderSignIn:
        account = await self._engine.fetchrow(
            _SQL["insert_account"], new_id(), user["id"], *arrival.identity, *arrival.tokens, arrival.now
        )
        if account is None:
            raise _OvertakenError
        return ProviderSignIn(user=user_from_row(user), account=account_from_row(account), outcome=outcome)

    async def _known(self, arrival: Arrival, user: asyncpg.Record) -> ProviderSignIn:
        account = await self._engine.fetchrow(_SQL["refresh_tokens"], user["id"], *arrival.identity, *arrival.tokens)
        if account is None:
            raise _OvertakenError
        return ProviderSignIn(user=user_from_row(user), account=account_from_row(account), outcome="signed_in")
