"""``kitrocket usage prices``."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kitrocket.cli.running import opened, out, run
from kitrocket.cli.writing import printable
from kitrocket.models import ModelPrice

app = typer.Typer(no_args_is_help=True, help="What models cost.")

_Model = Annotated[str, typer.Argument(help="The model, as it is recorded.")]
_From = Annotated[datetime, typer.Option(formats=["%Y-%m-%d"], help="The first day, in UTC.")]
_Currency = Annotated[str, typer.Option(help="Three capital letters.")]


def _decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation as error:
        raise typer.BadParameter("not a decimal number") from error


@app.callback()
def _prices() -> None:
    """What models cost."""


@app.command("list")
def list_prices(
    model: Annotated[str | None, typer.Argument(help="Only of this model.")] = None,
    currency: Annotated[str | None, typer.Option(help="Only in this currency.")] = None,
) -> None:
    """List the prices of a million tokens, by model, currency and the first day on which each holds."""

    async def work() -> list[ModelPrice]:
        async with opened() as kit:
            return await kit.usage.prices(model, currency=currency)

    prices = run(work)
    if not prices:
        out.print("No prices.")
        return
    table = Table("model", "currency", "valid from", box=None)
    table.add_column("per million", justify="right")
    for price in prices:
        table.add_row(printable(price.model), price.currency, f"{price.valid_from}", f"{price.per_million:,}")
    out.print(table)


@app.command()
def load(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A TOML file with tables [[prices]].")],
) -> None:
    """Set the prices of a file, all of them or none; prices that it does not name stay."""

    async def work() -> None:
        async with opened() as kit:
            done = await kit.usage.load_prices(file)
        out.print(f"{done.added:,} price(s) added, {done.changed:,} changed, {done.unchanged:,} were so already.")

    run(work)


@app.command("set")
def set_price(
    model: _Model,
    per_million: Annotated[Decimal, typer.Argument(parser=_decimal, help="Of a million tokens.")],
    valid_from: _From,
    currency: _Currency = "USD",
) -> None:
    """Set what a million tokens of a model cost from a day on; one of the same day is replaced."""

    async def work() -> None:
        async with opened() as kit:
            price = await kit.usage.set_price(
                model, per_million=per_million, valid_from=valid_from.date(), currency=currency
            )
        out.print(
            f"{printable(price.model)}: {price.per_million:,} {price.currency} a million from {price.valid_from} on."
        )

    run(work)


@app.command()
def remove(model: _Model, valid_from: _From, currency: _Currency = "USD") -> None:
    """Remove a price; an older one then holds. Exit code 1 when there was none."""

    async def work() -> bool:
        async with opened() as kit:
            return await kit.usage.remove_price(model, valid_from=valid_from.date(), currency=currency)

    removed = run(work)
    out.print("Removed 1 price." if removed else "No such price.")
    if not removed:
        raise typer.Exit(1)
