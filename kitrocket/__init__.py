"""The async data layer of a SaaS on PostgreSQL."""

from kitrocket.engine import Engine
from kitrocket.settings import Settings

__all__ = ["Engine", "Settings"]
