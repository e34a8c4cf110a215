"""``kitrocket sessions`` and ``kitrocket usage``."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

import typer
from rich.table import Table

from kitrocket.cli.running import opened, out, remarks, run

sessions = typer.Typer(no_args_is_help=True, help="Sessions.")
usage = typer.Typer(no_args_is_help=True, help="AI token usage.")

#: How many rows one step of a sweep deletes before it shows how far it is.
_STEP = 10_000


@sessions.callback()
def _sessions() -> None:
    """Sessions."""


@sessions.command()
def sweep(
    limit: Annotated[int | None, typer.Option(min=1, help="Delete at most this many.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=100_000, help="Rows in one transaction.")] = 1000,
) -> None:
    """Delete the sessions that have expired. Safe beside others that sweep, and for cron."""

    async def work() -> None:
        deleted = 0
        async with opened() as kit:
            with remarks.status("sweeping") as status:
                while limit is None or deleted < limit:
                    step = _STEP if limit is None else min(_STEP, limit - deleted)
                    result = await kit.sessions.delete_expired(limit=step, batch_size=batch_size)
                    deleted += result.deleted
                    status.update(f"sweeping: {deleted:,} deleted")
                    if not result.more or result.deleted == 0:
                        break
        out.print(f"Deleted {deleted:,} expired session(s).")

    run(work)


@usage.callback()
def _usage() -> None:
    """AI token usage."""


@usage.command()
def report(
    user_id: Annotated[str | None, typer.Argument(help="A user's id; without one: the users with the most.")] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="The window, up to now.")] = 30,
    by: Annotated[Literal["hour", "day", "month", "model"], typer.Option(help="How to divide a user's.")] = "model",
    tz: Annotated[str, typer.Option(help="Whose days: an IANA name.")] = "UTC",
) -> None:
    """Show tokens and calls of the last days: of a user, or of the users with the most."""

    async def work() -> None:
        async with opened() as kit:
            now = kit.clock()
            since = now - timedelta(days=days)
            if user_id is None:
                rows = [
                    (top.user_id, top.tokens, top.calls) for top in await kit.usage.top_users(since=since, until=now)
                ]
                _show("user", rows)
                return
            buckets = await kit.usage.breakdown(user_id, by=by, since=since, until=now, tz=tz)
            _show(by, [(bucket.model or _stamp(bucket.start), bucket.tokens, bucket.calls) for bucket in buckets])

    run(work)


def _show(what: str, rows: list[tuple[str, int, int]]) -> None:
    table = Table(what, box=None, show_footer=True)
    table.columns[0].footer = "total"
    for name, number in (("tokens", 1), ("calls", 2)):
        table.add_column(name, justify="right", footer=f"{sum(int(row[number]) for row in rows):,}")
    for name, tokens, calls in rows:
        table.add_row(name, f"{tokens:,}", f"{calls:,}")
    out.print(table)


def _stamp(instant: datetime) -> str:
    return instant.astimezone(UTC).strftime("%Y-%m-%d %H:%M")
