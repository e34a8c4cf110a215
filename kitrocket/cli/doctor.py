"""``kitrocket doctor``: what is wrong with the database, and the command that cures it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated

import typer

from kitrocket import better_auth
from kitrocket.cli.drizzle import declarations
from kitrocket.cli.running import embedded_server, opened, out, run
from kitrocket.ddl import SEED_INDEXES, ConcurrentIndex
from kitrocket.engine import Engine
from kitrocket.inputs import normalised_email
from kitrocket.kit import KitRocket
from kitrocket.migrations import applied, find_exposed, is_foreign, is_outbox_filled, pending
from kitrocket.rollup import is_complete
from kitrocket.settings import Settings
from kitrocket.sql import statements

_SQL = statements("doctor")

#: What keeps the daily sums of usage exact.
_USAGE_TRIGGERS = tuple(f"kitrocket_usage_{event}" for event in ("inserted", "updated", "deleted", "truncated"))
#: How long a call may wait for the provider before that is a finding.
_EXPORT_LAG = timedelta(minutes=30)
#: How many users one line of a finding names.
_MOST_NAMED = 20


def doctor(
    drizzle: Annotated[
        bool, typer.Option("--drizzle", help="Only print what to paste into the Drizzle schema, and look at nothing.")
    ] = False,
) -> None:
    """Look at settings, server, migrations, indexes, grants and addresses. Exit code 1 when something is wrong."""
    if drizzle:
        out.print(declarations(better_auth=bool(Settings().better_auth_secret)))
        return

    async def work() -> bool:
        async with opened(migrated=False) as kit:
            version = await kit.engine.fetchval("SELECT current_setting('server_version')")
            _ok(f"PostgreSQL {version} answers")
            _say_server(kit)
            _say_settings(kit.settings)
            # The next ones need the tables.
            if not await _migrations(kit.engine):
                return False
            checks = [
                await _indexes(kit.engine),
                await _better_auth(kit),
                await _exposure(kit.engine),
                await _addresses(kit.engine),
                await _daily_sums(kit),
                await _export(kit),
            ]
            await _say_vacuum(kit.engine)
            await _say_oauth_tokens(kit)
            return all(checks)

    if not run(work):
        sys.exit(1)


def _ok(line: str) -> bool:
    out.print(f"ok     {line}")
    return True


def _note(line: str) -> None:
    out.print(f"note   {line}")


def _wrong(line: str) -> bool:
    out.print(f"wrong  {line}")
    return False


def _say_server(kit: KitRocket) -> None:
    if kit.engine.is_embedded:
        status = embedded_server().status()
        holders = ", ".join(map(str, status.holders))
        _ok(f"it is the embedded server, pid {status.pid}, used by process {holders}")


def _say_settings(settings: Settings) -> None:
    if not settings.dodo_payments_webhook_key:
        _note("DODO_PAYMENTS_WEBHOOK_KEY is not set: webhooks are answered with 503")
    elif not settings.dodo_products:
        _note("KITROCKET_DODO_PRODUCTS maps no product to a plan: subscriptions are parked")
    if settings.better_auth_secret and settings.session_tokens != "plain":
        _note("KITROCKET_SESSION_TOKENS is not plain: Better Auth cannot read the sessions that kitrocket makes")
    if settings.better_auth_secret and settings.password_scheme != "better-auth":
        _note("KITROCKET_PASSWORD_SCHEME is not better-auth: Better Auth cannot read the passwords set here")


async def _migrations(engine: Engine) -> bool:
    missing = await pending(engine)
    if not missing:
        return _ok("every migration is applied")
    if await is_foreign(engine):
        return _wrong("the five tables stand, and no history says who made them: kitrocket db adopt")
    return _wrong(f"{len(missing)} migration(s) are pending: kitrocket db migrate")


async def _indexes(engine: Engine) -> bool:
    """Tell of indexes that another schema tool dropped, or that a killed build left unusable."""
    return await _stand(engine, SEED_INDEXES) and _ok(f"the {len(SEED_INDEXES)} indexes on the five tables stand")


async def _stand(engine: Engine, indexes: Sequence[ConcurrentIndex]) -> bool:
    async with engine.direct() as connection:
        states = {index: await index.is_valid(connection) for index in indexes}
    for index, valid in states.items():
        if not valid:
            _wrong(f"index {index.name} is {'missing' if valid is None else 'unusable'}: {index.create};")
    return all(states.values())


async def _better_auth(kit: KitRocket) -> bool:
    """Look at what Better Auth wants where it was asked for."""
    if not await applied(kit.engine, better_auth.APP):
        return not kit.settings.better_auth_secret or _wrong(
            "KITROCKET_BETTER_AUTH_SECRET is set, but Better Auth's columns are missing: "
            "kitrocket db migrate --better-auth"
        )
    return await _stand(kit.engine, [better_auth.SESSIONS_CREATED_AT]) and _ok("Better Auth has what it wants")


async def _exposure(engine: Engine) -> bool:
    """Tell of what the holders of Supabase's public key can reach."""
    found = await find_exposed(engine)
    for line in found:
        _wrong(f"{line}: kitrocket db protect")
    return not found


