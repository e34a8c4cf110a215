"""How a command runs: the event loop, the kit of the environment, and where its lines go."""

from __future__ import annotations

import logging
import sys
from asyncio import AbstractEventLoop
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import anyio
from rich.console import Console
from rich.table import Table

from kitrocket.embedded import EmbeddedServer
from kitrocket.kit import KitRocket
from kitrocket.migrations import check, migrate
from kitrocket.settings import Settings

T = TypeVar("T")

#: Progress and remarks; results go to stdout.
remarks = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
out = Console(highlight=False, markup=False, soft_wrap=True)


def run(
    work: Callable[[], Coroutine[Any, Any, T]], *, loop_factory: Callable[[], AbstractEventLoop] | None = None
) -> T:
    """Run a command's coroutine. A lone error comes out of its task group, Ctrl-C is exit code 130."""
    try:
        return anyio.run(work, backend_options={"loop_factory": loop_factory})
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None
    except KeyboardInterrupt:
        sys.exit(130)


def show_table(table: Table) -> None:
    """Print a table that loses nothing: folded to a terminal's width, in whole lines for a pipe."""
    for column in table.columns:
        column.overflow = "fold"
    console = out if out.is_terminal else Console(width=10_000, highlight=False, markup=False)
    console.print(table)


@asynccontextmanager
async def opened(*, migrated: bool = True) -> AsyncIterator[KitRocket]:
    """The kit of the environment with its engine open and no background work.

    With ``migrated`` an embedded database is migrated first, and another one must be already.
    """
    kit = KitRocket(background=False)
    async with kit.engine:
        say_where(kit)
        if migrated and kit.engine.is_embedded:
            await migrate(kit.engine, report=remarks.print)
        elif migrated:
            await check(kit.engine)
        with _logged():
            yield kit


class _Lines(logging.Handler):
    """What is logged, in the first line of each record: where in the code it failed is for the log of a server."""

    def emit(self, record: logging.LogRecord) -> None:
        remarks.print(record.getMessage().partition("\n")[0])


@contextmanager
def _logged() -> Iterator[None]:
    handler = _Lines(logging.WARNING)
    logger = logging.getLogger("kitrocket")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def say_where(kit: KitRocket) -> None:
    """Say where the data of an embedded server is."""
    if kit.engine.embedded is not None:
        remarks.print(f"embedded PostgreSQL, data in {kit.engine.embedded.data_dir}")


def embedded_server() -> EmbeddedServer:
    """Return the embedded server of the environment's settings, without starting it."""
    settings = Settings()
    return EmbeddedServer(settings.data_dir, bin_dir=settings.pg_bin, account=settings.pg_account)
