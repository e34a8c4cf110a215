"""How a command that lasts shows how far it is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

import anyio
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from kitrocket.cli.running import remarks

#: How often a line is printed where there is no terminal, in seconds.
_EVERY = 10.0


class _Rate(ProgressColumn):
    """Items a second, as the last half minute had them."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f}/s")


class Report(Protocol):
    """Takes the number that is done so far, and of how many where that was not known before."""

    def __call__(self, done: int, total: int | None = None, /) -> None: ...


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Report]:
    """Show the progress of ``what``: call what the block gets with the number that is done so far.

    It goes to standard error: on a terminal a bar with the rate and an estimate of the time that is left, elsewhere a
    plain line every ten seconds.
    """
    if not remarks.is_terminal:
        yield _lines(what, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
    )
    with Progress(*columns, console=remarks) as bar:
        task = bar.add_task(what, total=total)

        def show(done: int, now_of: int | None = None, /) -> None:
            of = now_of if now_of is not None else total
            # More may have come up than there was at first.
            bar.update(task, completed=done, total=None if of is None else max(done, of))

        yield show


def _lines(what: str, total: int | None) -> Report:
    began = shown = anyio.current_time()

    def report(done: int, now_of: int | None = None, /) -> None:
        nonlocal shown
        now = anyio.current_time()
        if now - shown < _EVERY:
            return
        shown = now
        rate = done / (now - began)
        of = now_of if now_of is not None else total
        if of is None or not rate:
            remarks.print(f"{what}: {done:,}, {rate:,.0f}/s")
            return
        left = timedelta(seconds=round(max(of - done, 0) / rate))
        remarks.print(f"{what}: {done:,} of {max(done, of):,}, {rate:,.0f}/s, about {left} left")

    return report
