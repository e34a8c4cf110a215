"""The assembly: settings → engine → services → background work."""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from contextvars import Context
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio

from kitrocket.accounts import AccountService
from kitrocket.clock import Clock, utc_now
from kitrocket.cookies import SessionCookie
from kitrocket.engine import Engine, choose_conf
from kitrocket.maintenance import run_every
from kitrocket.migrations import check, check_outbox, fill_outbox, migrate
from kitrocket.models import ExportResult, IssuedSession, PruneResult, SweepResult
from kitrocket.sessions import SessionService
from kitrocket.settings import Settings
from kitrocket.subscriptions import SubscriptionService
from kitrocket.tables import OWN_TABLES, SEED_TABLES
from kitrocket.usage import UsageService
from kitrocket.users import UserService

if TYPE_CHECKING:
    from kitrocket.embedded import EmbeddedServer

#: How long one tick of the background sweep may take; it comes again soon when rows are left.
_SWEEP_BUDGET = timedelta(seconds=10)

#: The same for the export, which then gives others their turn.
_EXPORT_BUDGET = timedelta(seconds=30)

#: How often hooks that failed, or that another process left, are looked for; what is received here is told at once.
_HOOK_INTERVAL = timedelta(seconds=10)

_logger = logging.getLogger("kitrocket")


class KitRocket:
    """The data layer of an application: ``async with KitRocket() as kit: ...``

    Without settings they are read from the environment, and the engine is ``piccolo_conf.DB`` where that is an
    :class:`Engine`, so that the application's own Piccolo queries share pool and transactions. ``engine`` hands one
    over; it wins over a URL in the settings. ``clock`` answers the present instant, timezone-aware. ``background``
    says whether background work runs while the block is open (``KITROCKET_BACKGROUND=0`` turns it off too).

    Construction does no input or output. Entering the block opens the engine, migrates an embedded database (another
    one never: :class:`SchemaNotMigratedError`), lets calls of ``usage.record`` share commits and starts the background
    work; leaving it ends that work, records what still waits and closes the engine.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        engine: Engine | None = None,
        clock: Clock = utc_now,
        background: bool = True,
    ) -> None:
        self.settings = settings or Settings()
        self.engine = engine or (_engine_of(self.settings) if settings else _engine_of_conf())
        self.clock = clock
        self._background = background and self.settings.background
        self._stack: AsyncExitStack | None = None

        self.sessions = SessionService(
            self.engine,
            clock=clock,
            ttl=self.settings.session_ttl,
            update_age=self.settings.session_update_age,
            short_ttl=self.settings.session_short_ttl,
            max_lifetime=self.settings.session_max_lifetime,
            fresh_age=self.settings.session_fresh_age,
            max_sessions=self.settings.session_max_sessions,
            tokens=self.settings.session_tokens,
        )
        secret = self.settings.secret
        self.users = UserService(
            self.engine,
            clock=clock,
            password_scheme=self.settings.password_scheme,
            secret=None if secret is None else secret.get_secret_value(),
            rotation=self.sessions.rotation,
        )
        self.accounts = AccountService(
            self.engine,
            clock=clock,
            token_keys=[key.get_secret_value() for key in self.settings.token_keys],
            trusted_providers=self.settings.trusted_providers,
            on_unverified_local=self.settings.on_unverified_local,
            rotation=self.sessions.rotation,
        )
        #: The cookie that the web helpers read and write.
        self.session_cookie = SessionCookie(
            [secret.get_secret_value() for secret in self.settings.better_auth_secret],
            secure=self.settings.session_cookie_secure,
            max_age=self.settings.session_ttl,
        )
        self.subscriptions = SubscriptionService(
            self.engine,
            clock=clock,
            webhook_keys=[key.get_secret_value() for key in self.settings.dodo_payments_webhook_key],
            products=self.settings.dodo_products,
            plans=self.settings.plans,
            user_keys=self.settings.dodo_user_keys,
            honour_paid_period=self.settings.honour_paid_period,
            past_due_days=self.settings.past_due_days,
            renewal_leeway_hours=self.settings.renewal_leeway_hours,
            dispute_policy=self.settings.dispute_policy,
            max_bytes=self.settings.webhook_max_bytes,
            max_attempts=self.settings.webhook_max_attempts,
            retention_days=self.settings.webhook_retention_days,
            api_key=self.settings.dodo_payments_api_key,
            base_url=self.settings.dodo_payments_base_url,
        )
        self.usage = UsageService(
            self.engine,
            clock=clock,
            queue_size=self.settings.usage_queue_size,
            linger=self.settings.usage_linger,
            rollup=self.settings.usage_rollup,
            live=self.settings.usage_live,
            export_event=self.settings.usage_export_event,
            export_late=self.settings.usage_export_late,
            api_key=self.settings.dodo_payments_api_key,
            base_url=self.settings.dodo_payments_base_url,
        )

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.engine)
            if self.engine.is_embedded:
                await migrate(self.engine)
            else:
                await check(self.engine)
            if self.settings.usage_export_event is not None:
                await self._want_outbox()
            stack.enter_context(_serving_piccolo(self.engine))
            await stack.enter_async_context(self.sessions.coalescing())
            await stack.enter_async_context(self.usage.recording(_owned))
            await stack.enter_async_context(self.usage.watching())
            if self._background:
                await stack.enter_async_context(_owned(self._work))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            with anyio.CancelScope(shield=True):
                await stack.aclose()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """Everything in the block, services and Piccolo queries alike, commits together or not at all.

        Inside another one it is a savepoint. It belongs to the task that entered it.
        """
        async with self.engine.transaction():
            yield

    async def sign_in(
        self,
        *,
        email: str,
        password: str,
        ip_address: str | None = None,
        user_agent: str | None = None,
        remember: bool = True,
    ) -> IssuedSession | None:
        """Start a session for whoever knows this e-mail address and password; ``None`` for all others.

        It is ``users.authenticate`` and ``sessions.create``, and no session outlives a change of password that was made
        meanwhile. Raises :class:`InvalidInputError`, as those two do.
        """

        async def attempt() -> IssuedSession | None:
            async with self.users.authenticating(email=email, password=password) as user:
                if user is None:
                    return None
                return await self.sessions.create(
                    user.id, ip_address=ip_address, user_agent=user_agent, remember=remember
                )

        return await self.engine.retry(attempt)

    async def _work(self) -> None:
        """Run the background work until cancelled."""
        async with anyio.create_task_group() as group:
            group.start_soon(
                partial(run_every, sleep=self.subscriptions.hooks_due),
                "run hooks",
                self.subscriptions.run_hooks,
                min(_HOOK_INTERVAL, self.settings.webhook_retry_interval),
            )
            group.start_soon(run_every, "sweep sessions", self._sweep, self.settings.session_sweep_interval)
            group.start_soon(
                run_every, "retry webhooks", self.subscriptions.retry_parked, self.settings.webhook_retry_interval
            )
            group.start_soon(
                partial(run_every, sleep=self.usage.renewal_due),
                "expire reservations",
                self.usage.expire_reservations,
                self.settings.usage_expire_interval,
            )
            if self.settings.usage_retention is not None:
                group.start_soon(run_every, "prune usage", self._prune, self.settings.usage_prune_interval)
            if self.settings.usage_export_event is not None:
                group.start_soon(run_every, "export usage", self._export, self.settings.usage_export_interval)

    async def _want_outbox(self) -> None:
        if self.engine.is_embedded:
            await fill_outbox(self.engine, on=True)
        else:
            await check_outbox(self.engine)

    async def _export(self) -> ExportResult:
        return await self.usage.export(budget=_EXPORT_BUDGET)

    async def _prune(self) -> PruneResult:
        retention = self.settings.usage_retention
        assert retention is not None
        return await self.usage.prune(self.clock() - retention, budget=_SWEEP_BUDGET)

    async def _sweep(self) -> SweepResult:
        return await self.sessions.delete_expired(budget=_SWEEP_BUDGET)


@asynccontextmanager
async def _owned(work: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Run ``work`` in a task of its own until the block is left, then cancel and await it.

    A task group entered here would break when a fixture or a framework leaves the block from another task. The task
    starts with an empty context, or it would inherit a transaction of whoever opened the kit.
    """
    task = asyncio.create_task(  # noqa: TID251 - the one task whose owner is not a task group
        work(), name=f"kitrocket {work.__qualname__}", context=Context()
    )
    try:
        yield
    finally:
        task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("background work ended by itself", exc_info=error)


