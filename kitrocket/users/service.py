"""What an application does with users."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any, Final, Literal

import anyio
import asyncpg
from pydantic_core import from_json

from kitrocket import inputs
from kitrocket.clock import Clock, from_db, to_db, to_milliseconds, utc_now
from kitrocket.engine import Engine
from kitrocket.errors import UserNotFoundError
from kitrocket.ids import new_id
from kitrocket.models import CredentialChange, DeletedUser, Subscription, User, UserExport, UserWithSubscription
from kitrocket.passwords import Passwords, PasswordScheme, new_password
from kitrocket.proofs import Proofs
from kitrocket.rotation import Revoke, Rotation, checked_keep, checked_revoke
from kitrocket.rows import user_from_row
from kitrocket.sql import statements
from kitrocket.tables import Users
from kitrocket.users.credentials import Credentials, reset_state

_SQL = statements("users")
_WEBHOOKS = statements("webhooks")


class Omitted(enum.Enum):
    """The type of :data:`OMITTED`."""

    OMITTED = enum.auto()


#: The default of an argument for which ``None`` means something else than leaving it out.
OMITTED: Final[Literal[Omitted.OMITTED]] = Omitted.OMITTED


class UserService:
    """Users and their passwords.

    ``clock`` answers the present instant, timezone-aware; what is stored is cut to whole milliseconds.
    ``password_scheme`` is what new hashes are written in: ``"argon2id"``, or ``"better-auth"`` for a database that
    Better Auth also uses. ``limiter`` bounds how many passwords are hashed at once (default: 4). ``secret``, at least
    32 bytes, signs the tokens that are sent by e-mail. ``rotation`` ends sessions when a credential changes:
    ``SessionService.rotation`` of a service whose arguments are not the defaults.
    Raises :class:`ConfigurationError` for a scheme or a secret that cannot be used.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        clock: Clock = utc_now,
        password_scheme: PasswordScheme = "argon2id",  # noqa: S107 - the name of a scheme is no password
        limiter: anyio.CapacityLimiter | None = None,
        secret: str | None = None,
        rotation: Rotation | None = None,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._passwords = Passwords(password_scheme, limiter)
        self._credentials = Credentials(engine, self._passwords, rotation or Rotation(engine))
        self._proofs = Proofs(secret)

    async def create(
        self,
        *,
        email: str,
        name: str,
        password: str | None = None,
        avatar: str | None = None,
        id: str | None = None,
    ) -> User:
        """Create a user, and with a ``password`` the account to sign in with, or neither.

        The e-mail address is stored stripped, NFC and in lower case; a password has 8 to 128 UTF-16 code units.
        Raises :class:`EmailTakenError` and :class:`InvalidInputError`, also for an ``id`` that another user has.
        """
        now = self._now()
        user_id = new_id() if id is None else inputs.identifier("id", id)
        row = (
            user_id,
            inputs.email("email", email),
            inputs.text("name", name, max=inputs.NAME_MAX),
            None if avatar is None else inputs.text("avatar", avatar, max=inputs.AVATAR_MAX),
            to_db(now),
        )
        hashed = None if password is None else await self._passwords.hash(new_password("password", password))

        async def insert() -> User:
            async with self._engine.transaction():
                created = await self._engine.fetchrow(_SQL["insert_user"], *row)
                assert created is not None
                if hashed is not None:
                    await self._engine.fetch(_SQL["insert_credential"], new_id(), user_id, hashed, to_db(now))
            return user_from_row(created)

        return await self._engine.retry(insert)

    async def get(self, user_id: str) -> User | None:
        """Return a user, or ``None`` when there is none with this id."""
        rows = await self._engine.run(Users.select().where(Users.id == inputs.identifier("user_id", user_id)))
        return user_from_row(rows[0]) if rows else None

    async def get_by_email(self, email: str) -> User | None:
        """Return the user with this e-mail address, in whatever letter case, or ``None``."""
        row = await self._engine.fetchrow(_SQL["user_by_email"], inputs.email("email", email))
        return None if row is None else user_from_row(row)

    async def get_with_subscription(self, user_id: str) -> UserWithSubscription | None:
        """Return a user with the subscription that ``subscriptions.get`` chooses, in one statement."""
        row = await self._engine.fetchrow(_SQL["user_with_subscription"], inputs.identifier("user_id", user_id))
        return None if row is None else UserWithSubscription(user=user_from_row(row), subscription=_subscription(row))

    async def update(
        self, user_id: str, *, name: str | Omitted = OMITTED, avatar: str | Omitted | None = OMITTED
    ) -> User:
        """Change what is given and leave what is omitted; ``avatar=None`` removes the avatar. Sets ``updated_at``.

        Raises :class:`UserNotFoundError` and :class:`InvalidInputError`.
        """
        inputs.identifier("user_id", user_id)
        values: dict[str, object] = {"updated_at": to_db(self._now())}
        if not isinstance(name, Omitted):
            values["name"] = inputs.text("name", name, max=inputs.NAME_MAX)
        if not isinstance(avatar, Omitted):
            values["avatar"] = None if avatar is None else inputs.text("avatar", avatar, max=inputs.AVATAR_MAX)
        change = Users.update(values).where(Users.id == user_id)  # type: ignore[arg-type]  # a str is a column's name
        rows = await self._engine.run(change.returning(*Users.all_columns()))
        if not rows:
            raise UserNotFoundError(user_id)
        return user_from_row(rows[0])

    async def mark_email_verified(self, user_id: str, *, email: str | None = None) -> User:
        """Note that the e-mail address is verified, and return the user; the first time stays.

        With ``email``, only while that is the user's address: look at ``email_verified`` of the answer. Raises
        :class:`UserNotFoundError` and :class:`InvalidInputError`.
        """
        inputs.identifier("user_id", user_id)
        address = None if email is None else inputs.email("email", email)
        row = await self._engine.fetchrow(_SQL["mark_email_verified"], user_id, to_db(self._now()), address)
        if row is None:
            raise UserNotFoundError(user_id)
        return user_from_row(row)

    async def export(self, user_id: str) -> UserExport:
        """Return every row of a user as JSON, as of one instant, without tokens and passwords.

        Raises :class:`UserNotFoundError`.
        """
        found = await self._engine.fetch(_SQL["rows_of_user"], inputs.identifier("user_id", user_id))
        parts: dict[str, list[object]] = {"user": []}
        for part, content in found:
            parts.setdefault(part, []).append(from_json(content))
        if not parts["user"]:
            raise UserNotFoundError(user_id)
        return UserExport.model_validate({"user": parts.pop("user")[0], **parts})

    async def delete(self, user_id: str) -> DeletedUser:
        """Delete a user with every row that is the user's, and return how many those were.

        Raises :class:`UserNotFoundError`.
        """
        inputs.identifier("user_id", user_id)

        async def remove() -> DeletedUser:
            async with self._engine.transaction():
                # Locks have one order everywhere: events of the inbox by id, the user's subscriptions, the user.
                events = await self._engine.fetch(_WEBHOOKS["lock_events_of_user"], user_id)
                await self._engine.fetch(_WEBHOOKS["lock_user"], user_id)
                if await self._engine.fetchrow(_SQL["lock_user_to_delete"], user_id) is None:
                    raise UserNotFoundError(user_id)
                if events:
                    await self._engine.fetch(_WEBHOOKS["clear_events"], [row["webhook_id"] for row in events])
                counts = await self._engine.fetchrow(_SQL["count_rows_of_user"], user_id)
                assert counts is not None
                await self._engine.fetch(_SQL["delete_user"], user_id)
            return DeletedUser(user_id=user_id, **counts)

        return await self._engine.retry(remove)

    async def authenticate(self, *, email: str, password: str) -> User | None:
        """Return the user whose e-mail address and password these are, or ``None``.

        An unknown user, or one without a password, costs a verification too. What was hashed with scrypt or old
        parameters is hashed anew on the way, unless ``password_scheme`` is ``"better-auth"``. Only a wrong Python type
        raises :class:`InvalidInputError`.
        """
        inputs.secret("email", email)
        checked = await self._credentials.check(email, inputs.secret("password", password))
        return None if checked is None else user_from_row(checked.row)

    @asynccontextmanager
    async def authenticating(self, *, email: str, password: str) -> AsyncIterator[User | None]:
        """``async with users.authenticating(...) as user:`` :meth:`authenticate`, and it stays true in the block.

        The block is a transaction in which the user's row is locked, so that a session made in it is revoked by a
        change of password that comes later. For ``None`` there is no transaction.
        """
        inputs.secret("email", email)
        async with self._credentials.holding(email, inputs.secret("password", password)) as row:
            yield None if row is None else user_from_row(row)

    async def change_password(
        self, user_id: str, *, current: str, new: str, keep: str | None = None, revoke: Revoke = "others"
    ) -> CredentialChange:
        """Change a password, and end the sessions that rest on the old one, in one transaction.

        ``keep`` is the token of the session that asks: it goes on under a new id and token, which the answer has, and
        counts as newly made. ``revoke`` is ``"others"``, ``"all"`` or ``"none"``. Raises :class:`WrongPasswordError`
        when ``current`` is not the password, or there is none (:meth:`reset_password` sets the first one);
        :class:`UserNotFoundError`, :class:`InvalidInputError`.
        """
        change = partial(
            self._credentials.change_password,
            inputs.identifier("user_id", user_id),
            current=inputs.secret("current", current),
            new=new_password("new", new),
            keep=checked_keep(keep),
            revoke=checked_revoke(revoke),
            now=self._now(),
        )
        return await self._engine.retry(change)

    async def change_email(
        self, user_id: str, *, email: str, keep: str | None = None, revoke: Revoke = "others"
    ) -> CredentialChange:
        """Give a user another e-mail address, not verified yet, and end the other sessions, in one transaction.

        ``keep`` and ``revoke`` are as in :meth:`change_password`, but no session becomes younger: no password was
        proven. With the address that the user has nothing changes. Raises :class:`EmailTakenError`,
        :class:`UserNotFoundError`, :class:`InvalidInputError`.
        """
        change = partial(
            self._credentials.change_email,
            inputs.identifier("user_id", user_id),
            email=inputs.email("email", email),
            keep=checked_keep(keep),
            revoke=checked_revoke(revoke),
            now=self._now(),
        )
        return await self._engine.retry(change)

    async def request_verification(self, email: str) -> str | None:
        """Return a token that proves this address, valid for an hour; ``None`` if no user has it, or it is verified.

        Send it to the address that is stored, not to the one that was typed. Raises :class:`ConfigurationError` without
        a secret.
        """
        user = await self.get_by_email(email)
        if user is None or user.email_verified is not None:
            return None
        return self._proofs.make("verify", user.id, (user.email, None), self._now())

    async def verify_email(self, token: str) -> User:
        """Redeem a token of :meth:`request_verification`: note that the address is verified, and return the user.

        It works once, and not after the address has changed: :class:`InvalidTokenError`, which doesn't say why.
        """
        now = self._now()
        claim = self._proofs.read("verify", inputs.secret("token", token), now)
        return await self._engine.retry(lambda: self._credentials.verify_email(self._proofs, claim, now=now))

    async def request_password_reset(self, email: str) -> str | None:
        """Return a token with which this user may set a new password, valid for an hour; ``None`` for an unknown one.

        Answer the same to whoever asks, and send it to the address that is stored, not to the one that was typed.
        Raises :class:`ConfigurationError` without a secret.
        """
        row = await self._engine.fetchrow(_SQL["credential_by_email"], inputs.email("email", email))
        return None if row is None else self._proofs.make("reset", row["id"], reset_state(row), self._now())

    async def reset_password(self, *, token: str, new: str, revoke: Revoke = "all") -> CredentialChange:
        """Redeem a token of :meth:`request_password_reset`: set a password, in one transaction with ending sessions.

        It works once, and not after the password or the address has changed: :class:`InvalidTokenError`, which doesn't
        say why. The address counts as verified. Raises :class:`InvalidInputError` for the new password.
        """
        now = self._now()
        inputs.secret("token", token)
        reset = partial(
            self._credentials.reset_password,
            self._proofs,
            new=new_password("new", new),
            revoke=checked_revoke(revoke),
            now=now,
        )
        claim = self._proofs.read("reset", token, now)
        return await self._engine.retry(lambda: reset(claim))

    def _now(self) -> datetime:
        return to_milliseconds(self._clock())


def _subscription(row: asyncpg.Record | dict[str, Any]) -> Subscription | None:
    if row["subscription_id"] is None:
        return None
    end = row["current_period_end"]
    return Subscription(
        id=row["subscription_id"],
        user_id=row["id"],
        plan=row["plan"],
        status=row["status"],
        dodo_customer_id=row["dodo_customer_id"],
        dodo_subscription_id=row["dodo_subscription_id"],
        current_period_end=None if end is None else from_db(end),
        created_at=from_db(row["subscription_created_at"]),
        updated_at=from_db(row["subscription_updated_at"]),
    )
