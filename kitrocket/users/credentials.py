"""E-mail and password: checked, held, and changed together with the sessions that rest on them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime

import asyncpg

from kitrocket import inputs
from kitrocket.clock import to_db
from kitrocket.engine import Engine
from kitrocket.errors import InvalidInputError, InvalidTokenError, UserNotFoundError, WrongPasswordError
from kitrocket.ids import new_id
from kitrocket.models import CredentialChange, User
from kitrocket.passwords import Passwords
from kitrocket.proofs import Claim, Proofs
from kitrocket.rotation import Revoke, Rotation
from kitrocket.rows import user_from_row
from kitrocket.sql import statements

_SQL = statements("users")
_LOCK_USER = statements("accounts")["lock_user"]


@dataclass(frozen=True)
class Checked:
    """A user and account, and the hash that a password was found to be behind."""

    row: asyncpg.Record
    hash: str

    def still_holds(self, row: asyncpg.Record) -> bool:
        """Whether a row that was read later says the same."""
        return (row["account_id"], row["password"]) == (self.row["account_id"], self.hash)


class Credentials:
    """What users sign in with. Arguments have been checked by its caller.

    A password is hashed and verified outside of transactions: it takes long. So each write is a compare-and-swap on
    the hash that was verified, with the user's row locked.
    """

    def __init__(self, engine: Engine, passwords: Passwords, rotation: Rotation) -> None:
        self._engine = engine
        self._passwords = passwords
        self._rotation = rotation

    async def check(self, email: str, password: str) -> Checked | None:
        """Return whose e-mail address and password these are. A hash that is out of date is renewed on the way."""
        row = await self._find(email)
        stored: str | None = None if row is None else row["password"]
        if not await self._passwords.verify(stored, password) or row is None or stored is None:
            return None
        if self._passwords.is_outdated(stored):
            renewed = await self._passwords.hash(password)
            if await self._engine.fetch(_SQL["replace_hash"], row["account_id"], stored, renewed):
                stored = renewed
        return Checked(row, stored)

    @asynccontextmanager
    async def holding(self, email: str, password: str) -> AsyncIterator[asyncpg.Record | None]:
        """As :meth:`check`, in a transaction in which the answer cannot become untrue: the user's row is locked."""
        while (checked := await self.check(email, password)) is not None:
            async with self._engine.transaction():
                await self._engine.fetch(_LOCK_USER, checked.row["id"])
                current = await self._find(email)
                if current is not None and checked.still_holds(current):
                    yield current
                    return
        yield None

    async def change_password(
        self, user_id: str, *, current: str, new: str, keep: str | None, revoke: Revoke, now: datetime
    ) -> CredentialChange:
        """Put a new password in the place of the current one."""
        hashed: str | None = None
        while True:
            row = await self._engine.fetchrow(_SQL["credential_of_user"], user_id)
            if row is None:
                raise UserNotFoundError(user_id)
            if not await self._passwords.verify(row["password"], current):
                raise WrongPasswordError
            hashed = hashed or await self._passwords.hash(new)
            async with self._engine.transaction():
                await self._lock(user_id)
                if await self._engine.fetch(_SQL["replace_hash"], row["account_id"], row["password"], hashed):
                    row = await self._engine.fetchrow(_SQL["credential_of_user"], user_id)
                    assert row is not None
                    return await self._changed(row, keep=keep, revoke=revoke, now=now, proven=True)

    async def change_email(
        self, user_id: str, *, email: str, keep: str | None, revoke: Revoke, now: datetime
    ) -> CredentialChange:
        """Give a user another address, which nobody has verified."""
        async with self._engine.transaction():
            await self._lock(user_id)
            row = await self._engine.fetchrow(_SQL["credential_of_user"], user_id)
            assert row is not None
            if row["email"] == email:
                return CredentialChange(user=user_from_row(row), issued=None, revoked=0)
            row = await self._engine.fetchrow(_SQL["change_email"], user_id, email, to_db(now))
            assert row is not None
            return await self._changed(row, keep=keep, revoke=revoke, now=now, proven=False)

    async def reset_password(
        self, proofs: Proofs, claim: Claim, *, new: str, revoke: Revoke, now: datetime
    ) -> CredentialChange:
        """Set the password of the user who was sent a token, which also proves the address."""
        await self._held_against(proofs, claim, reset_state)  # junk is not worth a hash
        hashed = await self._passwords.hash(new)
        async with self._engine.transaction():
            await self._engine.fetch(_LOCK_USER, claim.user_id)
            row = await self._held_against(proofs, claim, reset_state)
            if row["account_id"] is None:
                await self._engine.fetch(_SQL["insert_credential"], new_id(), claim.user_id, hashed, to_db(now))
            elif not await self._engine.fetch(_SQL["replace_hash"], row["account_id"], row["password"], hashed):
                raise InvalidTokenError
            verified = await self._engine.fetchrow(_SQL["mark_email_verified"], claim.user_id, to_db(now), None)
            assert verified is not None
            return await self._changed(verified, keep=None, revoke=revoke, now=now, proven=True)

    async def verify_email(self, proofs: Proofs, claim: Claim, *, now: datetime) -> User:
        """Note that the address is verified of the user who was sent a token."""
        async with self._engine.transaction():
            await self._engine.fetch(_LOCK_USER, claim.user_id)
            row = await self._held_against(proofs, claim, verify_state)
            verified = await self._engine.fetchrow(_SQL["verify_email"], claim.user_id, row["email"], to_db(now))
            if verified is None:
                raise InvalidTokenError
        return user_from_row(verified)

    async def _find(self, email: str) -> asyncpg.Record | None:
        try:
            return await self._engine.fetchrow(_SQL["credential_by_email"], inputs.email("email", email))
        except InvalidInputError:
            return None

    async def _lock(self, user_id: str) -> None:
        if await self._engine.fetchrow(_LOCK_USER, user_id) is None:
            raise UserNotFoundError(user_id)

    async def _held_against(
        self, proofs: Proofs, claim: Claim, state: Callable[[asyncpg.Record], tuple[str | None, ...]]
    ) -> asyncpg.Record:
        row = await self._engine.fetchrow(_SQL["credential_of_user"], claim.user_id)
        if row is None:
            raise InvalidTokenError
        proofs.check(claim, state(row))
        return row

    async def _changed(
        self, row: asyncpg.Record, *, keep: str | None, revoke: Revoke, now: datetime, proven: bool
    ) -> CredentialChange:
        issued, revoked = await self._rotation.rotate(row["id"], keep=keep, revoke=revoke, now=now, proven=proven)
        return CredentialChange(user=user_from_row(row), issued=issued, revoked=revoked)


def reset_state(row: asyncpg.Record) -> tuple[str | None, ...]:
    """What a new password changes: the hash, and with it what the address was when the token was made."""
    return row["password"], row["email"]


def verify_state(row: asyncpg.Record) -> tuple[str | None, ...]:
    """What verifying an address changes."""
    verified: datetime | None = row["email_verified"]
    return row["email"], None if verified is None else verified.isoformat()
