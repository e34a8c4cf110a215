"""``kitrocket sessions`` and ``kitrocket usage``."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated

import anyio
import typer

from kitrocket.cli import prices, reports
from kitrocket.cli.progress import progress
from kitrocket.cli.running import opened, out, remarks, run
from kitrocket.cli.writing import printable

sessions = typer.Typer(no_args_is_help=True, help="Sessions.")
usage = typer.Typer(no_args_is_help=True, help="AI token usage.")
usage.add_typer(prices.app, name="prices")

#: How long a stopped command counts what is left, in seconds.
_COUNT_LIMIT = 5.0


@sessions.callback()
def _sessions() -> None:
    """Sessions."""


@sessions.command()
def sweep(
    limit: Annotated[int | None, typer.Option(min=1, help="Delete at most this many.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=100_000, help="Rows in one transaction.")] = 1000,
) -> None:
    """Delete the sessions that have expired. Safe beside others that sweep, and for cron; Ctrl-C stops it cleanly."""

    async def work() -> None:
        async with opened() as kit:
            total = await kit.sessions.count_expired()
            task = _Stoppable("Deleted", "expired session(s)", kit.sessions.count_expired)
            await task.run(
                "sweeping",
                total if limit is None else min(limit, total),
                lambda report: kit.sessions.delete_expired(limit=limit, batch_size=batch_size, report=report),
            )

    run(work)


@sessions.command()
def digest(
    batch_size: Annotated[int, typer.Option(min=1, max=100_000, help="Rows in one transaction.")] = 1000,
) -> None:
    """Replace plain session tokens by their digests. Nobody is signed out; Ctrl-C stops it cleanly."""

    async def work() -> None:
        async with opened() as kit:
            task = _Stoppable("Replaced", "plain token(s)", kit.sessions.count_plain)
            await task.run(
                "digesting",
                await kit.sessions.count_plain(),
                lambda report: kit.sessions.digest_tokens(batch_size=batch_size, report=report),
            )

    run(work)


class _Stoppable:
    """Work in batches that says what it did, and when it is stopped also what is left."""

    def __init__(self, verb: str, noun: str, count: Callable[[], Awaitable[int]]) -> None:
        self._verb = verb
        self._noun = noun
        self._count = count
        self._done = 0

    async def run(self, what: str, total: int, work: Callable[[Callable[[int], None]], Awaitable[object]]) -> None:
        """Run ``work``, which reports how many are done so far."""
        try:
            with progress(what, total) as show:

                def report(done: int) -> None:
                    self._done = done
                    show(done)

                await work(report)
        except anyio.get_cancelled_exc_class():
            left = "some"
            with anyio.move_on_after(_COUNT_LIMIT, shield=True):
                left = f"{await self._count():,}"
            remarks.print(f"Stopped with {left} left; run it again to go on.")
            self._say()
            raise
        self._say()

    def _say(self) -> None:
        out.print(f"{self._verb} {self._done:,} {self._noun}.")


@usage.callback()
def _usage() -> None:
    """AI token usage."""


usage.command()(reports.report)


@usage.command()
def verify() -> None:
    """Compare the daily sums with the single calls they were made of. Exit code 1 when they differ."""

    async def work() -> bool:
        async with opened() as kit:
            with _stopping("nothing was changed"), remarks.status("comparing"):
                result = await kit.usage.verify()
        for drift in result.examples:
            out.print(
                f"{drift.day} {printable(drift.user_id)} {printable(drift.model)}: {drift.kept_tokens:,} tokens of "
                f"{drift.kept_calls:,} call(s) are summed, {drift.tokens:,} of {drift.calls:,} are there",
                emoji=False,
            )
        out.print(f"{result.days:,} day(s) compared, {result.drift:,} sum(s) differ.")
        return result.drift == 0

    if not run(work):
        sys.exit(1)


@usage.command()
def rebuild(
    since: Annotated[datetime, typer.Option(formats=["%Y-%m-%d"], help="The first day, in UTC.")],
) -> None:
    """Make the daily sums what the single calls say, beside whoever writes. Ctrl-C stops it cleanly."""

    async def work() -> None:
        async with opened() as kit:
            stopped = "the days that are done are right; run it again for the others"
            with _stopping(stopped), progress("rebuilding", None) as show:
                result = await kit.usage.rebuild(since=since.replace(tzinfo=UTC), report=show)
        out.print(f"{result.days:,} day(s) recomputed, {result.corrected:,} sum(s) were wrong.")

    run(work)


@usage.command()
def prune(
    before: Annotated[datetime, typer.Option(formats=["%Y-%m-%d"], help="The first day that is kept, in UTC.")],
    batch_size: Annotated[int, typer.Option(min=1, max=100_000, help="Rows in one transaction.")] = 5_000,
) -> None:
    """Delete the single calls of earlier days; their daily sums stay. Ctrl-C stops it cleanly.

    Windows that cut into those days are refused.
    """

    async def work() -> None:
        async with opened() as kit:
            day = before.replace(tzinfo=UTC)
            total = await kit.usage.count_prunable(day)
            with _stopping("what is deleted stays summed; run it again to go on"), progress("pruning", total) as show:
                result = await kit.usage.prune(day, batch_size=batch_size, report=show)
        out.print(f"Deleted {result.deleted:,} call(s); they are kept from {result.kept_from:%Y-%m-%d} on.")

    run(work)


@contextmanager
def _stopping(remark: str) -> Iterator[None]:
    """Say how things are when Ctrl-C stops the block."""
    try:
        yield
    except anyio.get_cancelled_exc_class():
        remarks.print(f"Stopped: {remark}.")
        raise


@usage.command()
def expire() -> None:
    """Record what expired reservations had used, as the background work does. For cron."""

    async def work() -> None:
        async with opened() as kit:
            result = await kit.usage.expire_reservations()
        out.print(f"Recorded {result.recorded:,} expired reservation(s), deleted {result.deleted:,}.")

    run(work)
