"""``kitrocket usage report``: tables and charts on the terminal, and the same as CSV, JSON and SVG."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from kitrocket.cli.charts import Panel, svg
from kitrocket.cli.running import opened, out, remarks, run
from kitrocket.cli.writing import ValueBar, cell, letters, printable, shortened
from kitrocket.errors import ConfigurationError, InvalidInputError
from kitrocket.kit import KitRocket
from kitrocket.models import CostLine, CostReport
from kitrocket.windows import CostDimension, Window, bucket_starts, month, time_zone

#: The columns of a CSV file, and the names in a line of a JSON file with ``by`` and ``currency`` above them.
COLUMNS = ("by", "start", "end", "day", "user_id", "model", "tokens", "calls", "cost", "currency", "unpriced_tokens")

#: How wide a name may be on the terminal, in columns, and to how many it may be cut where room is short.
_NAME, _SHORTEST = 48, 12
#: How wide a full bar is, at least and at most.
_BAR = (10, 40)
#: The decimal places of money on the terminal and in a chart. Files have every digit.
_PLACES = 4


class _By(StrEnum):
    """What ``--by`` takes: typer wants an enumeration for an option that is given several times."""

    DAY = "day"
    MODEL = "model"
    USER = "user"
    HOUR = "hour"
    MONTH = "month"


@dataclass(frozen=True)
class _Asked:
    """What a report is about. ``top`` is how many models or users are shown by name."""

    user_id: str | None
    window: Window
    zone: tzinfo
    tz: str
    now: datetime
    currency: str
    with_cost: bool
    top: int


@dataclass(frozen=True)
class _Section:
    """The answer, divided by one thing."""

    by: CostDimension
    report: CostReport


def report(
    user_id: Annotated[str | None, typer.Argument(help="A user's id; without one: all users.")] = None,
    user: Annotated[str | None, typer.Option(help="The same.")] = None,
    since: Annotated[str | None, typer.Option(help="A date, or a time such as 2026-03-01T12:30, of --tz.")] = None,
    until: Annotated[str | None, typer.Option(help="The same; it does not belong to the window. Else: now.")] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="The window without --since: up to its end.")] = 30,
    period: Annotated[
        Literal["month", "billing"] | None, typer.Option(help="This calendar month, or the user's billing period.")
    ] = None,
    by: Annotated[
        list[_By] | None,
        typer.Option(help="How to divide it; may be given several times. Else: day, model, user."),
    ] = None,
    tz: Annotated[str, typer.Option(help="Whose days: an IANA name.")] = "UTC",
    cost: Annotated[bool, typer.Option("--cost", help="With what it cost, and charts of that.")] = False,
    currency: Annotated[str, typer.Option(help="Of the cost.")] = "USD",
    top: Annotated[int, typer.Option(min=1, max=1000, help="How many models or users are named.")] = 20,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the lines to this file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the lines to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the charts into this file, an SVG.")] = None,
) -> None:
    """Show tokens and calls, and what they cost: by day, by model and by user, as tables and charts."""
    if user is not None and user_id is not None and user != user_id:
        raise typer.BadParameter("it names another user than the argument", param_hint="--user")
    if plot is not None and plot.suffix.lower() != ".svg":
        raise typer.BadParameter("charts are drawn as SVG: name a file that ends in .svg", param_hint="--plot")
    whom = user if user is not None else user_id
    divisions = by or [_By.DAY, _By.MODEL, *([_By.USER] if whom is None else [])]

    async def work() -> None:
        async with opened() as kit:
            window = await _window(kit, whom, since=since, until=until, days=days, period=period, tz=tz)
            asked = _Asked(whom, window, time_zone("tz", tz), tz, kit.clock(), currency, cost, top)
            sections = [_Section(one.value, await _cost(kit, asked, one.value)) for one in divisions]
        _print(asked, sections)
        if csv_file is not None:
            _write(csv_file, as_csv(asked, sections))
        if json_file is not None:
            _write(json_file, as_json(asked, sections))
        if plot is not None:
            _write(plot, svg([_panel(asked, section) for section in sections]))

    run(work)


async def _window(
    kit: KitRocket, user_id: str | None, *, since: str | None, until: str | None, days: int, period: str | None, tz: str
) -> Window:
    zone, now = time_zone("tz", tz), kit.clock().astimezone(UTC)
    if period is None:
        end = now if until is None else _instant("until", until, zone)
        return Window(end - timedelta(days=days) if since is None else _instant("since", since, zone), end)
    if since is not None or until is not None:
        raise InvalidInputError("period", "it stands beside since or until", "one or the other")
    if period == "month":
        return month(now, zone)
    if user_id is None:
        raise InvalidInputError("period", "it is a user's billing period", "a user")
    billed = await kit.usage.billing_period(user_id)
    return Window(billed.since, billed.until)


def _instant(field: str, text: str, zone: tzinfo) -> datetime:
    try:
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=zone)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidInputError(field, "it is no time", "a date or a time such as 2026-03-01T12:30") from error


async def _cost(kit: KitRocket, asked: _Asked, by: CostDimension) -> CostReport:
    return await kit.usage.cost(
        asked.user_id,
        since=asked.window.since,
        until=asked.window.until,
        currency=asked.currency,
        by=by,
        tz=asked.tz,
        places=_PLACES,
        allow_unpriced=True,
    )


# -- what a person sees -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A line of a table or a bar of a chart."""

    label: str
    tokens: int
    calls: int
    cost: Decimal
    unpriced: int

    def value(self, asked: _Asked) -> int | Decimal:
        return self.cost if asked.with_cost else self.tokens

    def text(self, asked: _Asked) -> str:
        return _money(self.cost, self.tokens, self.unpriced) if asked.with_cost else f"{self.tokens:,}"


