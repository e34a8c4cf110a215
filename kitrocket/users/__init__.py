"""Users: who they are, and how they prove it."""

from kitrocket.users.service import UserService

__all__ = ["UserService"]
