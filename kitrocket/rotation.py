"""What a changed credential does to the user's sessions. Users and accounts both need it, so it stands below them."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Literal, get_args

from kitrocket import inputs
from kitrocket.clock import to_db
from kitrocket.engine import Engine
from kitrocket.errors import InvalidInputError
from kitrocket.ids import new_id
from kitrocket.models import IssuedSession, Session
from kitrocket.sql import statements
from kitrocket.tokens import TokenStorage, is_possible, new_token, stored_forms

#: Which sessions end: no one; all but the one that is kept; all.
Revoke = Literal["none", "others", "all"]

_SQL = statements("sessions")


class Rotation:
    """Ends sessions, and gives the one that is kept a new id and token.

    The arguments are those of :class:`~kitrocket.SessionService`. It works in the transaction of its caller, who has
    locked the user's row.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        ttl: timedelta = timedelta(days=7),
        short_ttl: timedelta = timedelta(days=1),
        max_lifetime: timedelta | None = timedelta(days=30),
        tokens: TokenStorage = "digest",
    ) -> None:
        self._engine = engine
        self._ttl = ttl
        self._short_ttl = short_ttl
        self._max_lifetime = max_lifetime
        self._tokens = tokens

    async def rotate(
        self, user_id: str, *, keep: str | None, revoke: Revoke, now: datetime, proven: bool
    ) -> tuple[IssuedSession | None, int]:
        """Return the kept session, if it was live, and how many others ended.

        ``keep`` is a token. After a ``proven`` login the kept session begins anew, with a new expiry.
        """
        forms = () if revoke == "all" else self._forms(keep)
        if not forms and revoke == "none":
            return None, 0
        token = new_token()
        row = await self._engine.fetchrow(
            _SQL["rotate"],
            user_id,
            forms,
            to_db(now),
            self._ttl,
            self._short_ttl,
            self._max_lifetime,
            revoke != "none",
            proven,
            new_id(),
            stored_forms(token, self._tokens)[0],
        )
        assert row is not None
        revoked, *kept = row
        if kept[0] is None:
            return None, revoked
        names = ("id", "expires_at", "created_at", "seen_at", "ip_address", "user_agent")
        session = Session(user_id=user_id, **dict(zip(names, kept, strict=True)))
        return IssuedSession(session=session, token=token), revoked

    async def revoke(self, user_id: str, *, keep: str | None, revoke: Revoke) -> None:
        """End sessions, and leave the one that is kept as it is."""
        if revoke == "all":
            await self._engine.fetch(_SQL["revoke_many"], [user_id])
        elif revoke == "others":
            await self._engine.fetch(_SQL["revoke_others"], user_id, self._forms(keep))

    def _forms(self, token: str | None) -> tuple[str, ...]:
        return stored_forms(token, self._tokens) if token is not None and is_possible(token) else ()


def checked_keep(value: object) -> str | None:
    """Return the token of a session to keep: any text, or none."""
    return None if value is None else inputs.secret("keep", value)


def checked_revoke(value: object) -> Revoke:
    """Return which sessions shall end."""
    if value not in get_args(Revoke):
        raise InvalidInputError("revoke", "it is unknown", '"none", "others" or "all"')
    return value  # type: ignore[return-value]  # it is one of them
