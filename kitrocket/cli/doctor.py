"""``kitrocket doctor``: what is wrong with the database, and the command that cures it."""

from __future__ import annotations

import sys

from kitrocket.cli.running import embedded_server, opened, out, run
from kitrocket.ddl import SEED_INDEXES
from kitrocket.engine import Engine
from kitrocket.kit import KitRocket
from kitrocket.migrations import pending


def doctor() -> None:
    """Look at the settings, the server, the migrations and the indexes. Exit code 1 when something is wrong."""

    async def work() -> bool:
        async with opened(migrated=False) as kit:
            version = await kit.engine.fetchval("SELECT current_setting('server_version')")
            out.print(f"ok     PostgreSQL {version} answers")
            _say_server(kit)
            _say_settings(kit)
            return await _migrations(kit.engine) and await _indexes(kit.engine)

    if not run(work):
        sys.exit(1)


def _say_server(kit: KitRocket) -> None:
    if kit.engine.is_embedded:
        status = embedded_server().status()
        holders = ", ".join(map(str, status.holders))
        out.print(f"ok     it is the embedded server, pid {status.pid}, used by process {holders}")


def _say_settings(kit: KitRocket) -> None:
    if not kit.settings.dodo_payments_webhook_key:
        out.print("note   DODO_PAYMENTS_WEBHOOK_KEY is not set: webhooks are answered with 503")
    elif not kit.settings.dodo_products:
        out.print("note   KITROCKET_DODO_PRODUCTS maps no product to a plan: subscriptions are parked")


async def _migrations(engine: Engine) -> bool:
    missing = await pending(engine)
    if missing:
        out.print(f"wrong  {len(missing)} migration(s) are pending: kitrocket db migrate")
        return False
    out.print("ok     every migration is applied")
    return True


async def _indexes(engine: Engine) -> bool:
    """Tell of indexes that another schema tool dropped, or that a killed build left unusable."""
    async with engine.direct() as connection:
        states = {index: await index.is_valid(connection) for index in SEED_INDEXES}
    for index, valid in states.items():
        if not valid:
            out.print(f"wrong  index {index.name} is {'missing' if valid is None else 'unusable'}: {index.create};")
    if all(states.values()):
        out.print(f"ok     the {len(states)} indexes on the five tables stand")
        return True
    return False
