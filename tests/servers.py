"""The PostgreSQL of a test run, and perhaps a pooler before it."""

from __future__ import annotations

from dataclasses import dataclass

from kitrocket.engine import Engine
from kitrocket.testing import PostgresServer


@dataclass(frozen=True)
class Server:
    """``direct`` is PostgreSQL itself; ``pooler`` the way in through PgBouncer, when this run has one."""

    direct: PostgresServer
    pooler: PostgresServer | None = None

    def url(self, database: str, *, direct: bool = False) -> str:
        return (self.direct if direct or self.pooler is None else self.pooler).url(database)

    def engine(self, database: str, *, pool_size: int = 10) -> Engine:
        if self.pooler is None:
            return Engine(self.url(database), pool_size=pool_size)
        return Engine(self.url(database), direct_url=self.url(database, direct=True), pooler=True, pool_size=pool_size)
