"""``kitrocket usage export``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.table import Table

from kitrocket.cli.progress import progress
from kitrocket.cli.running import opened, out, remarks, run
from kitrocket.kit import KitRocket
from kitrocket.migrations import fill_outbox


def export(
    parked: Annotated[bool, typer.Option("--parked", help="Only list what was refused.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Send what was refused once more, too.")] = False,
    stop: Annotated[
        bool, typer.Option("--stop", help="Put no more calls into the outbox, and send nothing now.")
    ] = False,
) -> None:
    """Send to DodoPayments the calls that it does not have yet, as the background work does. For cron.

    Exit code 1 when some were refused, or have to wait because DodoPayments failed.
    """
    if parked + retry + stop > 1:
        raise typer.BadParameter("--parked, --retry and --stop are three things")

    async def work() -> bool:
        async with opened() as kit:
            if parked:
                return await _list_parked(kit)
            if stop:
                done = await fill_outbox(kit.engine, on=False)
                out.print("Calls are no longer put into the outbox." if done else "Nothing to do: they were not.")
                return True
            if retry:
                remarks.print(f"{await kit.usage.retry_parked_exports():,} refused call(s) are due again")
            return await _send(kit)

    if not run(work):
        sys.exit(1)


async def _send(kit: KitRocket) -> bool:
    backlog = await kit.usage.export_backlog()
    with progress("exporting", backlog.pending) as show:
        result = await kit.usage.export(on_progress=show)
    out.print(
        f"Sent {result.sent:,} call(s) in {result.requests:,} request(s): {result.parked:,} refused, "
        f"{result.dropped:,} deleted meanwhile, {result.waiting:,} of users who are no customers."
    )
    left = await kit.usage.export_backlog()
    out.print(
        f"{left.pending:,} call(s) are left, {left.waiting:,} of them wait for a customer; {left.parked:,} refused."
    )
    if result.postponed:
        remarks.print(f"DodoPayments took {result.postponed:,} of them not now; run it again in a while")
    if left.parked:
        remarks.print("see what was refused: kitrocket usage export --parked")
    return not result.postponed and not result.parked


async def _list_parked(kit: KitRocket) -> bool:
    found = await kit.usage.parked_exports(limit=1_000)
    table = Table("call", "user", "at", "attempts", "why", box=None)
    for one in found:
        table.add_row(one.usage_id, one.user_id, f"{one.at:%Y-%m-%d %H:%M:%S}", str(one.attempts), one.error)
    out.print(table)
    count = (await kit.usage.export_backlog()).parked
    out.print(f"{count:,} call(s) are refused; send them once more: kitrocket usage export --retry")
    return count == 0
