"""The stage of a run: the embedded PostgreSQL, a new database in it, the HTTP server, and their orderly end."""

from __future__ import annotations

import base64
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import anyio
import asyncpg
from pydantic import SecretStr
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource
from starlette.applications import Starlette

from kitrocket.demo.checks import Checks, Raw
from kitrocket.demo.lifecycles import PRODUCTS
from kitrocket.demo.steps import Stage, run_steps
from kitrocket.demo.summary import Screen
from kitrocket.embedded import Address, EmbeddedServer
from kitrocket.engine import Engine
from kitrocket.kit import KitRocket
from kitrocket.migrations import migrate
from kitrocket.server import create_app, listen, serve
from kitrocket.settings import Settings

#: What the names of the demo's databases begin with.
_PREFIX = "demo_"
#: The Studio's login when the demo goes on serving.
_STAFF = "demo"
#: The exit code of a process that Ctrl-C ended.
_INTERRUPTED = 130


class _DemoSettings(Settings):
    """Settings that the environment has no say in: the figures are to be the same everywhere."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


async def run_demo(*, serve: bool = False, port: int = 0, screen: Screen | None = None) -> int:
    """Run the main job on real input, print a summary, and return 0, or 1 when a figure is not as it must be.

    With ``serve`` it then goes on serving, with the Studio and a login for it, until SIGINT or SIGTERM; without,
    nothing is left running. ``port`` is where the HTTP server listens on the loopback interface, 0 for a free one.
    Uses an embedded PostgreSQL whatever ``DATABASE_URL`` says. Must be awaited in the main thread.

    Raises :class:`~kitrocket.errors.KitRocketError` when the database or the HTTP server cannot be started.
    """
    screen = screen or Screen()
    environment = Settings()
    server = EmbeddedServer(
        _data_dir(environment),
        bin_dir=environment.pg_bin,
        account=environment.pg_account,
        announce=screen.say,
    )
    address = await server.astart()
    try:
        return await _run_on(address, screen, serving=serve, port=port)
    finally:
        await server.arelease()
        screen.say(f"PostgreSQL {'still serves another process' if server.status().running else 'is stopped'}.")


def _data_dir(environment: Settings) -> Path:
    """Beside the folder that ``KitRocket()`` would use, so that the demo never meets an application's data."""
    return environment.data_dir.with_name("demo") if environment.data_dir else Path(".kitrocket") / "demo"


async def _run_on(address: Address, screen: Screen, *, serving: bool, port: int) -> int:
    """Run on a new database and return the exit code."""
    key = "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()
    settings = _DemoSettings(dodo_payments_webhook_key=[SecretStr(key)], dodo_products=PRODUCTS)
    code = _INTERRUPTED
    async with _new_database(address) as (database, raw):
        engine = Engine(_url(address, database))
        with screen.step("database") as step:
            applied = await migrate(engine)
            step.lines = [f"{database}: made, {len(applied)} migrations applied"]
        kit = KitRocket(settings, engine=engine, background=serving)
        async with _served(create_app(kit, studio=serving), port) as running:
            stage = Stage(kit, raw, screen, Checks(), running.port, key)
            await run_steps(stage)
            code = 1 if stage.checks.failed else 0
            stays = serving and code == 0
            _say_where(screen, address, database, running.port, serving=stays)
            if stays:
                await _invite(kit, screen, running.port)
                await running.stopped.wait()
    if code == _INTERRUPTED:
        screen.say("Interrupted.")
    return code


def _url(address: Address, database: str) -> str:
    return f"postgres:///{database}?host={quote(address.host, safe='')}&port={address.port}&user={address.user}"


def _say_where(screen: Screen, address: Address, database: str, port: int, *, serving: bool) -> None:
    """Say where everything is."""
    screen.say()
    if not serving:
        screen.say(f"The rows stay in the database {database} until the next run.")
        screen.say("To look at such rows in a Studio: make up, or kitrocket demo --serve")
        return
    screen.say(f"Webhooks   http://127.0.0.1:{port}/webhooks/dodo")
    screen.say(f"Database   psql -h {address.host} -U {address.user} {database}")


async def _invite(kit: KitRocket, screen: Screen, port: int) -> None:
    """Make a login for the Studio and say how to get in and how to stop."""
    from kitrocket.admin import create_staff

    password = await create_staff(kit.engine, _STAFF)
    screen.say(f"Studio     http://127.0.0.1:{port}/admin/   log in as {_STAFF} with the password {password}")
    screen.say("Ctrl-C stops everything.")


@asynccontextmanager
async def _new_database(address: Address) -> AsyncIterator[tuple[str, Raw]]:
    """Make a database for this run, and drop those of earlier runs. The connection keeps it from being dropped."""
    database = f"{_PREFIX}{secrets.token_hex(4)}"
    connection = await asyncpg.connect(**address.dsn_kwargs())
    try:
        for row in await connection.fetch("SELECT datname FROM pg_database WHERE starts_with(datname, $1)", _PREFIX):
            try:
                await connection.execute(f'DROP DATABASE "{row["datname"]}"')
            except (asyncpg.ObjectInUseError, asyncpg.InvalidCatalogNameError):
                continue  # another demo is running on it, or has just dropped it
        await connection.execute(f'CREATE DATABASE "{database}" TEMPLATE template0 STRATEGY wal_log')
    finally:
        await connection.close()
    raw = await asyncpg.connect(**(address.dsn_kwargs() | {"database": database}))
    try:
        yield database, raw
    finally:
        with anyio.CancelScope(shield=True):
            await raw.close()


@dataclass(frozen=True)
class _Running:
    """The HTTP server: its port, and the event that is set once it has stopped."""

    port: int
    stopped: anyio.Event


@asynccontextmanager
async def _served(app: Starlette, port: int) -> AsyncIterator[_Running]:
    """Serve while the block runs. A signal that stops the server cancels the block, unless it waits for just that."""
    listener = listen(port=port)
    running = _Running(listener.getsockname()[1], anyio.Event())
    started = anyio.Event()
    try:
        async with anyio.create_task_group() as group:

            async def run() -> None:
                await serve(app, listener, on_started=started.set, log_level="warning")
                running.stopped.set()
                group.cancel_scope.cancel()

            group.start_soon(run)
            await started.wait()
            yield running
            group.cancel_scope.cancel()
    except BaseExceptionGroup as errors:
        raise _single(errors) from errors


def _single(errors: BaseException) -> BaseException:
    while isinstance(errors, BaseExceptionGroup) and len(errors.exceptions) == 1:
        errors = errors.exceptions[0]
    return errors
