"""Sessions: create, validate, list, revoke, sweep."""

from kitrocket.sessions.service import SessionService

__all__ = ["SessionService"]
