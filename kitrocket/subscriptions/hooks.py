"""Functions of the application that are told of events: after the commit, at least once, outside of transactions."""

from __future__ import annotations

import inspect
import json
import logging
import re
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from typing import NamedTuple, TypeVar

import anyio
import asyncpg

from kitrocket.clock import Clock, from_db, to_db
from kitrocket.dodo.events import read_event
from kitrocket.engine import Engine
from kitrocket.errors import InvalidInputError
from kitrocket.models import BillingEvent
from kitrocket.sql import statements

_SQL = statements("webhooks")
_log = logging.getLogger("kitrocket.subscriptions")

#: What is told of events.
Hook = Callable[[BillingEvent], Awaitable[object]]
H = TypeVar("H", bound=Hook)

#: How long a process has an event to itself, and how long its hooks may take of that.
_LEASE, _LIMIT = timedelta(minutes=5), timedelta(minutes=4)
_PATTERN = re.compile(r"\*|\w+\.\*|\w+(\.\w+)*")


class HookCounts(NamedTuple):
    """How many events and incidents were told, and for how many of them a hook failed for the last time."""

    done: int
    failed: int
    dead: int


class Hooks:
    """The hooks of one service. ``pause`` answers how long to wait after so many attempts."""

    def __init__(self, engine: Engine, *, max_attempts: int, pause: Callable[[int], timedelta]) -> None:
        self._engine = engine
        self._max_attempts = max_attempts
        self._pause = pause
        self._registered: list[tuple[str, Hook]] = []
        self._waiting = anyio.Event()

    def on(self, *types: str) -> Callable[[H], H]:
        """Return a decorator that registers an async function for types of events."""
        for type in types:
            if not isinstance(type, str) or not _PATTERN.fullmatch(type):
                raise InvalidInputError("type", "it is no type of event", '"payment.failed", "subscription.*" or "*"')
        if not types:
            raise InvalidInputError("type", "it is missing", "at least one type of event")

        def register(hook: H) -> H:
            if not inspect.iscoroutinefunction(hook) and not inspect.iscoroutinefunction(
                getattr(hook, "__call__", None)  # noqa: B004 - an object whose call is async will do
            ):
                raise InvalidInputError("hook", "it is not async", "async def f(event)")
            self._registered += [(type, hook) for type in types]
            return hook

        return register

    def listen_to(self, type: str) -> bool:
        """Say whether any hook wants events of this type."""
        return any(True for _ in self._of(type))

    def wake(self) -> None:
        """Let :meth:`until_woken` return."""
        self._waiting.set()

    async def until_woken(self, seconds: float) -> None:
        """Wait until an event for hooks was committed by this process, at most so many seconds."""
        with anyio.move_on_after(seconds):
            await self._waiting.wait()
        self._waiting = anyio.Event()

    async def run_due(self, clock: Clock) -> HookCounts:
        """Tell the hooks of everything that waits for them and is due. Several processes share the work."""
        outcomes = [outcome async for outcome in self._run(clock)] if self._registered else []
        return HookCounts(outcomes.count("done"), outcomes.count("pending"), outcomes.count("dead"))

    async def _run(self, clock: Clock) -> AsyncIterator[str]:
        types = [type for type, _ in self._registered]
        wanted = (
            [type for type in types if not type.endswith("*")],
            [type.removesuffix(".*") for type in types if type.endswith(".*")],
            "*" in types,
        )
        for lease, settle, read in (
            ("lease_hook", "settle_hook", _of_event),
            ("lease_incident_hook", "settle_incident_hook", _of_incident),
        ):
            while True:
                now = clock()
                row = await self._engine.fetchrow(_SQL[lease], to_db(now), to_db(now + _LEASE), *wanted)
                if row is None:
                    break
                event, attempt = read(row), row["hook_attempts"]
                state = "done" if await self._tell(event) else "pending"
                if state == "pending" and attempt >= self._max_attempts:
                    state = "dead"
                due = to_db(clock() + self._pause(attempt)) if state == "pending" else None
                await self._engine.fetch(_SQL[settle], row[0], state, due, attempt)
                yield state

    async def _tell(self, event: BillingEvent) -> bool:
        is_told = True
        for hook in self._of(event.type):
            try:
                with anyio.fail_after(_LIMIT.total_seconds()):
                    await hook(event)
            except Exception as error:  # noqa: BLE001 - whatever a hook raises, it is tried again
                # The lines of code alone: an error's own text may quote what was delivered.
                where = "".join(traceback.format_tb(error.__traceback__))
                name = getattr(hook, "__qualname__", type(hook).__qualname__)
                _log.error(
                    "hook %s failed on %s %s: %s\n%s", name, event.type, event.webhook_id, type(error).__name__, where
                )
                is_told = False
        return is_told

    def _of(self, type: str) -> Iterator[Hook]:
        for pattern, hook in self._registered:
            if pattern in ("*", type) or (pattern.endswith(".*") and type.partition(".")[0] == pattern[:-2]):
                yield hook


def _of_event(row: asyncpg.Record) -> BillingEvent:
    return BillingEvent(
        webhook_id=row["webhook_id"],
        type=row["type"],
        at=from_db(row["event_at"]),
        user_id=row["user_id"],
        subscription_id=row["subscription_id"],
        payment_id=row["payment_id"],
        outcome=row["state"],
        data=read_event(row["payload"]).data if row["payload"] is not None else {},
    )


def _of_incident(row: asyncpg.Record) -> BillingEvent:
    return BillingEvent(
        webhook_id=row["id"],
        type=f"incident.{row['kind']}",
        at=from_db(row["opened_at"]),
        user_id=row["user_id"],
        subscription_id=row["subject"] if row["kind"] in ("still_billing", "drift") else None,
        payment_id=None,
        outcome="opened",
        data=json.loads(row["detail"]),
    )
