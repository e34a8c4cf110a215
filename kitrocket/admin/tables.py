"""Who may log in to the Studio, and their sessions: tables of their own, apart from the application's users.

They stand in schema ``kitrocket``, where a TypeScript application's schema tool leaves them alone.
"""

from __future__ import annotations

import hashlib
import secrets
from datetime import datetime, timedelta

from piccolo.apps.user.tables import BaseUser
from piccolo_api.session_auth.tables import SessionsBase

from kitrocket.tables import SCHEMA


class StudioStaff(BaseUser, tablename="studio_staff", schema=SCHEMA):
    """A person who may log in to the Studio."""


class StudioSessions(SessionsBase, tablename="studio_sessions", schema=SCHEMA):
    """A Studio login. The cookie's token is stored as a digest, so that a leaked dump is not a set of live logins."""

    @classmethod
    async def create_session(
        cls, user_id: int, expiry_date: datetime | None = None, max_expiry_date: datetime | None = None
    ) -> SessionsBase:
        """Make a session. The returned row carries the token for the cookie, the stored one its digest."""
        token = secrets.token_urlsafe(32)
        session = cls(token=_digest(token), user_id=user_id)
        if expiry_date is not None:
            session.expiry_date = expiry_date
        if max_expiry_date is not None:
            session.max_expiry_date = max_expiry_date
        await session.save().run()
        session.token = token
        return session

    @classmethod
    async def get_user_id(cls, token: str, increase_expiry: timedelta | None = None) -> int | None:
        """Return whose session a token is, or ``None``."""
        return await super().get_user_id(_digest(token), increase_expiry)

    @classmethod
    async def remove_session(cls, token: str) -> None:
        """End a session."""
        await super().remove_session(_digest(token))


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