@contextmanager
def _serving_piccolo(engine: Engine) -> Iterator[None]:
    """Let plain Piccolo queries on kitrocket's tables run on ``engine``, where no ``piccolo_conf`` says otherwise.

    Without this ``await Users.select()`` beside a kit with settings of its own would start the embedded server. Of
    several open kits the first one serves.
    """
    free = []
    if choose_conf() == "kitrocket.conf":
        unclaimed = (None, importlib.import_module("kitrocket.conf").DB)
        free = [table for table in (*SEED_TABLES, *OWN_TABLES) if table._meta._db in unclaimed]
    for table in free:
        table._meta._db = engine
    try:
        yield
    finally:
        for table in free:
            table._meta._db = None


def _engine_of(settings: Settings) -> Engine:
    return Engine(
        settings.database_url,
        direct_url=settings.database_direct_url,
        pooler=settings.database_pooler,
        replicas=settings.database_replicas,
        pool_size=settings.database_pool_size,
        embedded=None if settings.database_url else _embedded_of(settings),
    )


def _embedded_of(settings: Settings) -> EmbeddedServer:
    # Only here: it needs a POSIX system, and kitrocket with a URL does not.
    from kitrocket.embedded import EmbeddedServer

    return EmbeddedServer(settings.data_dir, bin_dir=settings.pg_bin, account=settings.pg_account)


def _engine_of_conf() -> Engine:
    found = getattr(importlib.import_module(choose_conf()), "DB", None)
    return found if isinstance(found, Engine) else Engine()
