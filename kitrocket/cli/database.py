"""``kitrocket db``: the schema, and the embedded server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kitrocket import migrations
from kitrocket.better_auth import migrate_better_auth
from kitrocket.cli.running import embedded_server, opened, out, remarks, run

app = typer.Typer(no_args_is_help=True, help="The schema, and the embedded server.")


@app.command()
def migrate(
    better_auth: Annotated[
        bool, typer.Option("--better-auth", help="Add what Better Auth wants, too: columns, a table, an index.")
    ] = False,
) -> None:
    """Apply the migrations that are pending, and switch the outbox of usage on where it is exported.

    Any number of processes may do so at once.
    """

    async def work() -> None:
        async with opened(migrated=False) as kit:
            done = await migrations.migrate(kit.engine, report=remarks.print)
            if better_auth:
                done += await migrate_better_auth(kit.engine, report=remarks.print)
            if kit.settings.usage_export_event and await migrations.fill_outbox(kit.engine, on=True):
                remarks.print("usage is put into the outbox from now on")
        out.print(_applied(done))

    run(work)


@app.command()
def push(
    state_dir: Annotated[Path | None, typer.Option(help="Where it remembers what it pushed.")] = None,
) -> None:
    """Bring a development database to the tables as they are now, without a migration file."""

    async def work() -> None:
        async with opened(migrated=False) as kit:
            embedded = kit.engine.embedded
            beside = embedded.data_dir.parent if embedded is not None else Path(".kitrocket")
            done = await migrations.push(kit.engine, state_dir or beside / "push", report=remarks.print)
        out.print(_applied(done))

    run(work)


@app.command()
def adopt() -> None:
    """Take over a database that another tool made from the seed's schema: check it, then add what is missing."""

    async def work() -> None:
        async with opened(migrated=False) as kit:
            done = await migrations.adopt(kit.engine, report=remarks.print)
        out.print(f"Adopted. {_applied(done)}")

    run(work)


@app.command()
def protect() -> None:
    """Close the tables to Supabase's roles anon and authenticated, which serve them over HTTP."""

    async def work() -> None:
        async with opened() as kit:
            done = await migrations.protect(kit.engine, report=remarks.print)
        out.print(
            "Protected: nothing is granted to anon and authenticated, and row-level security is on."
            if done
            else "Nothing to do: there are no roles anon and authenticated."
        )

    run(work)


@app.command()
def stop() -> None:
    """Stop the embedded server, whoever uses it."""
    server = embedded_server()
    out.print(f"Stopped the server of {server.data_dir}." if server.stop() else f"No server runs in {server.data_dir}.")


def _applied(done: list[str]) -> str:
    return f"Applied {len(done)} migration(s)." if done else "Nothing to do: the database is up to date."
