"""Users: who they are, and whether a password is theirs."""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Any, Final, Literal

import anyio
import asyncpg

from kitrocket import inputs
from kitrocket.clock import Clock, from_db, to_db, to_milliseconds, utc_now
from kitrocket.engine import Engine
from kitrocket.errors import InvalidInputError, UserNotFoundError
from kitrocket.ids import new_id
from kitrocket.models import DeletedUser, Subscription, User, UserWithSubscription
from kitrocket.passwords import Passwords, PasswordScheme, new_password
from kitrocket.sql import statements
from kitrocket.tables import Users

NAME_MAX = 200
AVATAR_MAX = 2048

_SQL = statements("users")


class Omitted(enum.Enum):
    """The type of :data:`OMITTED`."""

    OMITTED = enum.auto()


#: The default of an argument for which ``None`` means something else than leaving it out.
OMITTED: Final[Literal[Omitted.OMITTED]] = Omitted.OMITTED


class UserService:
    """Users and their passwords.

    ``clock`` answers the present instant, timezone-aware; what is stored is cut to whole milliseconds.
    ``password_scheme`` is what new hashes are written in: ``"argon2id"``, or ``"better-auth"`` for a database that
    Better Auth also uses. ``limiter`` bounds how many passwords are hashed at once (default: 4).
    """

    def __init__(
        self,
        engine: Engine,
        *,
        clock: Clock = utc_now,
        password_scheme: PasswordScheme = "argon2id",  # noqa: S107 - the name of a scheme is no password
        limiter: anyio.CapacityLimiter | None = None,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._passwords = Passwords(password_scheme, limiter)

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
            inputs.text("name", name, max=NAME_MAX),
            None if avatar is None else inputs.text("avatar", avatar, max=AVATAR_MAX),
            to_db(now),
        )
        hashed = None if password is None else await self._passwords.hash(new_password("password", password))

        async def insert() -> User:
            async with self._engine.transaction():
                created = await self._engine.fetchrow(_SQL["insert_user"], *row)
                assert created is not None
                if hashed is not None:
                    await self._engine.fetch(_SQL["insert_credential"], new_id(), user_id, hashed, to_db(now))
            return _user(created)

        return await self._engine.retry(insert)

    async def get(self, user_id: str) -> User | None:
        """Return a user, or ``None`` when there is none with this id."""
        rows = await self._engine.run(Users.select().where(Users.id == inputs.identifier("user_id", user_id)))
        return _user(rows[0]) if rows else None

    async def get_by_email(self, email: str) -> User | None:
        """Return the user with this e-mail address, in whatever letter case, or ``None``."""
        row = await self._engine.fetchrow(_SQL["user_by_email"], inputs.email("email", email))
        return None if row is None else _user(row)

    async def get_with_subscription(self, user_id: str) -> UserWithSubscription | None:
        """Return a user with the subscription that ``subscriptions.get`` chooses, in one statement."""
        row = await self._engine.fetchrow(_SQL["user_with_subscription"], inputs.identifier("user_id", user_id))
        return None if row is None else UserWithSubscription(user=_user(row), subscription=_subscription(row))

    async def update(
        self, user_id: str, *, name: str | Omitted = OMITTED, avatar: str | Omitted | None = OMITTED
    ) -> User:
        """Change what is given and leave what is omitted; ``avatar=None`` removes the avatar. Sets ``updated_at``.

        Raises :class:`UserNotFoundError` and :class:`InvalidInputError`.
        """
        inputs.identifier("user_id", user_id)
        values: dict[str, object] = {"updated_at": to_db(self._now())}
        if not isinstance(name, Omitted):
            values["name"] = inputs.text("name", name, max=NAME_MAX)
        if not isinstance(avatar, Omitted):
            values["avatar"] = None if avatar is None else inputs.text("avatar", avatar, max=AVATAR_MAX)
        change = Users.update(values).where(Users.id == user_id)  # type: ignore[arg-type]  # a str is a column's name
        rows = await self._engine.run(change.returning(*Users.all_columns()))
        if not rows:
            raise UserNotFoundError(user_id)
        return _user(rows[0])

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
        return _user(row)

    async def delete(self, user_id: str) -> DeletedUser:
        """Delete a user with every row that is the user's, and return how many those were.

        Raises :class:`UserNotFoundError`.
        """
        inputs.identifier("user_id", user_id)

        async def remove() -> DeletedUser:
            async with self._engine.transaction():
                if await self._engine.fetchrow(_SQL["lock_user_to_delete"], user_id) is None:
                    raise UserNotFoundError(user_id)
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
        inputs.secret("password", password)
        try:
            row = await self._engine.fetchrow(_SQL["credential_by_email"], inputs.email("email", email))
        except InvalidInputError:
            row = None
        stored: str | None = None if row is None else row["password"]
        if not await self._passwords.verify(stored, password) or row is None or stored is None:
            return None
        if self._passwords.is_outdated(stored):
            hashed = await self._passwords.hash(password)
            await self._engine.fetch(_SQL["replace_hash"], row["account_id"], stored, hashed)
        return _user(row)

    def _now(self) -> datetime:
        return to_milliseconds(self._clock())


def _user(row: asyncpg.Record | dict[str, Any]) -> User:
    verified = row["email_verified"]
    return User(
        id=row["id"],
        email=row["email"],
        name=row["name"],
        email_verified=None if verified is None else from_db(verified),
        avatar=row["avatar"],
        created_at=from_db(row["created_at"]),
        updated_at=from_db(row["updated_at"]),
    )


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
