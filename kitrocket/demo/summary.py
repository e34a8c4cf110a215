"""What a person sees: a line for each step, a bar for what lasts, and the summary at the end."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kitrocket.cli.writing import ValueBar
from kitrocket.demo.checks import Checks, CostSeen, SubscriptionLine, UsageLine
from kitrocket.demo.delivery import Tally

#: How many users the table of usage names.
_TOP = 8
#: How long the longest bar of a table is, in columns.
_BAR = 24
#: How much of a failed check is printed, in characters.
_LONGEST = 300


class Step:
    """A step under way; ``lines`` are what is printed once it is done."""

    def __init__(self, advance: Callable[[], object]) -> None:
        self.advance = advance
        self.lines: list[str] = []


class Screen:
    """Prints steps: a progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)

    def say(self, text: str = "", *, style: str | None = None) -> None:
        """Print a line as it is, without markup, and without breaking what someone may want to copy."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    @contextmanager
    def step(self, name: str, *, total: int | None = None) -> Iterator[Step]:
        """Show a step while the block runs, then its lines with the seconds it took."""
        began = perf_counter()
        if self.console.is_terminal:
            with self._bar() as bar:
                task = bar.add_task(name, total=total)
                step = Step(lambda: bar.advance(task))
                yield step
        else:
            if total is not None:
                self.say(f"    {name:<9} {total:,} to go ...")
            step = Step(lambda: None)
            yield step
        seconds = perf_counter() - began
        self.console.print(f" [green]ok[/green] [bold]{name:<9}[/bold] {seconds:5.1f} s  ", end="")
        for number, line in enumerate(step.lines):
            self.say(f"{'':<23}{line}" if number else line)

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("    {task.description:<9}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=True,
        )


def show_deliveries(screen: Screen, counts: Tally) -> None:
    """Print what became of first and second deliveries."""
    table = _table("What became of the deliveries", "outcome", "first", "second", "what it means")
    meanings = {
        "applied": "stored; the subscription or payment follows it",
        "stale": "older than what is known: changes nothing",
        "parked": "stored until its user, product or payment is known",
        "ignored": "another kind of event: stored, without effect",
        "duplicate": "the same delivery again: changes nothing",
    }
    for outcome in [*meanings, *sorted((counts.first + counts.second).keys() - meanings.keys())]:
        table.add_row(
            outcome, _count(counts.first[outcome]), _count(counts.second[outcome]), meanings.get(outcome, "?")
        )
    _right(table, "first", "second")
    screen.console.print(table)


def show_subscriptions(screen: Screen, lines: Sequence[SubscriptionLine], titles: Mapping[str, str]) -> None:
    """Print each user's subscription and access."""
    table = _table("Every user's subscription", "user", "story", "status", "plan", "until", "access, reason")
    for line in lines:
        table.add_row(
            line.person.name.partition(" ")[0],
            titles[line.person.id],
            line.status or "-",
            line.plan or "-",
            _day(line.until),
            f"[green]yes[/green], {line.reason}" if line.allowed else f"[red]no[/red], {line.reason}",
        )
    screen.console.print(table)


def show_usage(screen: Screen, users: Sequence[UsageLine], models: Sequence[UsageLine]) -> None:
    """Print the last 30 days by user and by model, beside what plain SQL says."""
    ranked = sorted(users, key=lambda line: -line.tokens)
    top, rest = ranked[:_TOP], ranked[_TOP:]
    others = UsageLine(f"{len(rest)} others", *_sums(rest))
    _show_usage(screen, "Tokens of the last 30 days, by user", [*top, others], UsageLine("all", *_sums(users)))
    screen.say()
    _show_usage(screen, "The same, by model", models, UsageLine("all", *_sums(models)))


def show_costs(screen: Screen, costs: Sequence[CostSeen]) -> None:
    """Print what the last 30 days cost by model, with a bar each, beside what plain SQL says."""
    table = _table("What they cost, by dated prices", "", "", "USD", "by plain SQL", "")
    table.columns[1].width = _BAR
    largest = max((line.cost for line in costs), default=Decimal(0))
    for line in costs:
        verdict = "[green]=[/green]" if line.cost == line.raw else "[red]differs[/red]"
        bar = ValueBar(line.cost, largest, _BAR)
        table.add_row(line.model, bar, f"{line.cost:,.4f}", f"{line.raw:,.4f}", verdict)
    _right(table, "USD", "by plain SQL")
    screen.console.print(table)


def show_verdict(screen: Screen, checks: Checks) -> None:
    """Print how many figures were checked, and each that failed."""
    if not checks.failed:
        screen.say(f"{checks.made} figures checked against the stories and plain SQL: all right.", style="bold green")
        return
    screen.say(f"{len(checks.failed)} of {checks.made} figures are wrong:", style="bold red")
    for failure in checks.failed:
        screen.say(f"  {textwrap.shorten(failure, _LONGEST)}")


def _show_usage(screen: Screen, title: str, lines: Sequence[UsageLine], total: UsageLine) -> None:
    table = _table(title, "", "calls", "tokens", "by plain SQL", "")
    for line in lines:
        table.add_row(*_usage_cells(line))
    table.add_section()
    table.add_row(*_usage_cells(total), style="bold")
    _right(table, "calls", "tokens", "by plain SQL")
    screen.console.print(table)


def _usage_cells(line: UsageLine) -> tuple[str, str, str, str, str]:
    verdict = "[green]=[/green]" if line.tokens == line.raw else "[red]differs[/red]"
    return line.name, f"{line.calls:,}", f"{line.tokens:,}", f"{line.raw:,}", verdict


def _sums(lines: Sequence[UsageLine]) -> tuple[int, int, int]:
    return sum(line.calls for line in lines), sum(line.tokens for line in lines), sum(line.raw for line in lines)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column)
    return table


def _right(table: Table, *headers: str) -> None:
    for column in table.columns:
        if column.header in headers:
            column.justify = "right"


def _count(number: int) -> str:
    return f"{number:,}" if number else "-"


def _day(instant: datetime | None) -> str:
    return "-" if instant is None else f"{instant:%Y-%m-%d}"