def _rows(asked: _Asked, section: _Section, *, fill: bool) -> list[_Row]:
    """Return the lines in the order of time, or the largest first and the rest in one."""
    lines = section.report.lines
    if section.by in ("hour", "day", "month"):
        if fill and lines:
            starts = bucket_starts(asked.window, by=section.by, zone=asked.zone, now=asked.now)
            found = {line.start: line for line in lines}
            return [
                _row(_time_label(asked, section.by, start), [found[start]] if start in found else [])
                for start in starts
            ]
        return [_row(_time_label(asked, section.by, line.start), [line]) for line in lines]
    ranked = sorted(lines, key=lambda line: (-line.cost if asked.with_cost else 0, -line.tokens))
    named = [_row((line.model or line.user_id or ""), [line]) for line in ranked[: asked.top]]
    rest = ranked[asked.top :]
    return [*named, _row(f"({len(rest):,} others)", rest)] if rest else named


def _row(label: str, lines: Sequence[CostLine]) -> _Row:
    return _Row(
        label,
        sum(line.tokens for line in lines),
        sum(line.calls for line in lines),
        sum((line.cost for line in lines), Decimal(0)),
        sum(line.unpriced for line in lines),
    )


def _time_label(asked: _Asked, by: CostDimension, start: datetime) -> str:
    formats = {"hour": "%Y-%m-%d %H:%M", "day": "%Y-%m-%d", "month": "%Y-%m"}
    return start.astimezone(asked.zone).strftime(formats[by])


def _title(asked: _Asked, section: _Section) -> str:
    whose = "" if asked.user_id is None else f" of {asked.user_id}"
    zone = f" ({asked.tz})" if section.by in ("hour", "day", "month") else ""
    return f"{'Cost' if asked.with_cost else 'Tokens'}{whose} by {section.by}{zone}"


def _print(asked: _Asked, sections: Sequence[_Section]) -> None:
    for number, section in enumerate(sections):
        if number:
            out.print()
        out.print(Text(shortened(_title(asked, section), 2 * _NAME), style="bold"))
        out.print(_table(asked, section))
    unpriced = sections[0].report.unpriced
    if asked.with_cost and unpriced:
        named = ", ".join(shortened(one.model, _NAME) for one in unpriced)
        tokens = sum(one.tokens for one in unpriced)
        said = f"Not complete: {tokens:,} token(s), marked *, have no price in {asked.currency}. Models: {named}"
        remarks.print(Text(said))