async def _addresses(engine: Engine) -> bool:
    """Tell of e-mail addresses that another writer stored in a form of its own, by the ids of their users."""
    odd: dict[str, str] = {}
    lost: list[str] = []
    after = ""
    while rows := await engine.fetch(_SQL["odd_addresses"], after):
        after = rows[-1]["id"]
        for row in rows:
            normal = normalised_email(row["email"])
            if normal != row["email"]:
                odd[row["id"]] = normal
                if normal != row["lowered"]:
                    lost.append(row["id"])
    twins = await engine.fetch(_SQL["same_addresses"], list(odd), list(odd.values()))
    if odd:
        _note(f"{len(odd)} user(s) have an e-mail address that is not stripped, NFC and lower case: {_named(odd)}")
    if lost:
        _wrong(f"{len(lost)} of them are not found by their address, which must be rewritten: {_named(lost)}")
    for row in twins[:_MOST_NAMED]:
        _wrong(f"users {_named(row['ids'])} have one e-mail address: keep one of them")
    return not lost and not twins


async def _daily_sums(kit: KitRocket) -> bool:
    """Tell of what would let the daily sums of usage drift, and of days that are still to be summed."""
    if not kit.settings.usage_rollup:
        return True
    active = {row["name"]: row["enabled"] for row in await kit.engine.fetch(_SQL["usage_triggers"])}
    idle = [name for name in _USAGE_TRIGGERS if active.get(name) != "O"]
    for name in idle:
        cure = f"ALTER TABLE usage ENABLE TRIGGER {name};" if name in active else "it is in the package's migrations"
        _wrong(f"trigger {name} is {'off' if name in active else 'missing'}: {cure} Then kitrocket usage rebuild")
    if not await is_complete(kit.engine):
        _note("earlier usage is not summed by day yet: kitrocket db migrate goes on with it")
    return not idle


async def _say_vacuum(engine: Engine) -> None:
    if await engine.fetchval(_SQL["usage_is_vacuumed_late"]):
        _note(
            "usage is vacuumed late, which makes sums several times slower: "
            "ALTER TABLE usage SET (autovacuum_vacuum_insert_scale_factor = 0.02);"
        )


async def _export(kit: KitRocket) -> bool:
    """Tell of calls that don't reach the provider, or not soon enough."""
    is_wanted = kit.settings.usage_export_event is not None
    is_filled = await is_outbox_filled(kit.engine)
    if is_wanted and not is_filled:
        return _wrong("KITROCKET_USAGE_EXPORT_EVENT is set, but usage is not put into the outbox: kitrocket db migrate")
    if is_filled and not is_wanted:
        _note(
            "usage is put into the outbox, and KITROCKET_USAGE_EXPORT_EVENT is not set here: set it where something "
            "exports, or kitrocket usage export --stop"
        )
    backlog = await kit.usage.export_backlog()
    if backlog.parked:
        _wrong(f"{backlog.parked:,} call(s) were refused by DodoPayments: kitrocket usage export --parked")
    lag = timedelta(0) if backlog.oldest_at is None else kit.clock() - backlog.oldest_at
    if lag >= _EXPORT_LAG:
        _wrong(f"the oldest call that is not exported is {lag // timedelta(minutes=1):,} minutes old")
    if is_wanted and not backlog.parked and lag < _EXPORT_LAG:
        _ok(f"usage is exported; {backlog.pending:,} call(s) are on their way, {backlog.waiting:,} wait for a customer")
    return not backlog.parked and lag < _EXPORT_LAG


def _named(ids: Sequence[str] | dict[str, str]) -> str:
    names = [repr(id) for id in list(ids)[:_MOST_NAMED]]
    return ", ".join([*names, "… and more"] if len(ids) > _MOST_NAMED else names)


async def _say_oauth_tokens(kit: KitRocket) -> None:
    if not kit.settings.token_keys and await kit.engine.fetchval(_SQL["any_plain_oauth_token"]):
        _note("OAuth tokens are stored plain: set KITROCKET_TOKEN_KEYS, unless Better Auth must read them")
