"""The commands, put together."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from kitrocket.cli import database, operations, serving, webhooks
from kitrocket.cli.doctor import doctor
from kitrocket.cli.exporting import export

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kitrocket {version('kitrocket')}")
        raise typer.Exit


@app.callback()
def kitrocket(
    _version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The async data layer of a SaaS on PostgreSQL. Settings come from the environment (DATABASE_URL, KITROCKET_…)."""


app.command()(serving.demo)
app.command()(serving.serve)
app.command()(serving.studio)
app.command()(doctor)
app.add_typer(database.app, name="db")
app.add_typer(operations.sessions, name="sessions")
operations.usage.command()(export)
app.add_typer(operations.usage, name="usage")
app.add_typer(webhooks.app, name="webhooks")