def _table(asked: _Asked, section: _Section) -> Table:
    """Lay out the lines. Names are cut where the terminal is narrow, numbers never."""
    report = section.report
    rows = _rows(asked, section, fill=section.by != "hour")
    heads = ["tokens", "calls"]
    numbers = [[f"{row.tokens:,}", f"{row.calls:,}"] for row in rows]
    totals = [f"{report.tokens:,}", f"{report.calls:,}"]
    if asked.with_cost:
        heads.append(asked.currency)
        for row, line in zip(rows, numbers, strict=True):
            line.append(row.text(asked))
        totals.append(_money(report.exact, report.tokens, sum(one.tokens for one in report.unpriced)))
    taken = sum(max(map(len, column)) + 2 for column in zip(heads, *numbers, totals, strict=True))
    longest = max(letters(printable(label)) for label in (section.by, "total", *(row.label for row in rows)))
    name = min(longest, _NAME, max(_SHORTEST, out.width - taken - _BAR[0] - 4))
    width = min(_BAR[1], max(_BAR[0], out.width - taken - name - 4))
    table = Table(box=None, show_footer=True, width=name + width + taken + 4)
    table.add_column(section.by, footer="total", no_wrap=True, width=name)
    table.add_column("", width=width)
    for head, total in zip(heads, totals, strict=True):
        table.add_column(head, justify="right", footer=total, no_wrap=True)
    largest = max((row.value(asked) for row in rows), default=0)
    for row, line in zip(rows, numbers, strict=True):
        table.add_row(Text(shortened(row.label, name)), ValueBar(row.value(asked), largest, width), *line)
    return table


def _money(cost: Decimal, tokens: int, unpriced: int) -> str:
    """Return what a person reads; a star says that some of the tokens have no price."""
    if unpriced and unpriced == tokens:
        return "no price*"
    smallest = Decimal(1).scaleb(-_PLACES)
    shown = f"<{smallest}" if 0 < cost < smallest else f"{round(cost, _PLACES):,}"
    return f"{shown}*" if unpriced else shown


def _panel(asked: _Asked, section: _Section) -> Panel:
    rows = _rows(asked, section, fill=True)
    since, until = (
        "" if at is None else at.astimezone(asked.zone).strftime("%Y-%m-%d %H:%M")
        for at in (asked.window.since, asked.window.until)
    )
    incomplete = ", *: some of it has no price" if asked.with_cost and section.report.unpriced else ""
    return Panel(
        title=shortened(_title(asked, section), 100),
        unit=f"{asked.currency if asked.with_cost else 'tokens'}{incomplete}, {since} to {until} {asked.tz}",
        labels=[row.label for row in rows],
        values=[row.value(asked) for row in rows],
        texts=[row.text(asked) for row in rows],
        is_time=section.by in ("hour", "day", "month"),
    )


# -- what a program reads -----------------------------------------------------------------------------------------


def as_csv(asked: _Asked, sections: Sequence[_Section]) -> str:
    """Return the lines as CSV. Names that a spreadsheet would take for formulas have an apostrophe before them."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS)
    writer.writeheader()
    for section in sections:
        for line in section.report.lines:
            values = {"by": section.by, "currency": asked.currency if asked.with_cost else None, **_plain(asked, line)}
            for name in ("user_id", "model"):
                values[name] = None if getattr(line, name) is None else cell(getattr(line, name))
            writer.writerow(values)
    return file.getvalue()


def as_json(asked: _Asked, sections: Sequence[_Section]) -> str:
    """Return the lines as JSON: numbers of tokens and calls are integers, money is text with every digit."""
    report = sections[0].report
    found = {
        "since": report.since.isoformat(),
        "until": None if report.until is None else report.until.isoformat(),
        "tz": asked.tz,
        "user_id": asked.user_id,
        "tokens": report.tokens,
        "calls": report.calls,
        "currency": asked.currency if asked.with_cost else None,
        "cost": _digits(report.exact) if asked.with_cost else None,
        "complete": report.complete if asked.with_cost else None,
        "unpriced": [one.model_dump() for one in report.unpriced] if asked.with_cost else None,
        "sections": [
            {"by": section.by, "lines": [_plain(asked, line) for line in section.report.lines]} for section in sections
        ],
    }
    return json.dumps(found, indent=1) + "\n"


def _plain(asked: _Asked, line: CostLine) -> dict[str, str | int | None]:
    return {
        "start": line.start.isoformat(),
        "end": None if line.end is None else line.end.isoformat(),
        "day": None if line.day is None else line.day.isoformat(),
        "user_id": line.user_id,
        "model": line.model,
        "tokens": line.tokens,
        "calls": line.calls,
        "cost": _digits(line.cost) if asked.with_cost else None,
        "unpriced_tokens": line.unpriced if asked.with_cost else None,
    }


def _digits(cost: Decimal) -> str:
    return f"{cost:f}"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise ConfigurationError(f"{printable(str(path))} cannot be written: {error.strerror}") from error
    remarks.print(Text(f"Wrote {printable(str(path))}."))
