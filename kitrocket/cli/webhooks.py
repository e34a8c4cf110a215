"""``kitrocket webhooks``: see what became of deliveries, and repair it."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from kitrocket.cli.progress import progress
from kitrocket.cli.running import opened, out, remarks, run, show_table
from kitrocket.errors import KitRocketError, WebhookNotFoundError
from kitrocket.models import StoredWebhook

app = typer.Typer(no_args_is_help=True, help="Webhooks.")


@app.callback()
def _webhooks() -> None:
    """Webhooks: the stored deliveries, and what became of them."""


@app.command("list")
def list_(
    state: Annotated[
        list[str] | None, typer.Option(help="applied, stale, ignored, parked, received or dead; may be repeated.")
    ] = None,
    reason: Annotated[list[str] | None, typer.Option(help="Why it is parked, such as no_user.")] = None,
    hooks: Annotated[list[str] | None, typer.Option(help="none, pending, done or dead.")] = None,
    subscription: Annotated[str | None, typer.Option(help="A subscription's id.")] = None,
    user: Annotated[str | None, typer.Option(help="A user's id.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 50,
) -> None:
    """List stored deliveries, newest first."""

    async def work() -> None:
        async with opened() as kit:
            found = await kit.subscriptions.list_webhooks(
                states=state, reasons=reason, hook_states=hooks, subscription_id=subscription, user_id=user, limit=limit
            )
        table = Table("received", "id", "type", "state", "reason", "attempts", "hooks", "user", box=None)
        for one in found:
            table.add_row(
                _stamp(one.received_at),
                *(one.webhook_id, one.type, one.state, _why(one), str(one.attempts), one.hook_state),
                one.user_id or "",
            )
        show_table(table)
        if not found:
            remarks.print("none")
        elif len(found) == limit:
            remarks.print(f"the newest {limit:,}; there may be more: --limit")

    run(work)


@app.command()
def show(webhook_id: str) -> None:
    """Show everything that is known of a delivery but its payload."""

    async def work() -> None:
        async with opened() as kit:
            found = await kit.subscriptions.get_webhook(webhook_id)
        if found is None:
            raise WebhookNotFoundError(webhook_id)
        for name, value in found.model_dump().items():
            out.print(f"{name:16} {_stamp(value) if isinstance(value, datetime) else '' if value is None else value}")

    run(work)


@app.command()
def retry() -> None:
    """Try again what is due or has got what it waited for, as the background work does. For cron."""

    async def work() -> None:
        async with opened() as kit:
            with progress("trying again", None) as show:
                result = await kit.subscriptions.retry_parked(on_progress=show)
        waiting = result.tried - result.finished - result.dead
        out.print(
            f"Tried {result.tried:,} event(s): {result.finished:,} finished, {waiting:,} still waiting, "
            f"{result.dead:,} given up. "
            f"{result.reprojected:,} subscription(s) brought up to date, {result.purged:,} payload(s) purged."
        )

    run(work)


@app.command()
def replay(
    webhook_ids: Annotated[list[str] | None, typer.Argument(help="Deliveries; without any: those of --state.")] = None,
    state: Annotated[list[str] | None, typer.Option(help="All of a state, such as dead; may be repeated.")] = None,
    hooks: Annotated[bool, typer.Option(help="Tell the hooks once more.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="With --state: at most so many.")] = 1000,
) -> None:
    """Send stored deliveries down the same path again. Exit code 1 when one of them could not be."""
    if bool(webhook_ids) == bool(state):
        raise typer.BadParameter("name deliveries, or a --state")

    async def work() -> bool:
        counts: dict[str, int] = {}
        failed = False
        async with opened() as kit:
            ids = webhook_ids or [
                one.webhook_id for one in await kit.subscriptions.list_webhooks(states=state, limit=limit)
            ]
            with progress("replaying", len(ids)) as show:
                for number, webhook_id in enumerate(ids, 1):
                    try:
                        outcome = (await kit.subscriptions.replay(webhook_id, hooks=hooks)).outcome
                    except KitRocketError as error:
                        remarks.print(str(error))
                        failed = True
                    else:
                        counts[outcome] = counts.get(outcome, 0) + 1
                        if outcome == "parked" and (one := await kit.subscriptions.get_webhook(webhook_id)):
                            remarks.print(f"{webhook_id} is still {one.state}: {_why(one)}")
                    show(number)
        told = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(counts.items())) or "nothing"
        out.print(f"Replayed: {told}.")
        return failed

    if run(work):
        sys.exit(1)


@app.command()
def reconcile(
    dry_run: Annotated[bool, typer.Option(help="Only print what differs.")] = False,
) -> None:
    """Compare every subscription with what DodoPayments says now, and take over what differs.

    Exit code 1 when one of them could not be checked; stderr says which and why.
    """

    async def work() -> bool:
        async with opened() as kit:
            remarks.print("asking DodoPayments")
            with progress("comparing", None) as show:
                result = await kit.subscriptions.reconcile(dry_run=dry_run, on_progress=show)
        if result.differences:
            table = Table("subscription", "field", "here", "DodoPayments", box=None)
            for one in result.differences:
                missing = "(unknown)" if one.field == "subscription_id" else ""
                table.add_row(one.subscription_id, one.field, one.ours or missing, one.theirs or missing)
            show_table(table)
        differing = len({one.subscription_id for one in result.differences}) - result.gone
        changed = f"{differing:,} would be changed" if dry_run else f"{result.changed:,} changed"
        out.print(
            f"Compared {result.checked:,} subscription(s) in {result.requests:,} request(s): "
            f"{changed}, {result.raced:,} outrun by a webhook, "
            f"{result.gone:,} unknown to DodoPayments, {result.failed:,} failed."
        )
        return bool(result.failed)

    if run(work):
        sys.exit(1)


def _why(one: StoredWebhook) -> str:
    """Say why a delivery could not be applied, if so."""
    return one.reason or one.last_error or ""


def _stamp(instant: datetime) -> str:
    return instant.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
