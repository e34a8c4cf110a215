"""The PostgreSQL that a test run uses."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from kitrocket.engine import Engine


@dataclass(frozen=True)
class Server:
    """A PostgreSQL that may create databases. ``pooler`` is the way in through a pooler, if one stands there."""

    direct: str
    pooler: str | None = None

    def url(self, database: str, *, direct: bool = False) -> str:
        parts = urlsplit(self.direct if direct or self.pooler is None else self.pooler)
        return urlunsplit(parts._replace(path=f"/{database}"))

    def engine(self, database: str, *, pool_size: int = 10) -> Engine:
        if self.pooler is None:
            return Engine(self.url(database), pool_size=pool_size)
        return Engine(self.url(database), direct_url=self.url(database, direct=True), pooler=True, pool_size=pool_size)
